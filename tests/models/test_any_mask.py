"""A model of task.hidden=drop on masks of single patches equals the slow reference over all tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from swift.models.any_mask import reconstruct
from swift.models.visible import VisibleAutoencoder, put
from tests.models import reference_visible
from tests.models.test_visible import SHAPES, build, seeded


def patch_mask(model: VisibleAutoencoder) -> Tensor:
    """Patches hidden at random in every frame; of the second clip one unit in all frames, one cell in the first."""
    grid = model.encoder.grids[0]
    hidden = torch.rand(2, *grid, generator=seeded(5)) < 0.7
    units = model.units
    x, y, z = units.tokens(0)
    hidden[1, :x, :y, :z] = True
    hidden[1, -(2**units.inner) :, -(2**units.inner) :, -(2**units.inner) :, 0] = True
    return hidden


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["factorized", "factorized-ts", "factorized-absolute", "joint-rope"])
def test_any_mask_equals_the_slow_reference(variant: str, shape: str) -> None:
    model, clips, _ = build(variant, shape)
    units, cfg, state = model.units, model.encoder.cfg, dict(model.named_parameters())
    hidden = patch_mask(model)
    inside = {name.removeprefix("encoder."): value for name, value in state.items()}
    features = reference_visible.encode(cfg, units.inner, units.tokens(0), inside, clips, ~hidden)
    cells = torch.zeros(2, *units.cells, hidden.shape[-1], dtype=torch.bool)
    for place in (~hidden).nonzero().tolist():
        sample, x, y, z, t = place
        cells[sample, x // 2**units.inner, y // 2**units.inner, z // 2**units.inner, t] = True
    assert 0 < int(cells.sum()) < cells.numel()
    expected = reference_visible.decode(cfg, units.volume, state, features, cells)
    torch.testing.assert_close(reconstruct(model, clips, hidden), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_on_whole_units_it_is_the_model_itself(shape: str) -> None:
    model, clips, shown = build("factorized", shape)
    cells = put(model(clips, shown), model.units.hidden(shown), model.units.volume)
    every = reconstruct(model, clips, model.units.mask(shown))
    hidden = cells != 0
    assert hidden.any()
    torch.testing.assert_close(every[hidden], cells[hidden], rtol=1e-10, atol=1e-10)


def test_hidden_patches_are_not_read() -> None:
    model, clips, _ = build("joint", "four")
    mask = patch_mask(model)
    voxels = mask
    for axis, size in enumerate(model.units.patch, start=1):
        voxels = voxels.repeat_interleave(size, axis)
    before = reconstruct(model, clips, mask)
    voxels = voxels.unsqueeze(1)
    assert torch.equal(reconstruct(model, torch.where(voxels, math.nan, clips), mask), before)
    assert not torch.equal(reconstruct(model, torch.where(voxels, clips, clips + 1), mask), before)

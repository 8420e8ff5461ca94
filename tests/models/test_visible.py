"""task.hidden=drop: the encoder of visible units and its decoder equal the slow reference over all tokens."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swift.models.encoder import SwinEncoder
from swift.models.masking import draw_mask, draw_shown, hidden_count
from swift.models.visible import Units, VisibleAutoencoder, put, take
from tests.models import cases, reference_visible
from tests.models.reference import random_state

FOUR = cases.Shape((24, 8, 8), 3, (2, 2, 2, 1), (4, 4, 4, 2), (2, 1, 2, 1), 8, (1, 2, 2, 4))
"""Cells 3x1x1, a unit each; stage 1 has one window a unit; the last stage runs on a padded grid of 2x1x1."""
TWO = cases.Shape((12, 12, 8), 5, (2, 3, 2, 2), (2, 2, 2, 2), (2, 2), 16, (1, 2))
"""Units of 1x2x1 cells with shifted windows inside, frames that are padded, and no stage after the one of cells."""
SHAPES = {"four": (FOUR, (8, 8, 8), 2), "two": (TWO, (4, 12, 4), 2)}
VARIANTS = ["factorized", "factorized-ts", "factorized-each", "factorized-ts-each", "factorized-rope_global"]
VARIANTS += ["factorized-absolute", "joint", "joint-rope", "joint-none"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(variant: str, shape: str, **changes: Any) -> tuple[VisibleAutoencoder, Tensor, Tensor]:
    """A model in float64 with weights far from their initial values, two clips and their visible units."""
    case, unit, shown = SHAPES[shape]
    cfg = cases.config(variant, case, **changes)
    units = Units((*case.grid, case.frames), unit, case.patch, min(2, len(case.depths) - 1), shown)
    model = VisibleAutoencoder(cfg, units).double().eval()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    model.load_state_dict(random_state(shapes, seeded(0)))
    clips = torch.randn(2, 1, *case.grid, case.frames, generator=seeded(1), dtype=torch.float64)
    chosen = torch.stack([torch.randperm(units.total, generator=seeded(2 + i))[:shown].sort().values for i in range(2)])
    return model, clips, chosen


def flags(model: VisibleAutoencoder, shown: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Visible tokens (B, *tokens) of a grid, unit by unit."""
    units = model.units
    size = [n // count for n, count in zip(tokens, units.counts)]
    out = torch.zeros(len(shown), *tokens, dtype=torch.bool)
    for sample, chosen in enumerate(shown.tolist()):
        for number, place in enumerate(product(*(range(n) for n in units.counts))):
            if number in chosen:
                x, y, z = (slice(p * s, (p + 1) * s) for p, s in zip(place, size))
                out[sample, x, y, z] = True
    return out


def slow(model: VisibleAutoencoder, state: dict[str, Tensor], clips: Tensor, shown: Tensor) -> Tensor:
    units, cfg = model.units, model.encoder.cfg
    inside = {name.removeprefix("encoder."): value for name, value in state.items()}
    grids = model.encoder.grids
    patches = tuple(u // p for u, p in zip(units.voxels, units.patch))
    features = reference_visible.encode(cfg, units.inner, patches, inside, clips, flags(model, shown, grids[0]))
    visible = flags(model, shown, grids[units.inner])
    return reference_visible.decode(cfg, units.volume, state, features, visible)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_slow_reference(variant: str, shape: str) -> None:
    model, clips, shown = build(variant, shape)
    hidden = ~flags(model, shown, model.units.volume).unsqueeze(1)
    weight = torch.randn(clips.shape, generator=seeded(9), dtype=torch.float64) * hidden
    clips.requires_grad_(True)
    found = put(model(clips, shown), model.units.hidden(shown), model.units.volume)
    names = [name for name, _ in model.named_parameters()]
    # The first stages' last norm is not used without final_norm: no gradient.
    ours = torch.autograd.grad((found * weight).sum(), [*model.parameters(), clips], allow_unused=True)
    state = {name: value.detach().clone().requires_grad_(True) for name, value in model.named_parameters()}
    other = clips.detach().clone().requires_grad_(True)
    expected = slow(model, state, other, shown)
    theirs = torch.autograd.grad((expected * weight).sum(), [*state.values(), other], allow_unused=True)
    torch.testing.assert_close(found * hidden, expected * hidden, rtol=1e-9, atol=1e-9)
    assert torch.all(found[~hidden] == 0)
    for name, a, b in zip([*names, "clips"], ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.abs().max() > 0, name
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()), msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_voxels_are_never_read(shape: str) -> None:
    model, clips, shown = build("factorized", shape)
    hidden = ~flags(model, shown, model.units.volume).unsqueeze(1)
    before = model(clips, shown)
    assert torch.equal(model(torch.where(hidden, math.nan, clips), shown), before)
    assert not torch.equal(model(torch.where(hidden, clips, clips + 1), shown), before)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model, clips, shown = build("joint-rope", "four")
    alone = torch.cat([model(clips[i : i + 1], shown[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model(clips, shown), alone, rtol=1e-10, atol=1e-10)


def test_names_of_the_encoder_are_those_of_all_tokens() -> None:
    """A clip with nothing hidden goes through the same weights."""
    model, clips, _ = build("factorized", "four")
    encoder = SwinEncoder(cases.config("factorized", FOUR), FOUR.grid, FOUR.frames).double()
    encoder.load_state_dict(model.encoder.state_dict())
    assert [tuple(f.shape[1:4]) for f in encoder(clips)] == [(12, 4, 4), (6, 2, 2), (3, 1, 1), (2, 1, 1)]


def test_a_clip_of_another_size_is_refused() -> None:
    model, clips, shown = build("factorized", "two")
    with pytest.raises(ValueError, match=r"clip of \(12, 12, 8, 4\).*built for \(12, 12, 8, 5\)"):
        model(clips[..., :4], shown)


# --- units ----------------------------------------------------------------------------------------------------------
UNITS = Units((12, 12, 8, 5), (4, 12, 4), (2, 3, 2, 2), 1, 2)


def test_boxes_of_a_volume() -> None:
    """Against loops, and back."""
    clips = torch.randn(2, 12, 12, 8, 5, generator=seeded(0))
    brain = torch.rand(2, 12, 12, 8, generator=seeded(1)) < 0.01
    size, counts = (4, 6, 4), (3, 2, 2)
    chosen = torch.tensor([[0, 5, 11], [3, 4, 7]])
    boxes, touched = take(clips, size, chosen), take(brain, size, chosen)
    for sample, place in product(range(2), range(3)):
        x, y, z = np.unravel_index(int(chosen[sample, place]), counts)
        cut = np.s_[x * 4 : x * 4 + 4, y * 6 : y * 6 + 6, z * 4 : z * 4 + 4]
        assert torch.equal(boxes[sample, place], clips[sample][cut].permute(3, 0, 1, 2))
        assert torch.equal(touched[sample, place], brain[sample][cut])
    back = put(boxes, chosen, (12, 12, 8, 5))
    assert torch.equal(take(back[:, 0], size, chosen), boxes)
    assert back.count_nonzero() == boxes.count_nonzero()
    found = UNITS.touched(brain)
    for sample, number in product(range(2), range(6)):
        x, y, z = np.unravel_index(number, (3, 1, 2))
        assert bool(found[sample, number]) == bool(brain[sample, x * 4 : x * 4 + 4, :, z * 4 : z * 4 + 4].any())


def test_masks_and_hidden_cells_of_units() -> None:
    shown = torch.tensor([[0, 3], [4, 5]])
    mask = UNITS.mask(shown)
    assert mask.shape == (2, 6, 4, 4, 3)
    for sample, x, y, z in product(range(2), range(6), range(4), range(4)):
        unit = (x // 2) * 2 + z // 2
        assert torch.all(mask[sample, x, y, z] == (unit not in shown[sample]))
    # Cells 3x2x2, units of 1x2x1 of them.
    assert UNITS.hidden(shown).tolist() == [[1, 3, 4, 6, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert (UNITS.shown_cells, UNITS.hidden_cells) == (4, 8)


def test_visible_units_are_those_of_the_tube_mask_where_all_touch_the_brain() -> None:
    sample = torch.tensor([5, 2**40, 17])
    shown = 6 - hidden_count(0.7, 6)
    drawn = draw_shown(3, sample, torch.ones(3, 6, dtype=torch.bool), shown)
    mask = draw_mask(3, sample, UNITS.volume, UNITS.patch, (4, 12, 4, 2), 0.7, "tube")
    assert torch.equal(UNITS.mask(drawn), mask)


def test_visible_units_lie_in_the_brain() -> None:
    touched = torch.rand(400, 27, generator=seeded(0)) < 0.6
    drawn = draw_shown(0, torch.arange(400), touched, 5)
    assert torch.all(touched.sum(1) > 5)
    assert torch.all(touched.gather(1, drawn))
    assert torch.all(drawn.diff(dim=1) > 0)
    # Every unit of the brain as often as any other: 5 of about 16.
    seen = torch.zeros(400, 27).scatter(1, drawn, 1.0)
    assert torch.all((seen.sum(0) / touched.sum(0) - 5 / 16.2).abs() < 0.12)


def test_a_small_brain_keeps_one_unit_hidden() -> None:
    touched = torch.zeros(50, 8, dtype=torch.bool)
    touched[:, [1, 4, 6]] = True
    drawn = draw_shown(0, torch.arange(50), touched, 4)
    assert torch.all(touched.gather(1, drawn).sum(1) == 2)
    assert len({tuple(sorted({1, 4, 6} - set(row))) for row in drawn.tolist()}) == 3

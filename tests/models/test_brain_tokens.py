"""tokens=brain equals an ordinary masked model over all tokens in float64: outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from swift.models.attention import WindowAttention
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.encoder import SwinEncoder
from swift.models.heads import Head, TargetModel
from swift.models.token_sets import token_sets
from swift.utils.bits import to_text
from tests.models import cases
from tests.models import reference as ref
from tests.models.test_reference import TIGHT, check_gradients, decoder_shapes, loaded, normal, seeded, weighted
from tests.small import GRID, settings

FAST = {("joint", "padded"), ("factorized", "long"), ("factorized-ts-each", "thin"), ("factorized-rope_global", "thin")}
FAST |= {("joint-rope", "divisible"), ("factorized-absolute", "padded"), ("factorized-none", "slices")}
VARIANTS = [name for name in cases.VARIANTS if name != "v1"]


def brains(*grid: int) -> Tensor:
    """Ragged: half of the voxels in one corner's cells, a few voxels, everything."""
    out = torch.zeros(3, *grid, dtype=torch.bool)
    x, y, z = (max(1, 2 * n // 3) for n in grid)
    out[0, :x, :y, :z] = torch.rand(x, y, z, generator=seeded(9)) < 0.3
    out[0, 0, 0, 0] = True
    out[1, -1, -1, -1] = out[1, grid[0] // 2, 0, 0] = True
    out[2] = True
    return out


@pytest.fixture(params=[None, 4])
def multiple(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows by length, and padded with a key mask."""
    monkeypatch.setattr(WindowAttention, "multiple", request.param)


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        pytest.param(variant, shape, marks=() if (variant, shape) in FAST else pytest.mark.slow)
        for variant in VARIANTS
        for shape in cases.SHAPES
    ],
)
@pytest.mark.usefixtures("multiple")
def test_encoder_equals_masked_reference(variant: str, shape: str) -> None:
    size = cases.SHAPES[shape]
    cfg = cases.config(variant, shape, tokens="brain")
    state = ref.random_state(ref.parameter_shapes(cfg, size.grid, size.frames), seeded())
    model = loaded(SwinEncoder(cfg, size.grid, size.frames), state)
    brain = brains(*size.grid)
    x = normal(3, size.frames, *size.grid, seed=1).permute(0, 2, 3, 4, 1).unsqueeze(1)
    inputs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    state = {name: value.requires_grad_() for name, value in state.items()}
    fast = model(inputs[0], brain)
    slow = ref.encode(cfg, size.grid, size.frames, state, inputs[1], brain=brain)
    for got, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)
    check_gradients(weighted(fast), weighted(slow), model, state, inputs)


def test_the_tokens_of_a_cohort_are_those_of_its_union_in_every_clip() -> None:
    """As the reference given the union as each clip's brain: what lies outside a clip's own exists and attends."""
    size = cases.SHAPES["padded"]
    cfg = cases.config("factorized", "padded", tokens="brain")
    brain = brains(*size.grid)[:2]
    cells = ref.existing(brain, cfg.patch_size[:3])
    both = cells.any(0)
    assert not torch.equal(cells[0], cells[1])
    assert not both.all()
    cfg = replace(cfg, cohort=to_text(both.numpy()))
    state = ref.random_state(ref.parameter_shapes(cfg, size.grid, size.frames), seeded())
    model = loaded(SwinEncoder(cfg, size.grid, size.frames), state)
    x = normal(2, 1, *size.grid, size.frames, seed=1)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    state = {name: value.requires_grad_() for name, value in state.items()}
    voxels = both
    for axis, n in enumerate(cfg.patch_size[:3]):
        voxels = voxels.repeat_interleave(n, axis)
    voxels = voxels[: size.grid[0], : size.grid[1], : size.grid[2]].expand(2, *size.grid)
    fast = model(inputs[0], brain)
    slow = ref.encode(cfg, size.grid, size.frames, state, inputs[1], brain=voxels)
    for got, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)
    check_gradients(weighted(fast), weighted(slow), model, state, inputs)
    sets = model.token_sets(brain, x)
    assert sets is not None
    assert sets is model.token_sets(~brain, x)
    assert [one.clip.bincount().tolist() for one in sets] == [
        [int(ref.existing(voxels, [n << stage for n in cfg.patch_size[:3]])[0].sum())] * 2 for stage in range(len(sets))
    ]
    everywhere = torch.ones(2, *size.grid, dtype=torch.bool)
    assert torch.equal(model.inside(everywhere), voxels)
    assert torch.equal(model.inside(brain), brain)


def test_a_cohort_of_another_grid_is_refused() -> None:
    size = cases.SHAPES["divisible"]
    cfg = cases.config("factorized", "divisible", tokens="brain", cohort=to_text(np.ones((2, 3, 4), bool)))
    with pytest.raises(ValueError, match=r"model\.cohort has 2x3x4 cells, but clips of .* it belongs to another grid"):
        SwinEncoder(cfg, size.grid, size.frames)


@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize(("variant", "shape"), [("factorized", "padded"), ("joint-rope_global", "thin")])
def test_masked_autoencoder_equals_masked_reference(variant: str, shape: str, decoder: str) -> None:
    """Hidden patches and brains together; a patch (linear decoder: a cell) that does not exist is predicted as 0."""
    size = cases.SHAPES[shape]
    cfg, grid, frames = cases.config(variant, shape, decoder=decoder, tokens="brain"), size.grid, size.frames
    encoder_state = ref.random_state(ref.parameter_shapes(cfg, grid, frames), seeded())
    rest = ref.random_state({"mask_token": (cfg.embed_dim,), **decoder_shapes(cfg)}, seeded(1))
    state = {f"encoder.{name}": value for name, value in encoder_state.items()} | rest
    model = loaded(MaskedAutoencoder(cfg, grid, frames), state)
    state = {name: value.requires_grad_() for name, value in state.items()}
    plain = {name.removeprefix("encoder."): value for name, value in state.items()}
    x = normal(3, 1, *grid, frames, seed=2)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    brain = brains(*grid)
    hidden = torch.rand(3, *ref.stage_grids(cfg, grid, frames)[0], generator=seeded(3)) < 0.6
    fast = model(inputs[0], hidden, brain)
    features = ref.encode(cfg, grid, frames, plain, inputs[1], hidden, brain)
    decode = ref.decode_local if decoder == "local" else ref.decode_linear
    cell = [p * (1 if decoder == "local" else 2 ** (len(cfg.depths) - 1)) for p in cfg.patch_size[:3]]
    inside = ref.existing(brain, cell)
    for axis, n in enumerate(cell, start=1):
        inside = inside.repeat_interleave(n, axis)
    inside = inside[:, : grid[0], : grid[1], : grid[2]]
    slow = torch.where(inside[:, None, ..., None], decode(cfg, grid, frames, plain, features), 0.0)
    torch.testing.assert_close(fast, slow, **TIGHT)
    check_gradients(weighted([fast]), weighted([slow]), model, state, inputs)


@pytest.mark.parametrize("variant", ["joint", "factorized"])
def test_a_full_brain_is_the_box(variant: str) -> None:
    size = cases.SHAPES["padded"]
    cfg = cases.config(variant, "padded", tokens="brain")
    torch.manual_seed(0)
    model = SwinEncoder(cfg, size.grid, size.frames).double()
    x = normal(2, 1, *size.grid, size.frames)
    inside = model(x, torch.ones(2, *size.grid, dtype=torch.bool))
    everywhere = model(x)
    model.cfg = replace(cfg, tokens="box")
    for got, same, box in zip(inside, everywhere, model(x), strict=True):
        torch.testing.assert_close(got, box, **TIGHT)
        assert torch.equal(got, same)


def test_stochastic_depth_drops_whole_clips_as_in_the_box() -> None:
    size = cases.SHAPES["divisible"]
    cfg = cases.config("factorized", "divisible", tokens="brain", drop_path=0.6)
    torch.manual_seed(0)
    model = SwinEncoder(cfg, size.grid, size.frames).double().train()
    x, brain = normal(4, 1, *size.grid, size.frames), torch.ones(4, *size.grid, dtype=torch.bool)
    torch.manual_seed(1)
    inside = model(x, brain)
    model.cfg = replace(cfg, tokens="box")
    torch.manual_seed(1)
    for got, box in zip(inside, model(x), strict=True):
        torch.testing.assert_close(got, box, **TIGHT)


def test_a_clip_without_brain_keeps_one_place_and_changes_no_other() -> None:
    """It is a clip like others for ranks that wait for each other; its gradient exists and is finite."""
    size = cases.SHAPES["divisible"]
    cfg = cases.config("factorized", "divisible", tokens="brain")
    torch.manual_seed(0)
    model = SwinEncoder(cfg, size.grid, size.frames).double()
    x, brain = normal(2, 1, *size.grid, size.frames), brains(*size.grid)[:2]
    brain[1] = False
    both, alone = model(x, brain), model(x[:1], brain[:1])
    for got, expected in zip(both, alone, strict=True):
        torch.testing.assert_close(got[:1], expected, **TIGHT)
        assert got[1].flatten(0, 2).abs().sum((1, 2)).nonzero().flatten().tolist() == [0]
    empty = model(x[1:], brain[1:])[-1].sum()
    for name, parameter in model.named_parameters():
        gradient = torch.autograd.grad(empty, parameter, retain_graph=True)[0]
        assert gradient.isfinite().all(), name


def test_a_model_with_a_head_reads_brain_tokens_alone() -> None:
    """What fine-tuning and attribution rest on: the gradient is exactly zero in patches without brain, and only there.

    After inference mode on the same masks, as a validation before training.
    """
    cfg = settings("task=synthetic_binary", "model.tokens=brain", "model.patch_size=[2,2,2,2]")
    torch.manual_seed(0)
    model = TargetModel(cfg.model, cfg.task, cfg.data.grid, cfg.data.frames).double()
    brain = brains(*GRID)[:2]
    x = normal(2, 1, *GRID, cfg.data.frames)
    with torch.inference_mode():
        before = model(x, brain)
    x.requires_grad_()
    after = model(x, brain)
    assert torch.equal(before, after.detach())
    after.sum().backward()
    assert x.grad is not None
    touched = ref.existing(brain, [2, 2, 2])
    for axis in (1, 2, 3):
        touched = touched.repeat_interleave(2, axis)
    assert torch.equal(x.grad.abs().sum((1, 5)) > 0, touched)


def test_a_head_on_a_cohorts_tokens_pools_each_clips_own_brain() -> None:
    """A brain that reaches beyond the cohort's counts as far as there are tokens."""
    cfg = settings("task=synthetic_binary", "model.tokens=brain", "model.patch_size=[2,2,2,2]")
    brain = torch.zeros(2, *GRID, dtype=torch.bool)
    brain[0, :6, :6, :6] = True
    brain[1, 4:9, :6, :3] = True
    cells = np.zeros((6, 6, 6), bool)
    cells[:4, :3, :3] = True
    model_cfg = replace(cfg.model, cohort=to_text(cells))
    torch.manual_seed(0)
    model = TargetModel(model_cfg, cfg.task, cfg.data.grid, cfg.data.frames).double()
    x = normal(2, 1, *GRID, cfg.data.frames)
    features = model.encoder(x, brain)[-1]
    seen = brain.clone()
    seen[1, 8] = False
    expected = []
    for row in range(2):
        tokens = ref.existing(seen[row : row + 1], [4, 4, 4])[0]
        expected.append(features[row][tokens].mean((0, 1)))
    head = model.head
    assert isinstance(head, Head)
    torch.testing.assert_close(model(x, brain), head.linear(head.norm(torch.stack(expected))).float())
    assert int(ref.existing(brain[1:], [4, 4, 4]).sum()) > int(ref.existing(seen[1:], [4, 4, 4]).sum())


def test_sets_are_made_once_for_a_batch() -> None:
    brain = brains(8, 8, 8)
    first, again = (token_sets(brain.clone(), (2, 2, 2, 1), 3) for _ in range(2))
    assert all(one is other for one, other in zip(first, again, strict=True))
    expected = [int(ref.existing(brain, [2 << stage] * 3).sum()) for stage in range(3)]
    assert [len(one) for one in first] == expected

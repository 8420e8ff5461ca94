"""task.hidden=drop task.mask_kind=frames: the model of visible frames equals the slow reference over all tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from swift.models.any_mask import reconstruct
from swift.models.autoencoder import reconstruction_loss
from swift.models.encoder import SwinEncoder
from swift.models.masking import draw_mask, hidden_count
from swift.models.visible_frames import FrameAutoencoder, FrameUnits, frames_loss
from tests.models import cases, reference_visible
from tests.models.reference import random_state
from tests.models.test_visible import VARIANTS, seeded

SHAPES = {
    # Odd grids and shifted windows in space; 7 time steps in windows of 3 (whole here), 5 of them hidden.
    "odd": (cases.Shape((10, 6, 6), 7, (2, 2, 2, 1), (2, 3, 2, 3), (2, 2), 16, (1, 2)), 1, 2),
    # Three stages, patches of two frames of which the last is padded; hidden in pairs of time steps: 2 of 4 visible.
    "pairs": (cases.Shape((8, 8, 6), 7, (2, 2, 2, 2), (2, 2, 2, 2), (1, 2, 2), 8, (1, 2, 2)), 4, 2),
}


def build(variant: str, shape: str) -> tuple[FrameAutoencoder, Tensor, Tensor]:
    """A model in float64 with weights far from their initial values, two clips and their visible time steps."""
    case, unit, shown = SHAPES[shape]
    cfg = cases.config(variant, case)
    units = FrameUnits((*case.grid, case.frames), tuple(case.patch), unit, shown, 0.7)
    model = FrameAutoencoder(cfg, units).double().eval()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    model.load_state_dict(random_state(shapes, seeded(0)))
    clips = torch.randn(2, 1, *case.grid, case.frames, generator=seeded(1), dtype=torch.float64)
    steps = [torch.randperm(units.frames, generator=seeded(4 + i))[:shown].sort().values for i in range(2)]
    return model, clips, torch.stack(steps)


def slow(model: FrameAutoencoder, state: dict[str, Tensor], clips: Tensor, visible: Tensor) -> Tensor:
    inside = {name.removeprefix("encoder."): value for name, value in state.items()}
    features = reference_visible.encode_frames(model.encoder.cfg, inside, clips, visible)
    return reference_visible.decode_frames(model.encoder.cfg, model.units.volume, state, features, visible)


def flags(model: FrameAutoencoder, shown: Tensor) -> Tensor:
    """Visible patches (B, x, y, z, t), frame by frame."""
    out = torch.zeros(len(shown), *model.encoder.grids[0], dtype=torch.bool)
    for sample, steps in enumerate(shown.tolist()):
        out[sample, ..., steps] = True
    return out


def of_voxels(patches: Tensor, model: FrameAutoencoder) -> Tensor:
    """Flags of patches -> of voxels (B, 1, X, Y, Z, T)."""
    for axis, size in enumerate(model.units.patch, start=1):
        patches = patches.repeat_interleave(size, axis)
    x, y, z, t = model.units.volume
    return patches[:, None, :x, :y, :z, :t]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_slow_reference(variant: str, shape: str) -> None:
    model, clips, shown = build(variant, shape)
    hidden = of_voxels(~flags(model, shown), model)
    weight = torch.randn(clips.shape, generator=seeded(9), dtype=torch.float64) * hidden
    clips.requires_grad_(True)
    found = model.units.put(model(clips, shown), shown)
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad((found * weight).sum(), [*model.parameters(), clips], allow_unused=True)
    state = {name: value.detach().clone().requires_grad_(True) for name, value in model.named_parameters()}
    other = clips.detach().clone().requires_grad_(True)
    expected = slow(model, state, other, flags(model, shown))
    theirs = torch.autograd.grad((expected * weight).sum(), [*state.values(), other], allow_unused=True)
    torch.testing.assert_close(found * hidden, expected * hidden, rtol=1e-9, atol=1e-9)
    assert torch.all(found[~hidden] == 0)
    for name, a, b in zip([*names, "clips"], ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.abs().max() > 0, name
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()), msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["factorized", "factorized-absolute", "joint-rope"])
def test_any_mask_equals_the_slow_reference(variant: str, shape: str) -> None:
    """Patches hidden at random; and on whole frames it is the model itself."""
    model, clips, shown = build(variant, shape)
    hidden = torch.rand(2, *model.encoder.grids[0], generator=seeded(5)) < 0.7
    hidden[1, ..., 0] = True
    expected = slow(model, dict(model.named_parameters()), clips, ~hidden)
    torch.testing.assert_close(reconstruct(model, clips, hidden), expected, rtol=1e-9, atol=1e-9)
    frames = model.units.mask(shown)
    assert torch.equal(frames, ~flags(model, shown))
    own, where = model.units.put(model(clips, shown), shown), of_voxels(frames, model)
    torch.testing.assert_close(reconstruct(model, clips, frames)[where], own[where], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_voxels_are_never_read(shape: str) -> None:
    model, clips, shown = build("factorized", shape)
    hidden = of_voxels(~flags(model, shown), model)
    before = model(clips, shown)
    assert torch.equal(model(torch.where(hidden, math.nan, clips), shown), before)
    assert not torch.equal(model(torch.where(hidden, clips, clips + 1), shown), before)


@pytest.mark.parametrize("variant", ["factorized", "joint-rope", "joint"])
def test_nothing_hidden_is_the_ordinary_encoder(variant: str) -> None:
    """Where one window holds all time steps, as with clips no longer than it."""
    case, *_ = SHAPES["odd"]
    cfg = cases.config(variant, case, window=[2, 3, 2, 7])
    model = FrameAutoencoder(cfg, FrameUnits((*case.grid, 7), tuple(case.patch), 1, 6, 0.1)).double().eval()
    encoder = SwinEncoder(cfg, case.grid, 7).double().eval()
    encoder.load_state_dict(model.encoder.state_dict())
    clips = torch.randn(1, 1, *case.grid, 7, generator=seeded(1), dtype=torch.float64)
    nothing = torch.zeros(1, *model.encoder.grids[0], dtype=torch.bool)
    features = encoder(clips)
    own = model.decoder.every_patch(features, ~nothing)
    torch.testing.assert_close(reconstruct(model, clips, nothing), own, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("frames", "pt", "unit"), [(20, 1, 1), (9, 2, 2), (16, 1, 4), (15, 2, 4)])
def test_time_steps_are_those_of_the_mask(frames: int, pt: int, unit: int) -> None:
    """Exact in number, the same for a sample whatever its batch, and what `draw_mask` hides."""
    sample = torch.tensor([5, 2**40, 17])
    volume, patch, count = (4, 4, 4, frames), (2, 2, 2, pt), -(-frames // unit)
    units = FrameUnits(volume, patch, unit, (count - hidden_count(0.7, count)) * (unit // pt), 0.7)
    shown = units.draw(3, sample, torch.ones(3, 4, 4, 4, dtype=torch.bool))
    mask = draw_mask(3, sample, volume, patch, (2, 2, 2, unit), 0.7, "frames")
    assert torch.equal(units.mask(shown), mask)
    assert torch.all(shown.diff(dim=1) > 0)
    assert torch.equal(units.draw(3, sample[1:2], torch.ones(1, 4, 4, 4, dtype=torch.bool)), shown[1:2])
    assert len({tuple(row) for row in shown.tolist()}) > 1
    both = torch.cat([shown, units.hidden(shown)], 1).sort(1).values
    assert torch.equal(both, torch.arange(units.frames).expand(3, -1))


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "l2"])
def test_the_loss_is_that_of_the_whole_prediction(kind: str) -> None:
    """With a padded last patch, brains of different size, and a clip that does not count."""
    model, clips, shown = build("factorized", "pairs")
    clips, shown = torch.cat([clips, clips[:1]]), torch.cat([shown, shown[:1]])
    counted = torch.rand(3, *clips.shape[2:5], generator=seeded(3)) < 0.4
    counted[2] = False
    predicted = model(clips, shown)
    whole = model.units.put(predicted, shown)
    hidden = of_voxels(~flags(model, shown), model)[:, 0] & counted.unsqueeze(-1)
    found = frames_loss(model.units, predicted, clips, counted, shown, kind)
    assert found.item() == pytest.approx(reconstruction_loss(whole, clips, hidden, kind).item(), rel=1e-5)
    nothing = frames_loss(model.units, predicted[2:], clips[2:], counted[2:], shown[2:], kind)
    assert nothing.item() == 0


def test_a_clip_of_another_size_is_refused() -> None:
    model, clips, shown = build("factorized", "odd")
    with pytest.raises(ValueError, match=r"clip of \(10, 6, 6, 6\).*built for \(10, 6, 6, 7\)"):
        model(clips[..., :6], shown)

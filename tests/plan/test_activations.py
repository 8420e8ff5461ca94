"""Predicted activations against what autograd keeps and against the peak of a step, at sizes up to 14.5B."""

from __future__ import annotations

import pytest
import torch

from swift.models.attention import WindowAttention
from swift.models.visible import Units, VisibleAutoencoder
from swift.models.visible_frames import FrameAutoencoder, FrameUnits
from swift.plan.__main__ import composed
from swift.plan.activations import Widths, decoder_bytes, kept_bytes, loss_bytes, moments
from swift.plan.geometry import build_geometry, usual_brain
from tests.models.cases import SHAPES, VARIANTS, Shape, config
from tests.plan.measure import kept_by, kept_by_frames, kept_by_gpu_autocast, kept_by_visible, peak_of_step

# Wide enough that the rotations of a layer, a constant left out, are small beside its activations.
SHAPE = Shape((16, 16, 16), 8, (2, 2, 2, 1), (4, 4, 4, 4), (2, 2), 32, (2, 4))
VOLUME = (16, 16, 16, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kept_by_a_real_forward_pass(variant: str, mode: str) -> None:
    """Within 3 %: on a CPU in bf16 the statistics of norms are kept in two bytes instead of four."""
    cfg = config(variant, SHAPE)
    predicted = kept_bytes(build_geometry(cfg, VOLUME), Widths(mode), "none", "l1")
    assert predicted == pytest.approx(kept_by(cfg, VOLUME, DTYPES[mode]), rel=0.03 if mode == "bf16" else 0.01)


@pytest.mark.parametrize(("variant", "hidden"), [("joint", None), ("joint-rope", 0.6), ("factorized", 0.8)])
def test_brain_tokens(variant: str, hidden: float | None) -> None:
    """Within 5 %: the tables of places, kept with the masks and the same for all blocks, are left out.

    In training the head and the loss keep hidden patches alone.
    """
    cfg, brain = config(variant, SHAPE, tokens="brain"), usual_brain(VOLUME[:3])
    geometry = build_geometry(cfg, VOLUME, brain=brain, hidden=hidden)
    predicted = kept_bytes(geometry, Widths("fp32"), "none", "l1")
    rows = None if hidden is None else geometry.head_rows
    assert predicted == pytest.approx(kept_by(cfg, VOLUME, torch.float32, brain=brain, rows=rows), rel=0.05)
    assert predicted < 0.7 * kept_bytes(build_geometry(config(variant, SHAPE), VOLUME), Widths("fp32"), "none", "l1")
    whole = build_geometry(cfg, VOLUME, brain=brain)
    of_head = (decoder_bytes(one, Widths("fp32")) + loss_bytes(one, "l1") for one in (geometry, whole))
    assert rows is None or next(of_head) < next(of_head)


@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize("shape", ["divisible", "padded", "slices", "thin"])
def test_other_shapes(shape: str, decoder: str) -> None:
    """Ten channels and four tokens a window: small tensors, so within 5 %."""
    for variant in ("v1", "joint", "factorized"):
        cfg, volume = config(variant, shape, decoder=decoder), (*SHAPES[shape].grid, SHAPES[shape].frames)
        predicted = kept_bytes(build_geometry(cfg, volume), Widths("fp32"), "none", "l1")
        assert predicted == pytest.approx(kept_by(cfg, volume, torch.float32), rel=0.05)


@pytest.mark.parametrize("loss", ["l1", "smooth_l1", "l2"])
def test_losses(loss: str) -> None:
    cfg = config("factorized", SHAPE)
    predicted = kept_bytes(build_geometry(cfg, VOLUME), Widths("fp32"), "none", loss)
    assert predicted == pytest.approx(kept_by(cfg, VOLUME, torch.float32, loss), rel=0.01)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("variant", ["joint", "factorized", "factorized-ts-each"])
def test_visible_units_alone(variant: str, loss: str) -> None:
    """task.hidden=drop, 3 of 8 units of 8 voxels."""
    cfg = config(variant, Shape((16, 16, 16), 8, (2, 2, 2, 1), (4, 4, 4, 4), (2, 2, 2, 1), 32, (2, 4, 4, 4)))
    units = Units(VOLUME, (8, 8, 8), (2, 2, 2, 1), 2, 3)
    predicted = kept_bytes(build_geometry(cfg, VOLUME, units), Widths("fp32"), "none", loss)
    assert predicted == pytest.approx(kept_by_visible(VisibleAutoencoder(cfg, units), loss), rel=0.02)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("variant", ["joint", "factorized", "factorized-ts-each"])
def test_visible_frames_alone(variant: str, loss: str) -> None:
    """task.hidden=drop task.mask_kind=frames, 3 of 8 frames."""
    cfg = config(variant, SHAPE)
    units = FrameUnits(VOLUME, tuple(cfg.patch_size), cfg.patch_size[3], 3, 0.6)
    predicted = kept_bytes(build_geometry(cfg, VOLUME, units), Widths("fp32"), "none", loss)
    assert predicted == pytest.approx(kept_by_frames(FrameAutoencoder(cfg, units), loss), rel=0.03)


@pytest.mark.parametrize("variant", ["v1", "joint", "joint-rope", "factorized"])
def test_autocast_of_a_gpu(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in fp32, products in bf16, and a bf16 copy of every weight; windows that fit the kernel in the kernel."""
    cfg = config(variant, SHAPE)
    geometry = build_geometry(cfg, VOLUME)
    kernel = cfg.attention == "factorized"
    monkeypatch.setattr(WindowAttention, "method", "kernel" if kernel else "groups")
    predicted = kept_bytes(geometry, Widths("autocast", kernel), "none", "l1") + 2 * geometry.total_parameters
    assert predicted == pytest.approx(kept_by_gpu_autocast(cfg, VOLUME), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("model", ["tiny", "14b5"])
def test_peak_of_a_step(model: str, checkpointing: str) -> None:
    """Activations and gradients together, at the moment they are most: within 3 % at full size."""
    cfg = composed(["data=store", "data.path=none", f"model={model}"])[0]
    volume = (*cfg.data.grid, cfg.data.frames)
    found = moments(build_geometry(cfg.model, volume), Widths("bf16"), checkpointing, "l1")
    predicted = max(moment.activations + 2 * moment.gradients for moment in found)
    measured = peak_of_step(cfg.model, volume, torch.bfloat16, checkpointing)
    assert predicted == pytest.approx(measured, rel=0.03 if model != "tiny" else 0.1)


def test_activations_are_linear_in_the_frames() -> None:
    """Twice the frames, twice the bytes: nothing is counted that does not belong to a clip."""
    cfg = composed(["data=store", "data.path=none", "model=51m"])[0].model
    once, twice = (
        kept_bytes(build_geometry(cfg, (96, 96, 96, frames)), Widths("bf16"), "none", "l1") for frames in (20, 40)
    )
    assert twice == pytest.approx(2 * once, rel=1e-3)


def test_checkpointing_keeps_less_the_harsher_it_is() -> None:
    geometry = build_geometry(config("factorized", SHAPE), VOLUME)
    none, selective, block = (
        kept_bytes(geometry, Widths("bf16"), kind, "l1") for kind in ("none", "selective", "block")
    )
    assert none > 1.5 * selective > 2 * block

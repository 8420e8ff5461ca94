"""FLOPs in closed form against torch's own counter on real runs, and against the formulas of the design notes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swift.models.adapt import adapt
from swift.models.autoencoder import MaskedAutoencoder, reconstruction_loss, rows_loss
from swift.models.encoder import SwinEncoder
from swift.models.masking import draw_mask
from swift.models.visible import hidden_loss
from swift.models.visible_frames import frames_loss
from swift.plan.__main__ import composed
from swift.plan.flops import BrainCosts, flops_by_part, model_flops, tuning_flops
from swift.plan.geometry import build_geometry, geometry_of, hidden_part
from tests.models.cases import SHAPES, config
from tests.models.test_visible import build as visible_model
from tests.models.test_visible_frames import SHAPES as FRAME_SHAPES
from tests.models.test_visible_frames import build as frames_model
from tests.small import settings

CLIP = (96, 96, 96, 20)
COMPOSED = ["data=store", "data.path=none"]


def counted(cfg, volume, device="cpu", brain=None, rows=None) -> tuple[float, float]:
    """Forward and backward FLOPs of one clip that torch counts. Only the math kernel's products are all seen by it.

    rows: Predict so many patches alone, as training does on brain tokens.
    """
    with torch.device(device):
        model = MaskedAutoencoder(cfg, volume[:3], volume[3])
        x = torch.zeros(1, 1, *volume)
        mask = torch.zeros(1, *model.encoder.grids[0], dtype=torch.bool)
        voxels = torch.ones(1, *volume, dtype=torch.bool)
    found = []
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            if rows is None:
                loss = reconstruction_loss(model(x, mask, brain), x, voxels, "l1")
            else:
                chosen, places = torch.arange(rows), model.encoder.token_sets(brain, x)
                prediction = model(x, mask, brain, None, chosen)
                loss = rows_loss(prediction, x, brain, chosen, places[0], cfg.patch_size, "l1")
        found.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        found.append(counter.get_total_flops())
    return found[0], found[1]


def check(cfg, volume, device="cpu") -> None:
    geometry = build_geometry(cfg, volume)
    forward, backward = counted(cfg, volume, device)
    predicted = model_flops(geometry)
    assert predicted.forward == pytest.approx(forward, rel=1e-9)
    assert predicted.backward == pytest.approx(backward, rel=1e-9)


@pytest.mark.parametrize(("decoder", "hidden"), [("local", None), ("local", 0.6), ("linear", None)])
@pytest.mark.parametrize("variant", ["joint", "factorized"])
def test_brain_tokens(variant: str, decoder: str, hidden: float | None) -> None:
    """Of a given mask what torch counts, and no more tokens than brain; a run looks every mask up once.

    In training the head sees the hidden patches alone.
    """
    shape = SHAPES["padded"]
    cfg, volume = config(variant, "padded", decoder=decoder, tokens="brain"), (*shape.grid, shape.frames)
    brain = torch.zeros(1, *shape.grid, dtype=torch.bool)
    brain[0, 2:9, 1:8, 3:5] = brain[0, 0, -1, -1] = True
    geometry = build_geometry(cfg, volume, brain=brain, hidden=hidden)
    rows = None if hidden is None else geometry.head_rows
    assert rows is None or rows == round(0.6 * geometry.tokens) < geometry.tokens
    forward, backward = counted(cfg, volume, brain=brain, rows=rows)
    predicted = model_flops(geometry)
    assert predicted.forward == pytest.approx(forward, rel=1e-9)
    assert predicted.backward == pytest.approx(backward, rel=1e-9)
    box = build_geometry(config(variant, "padded", decoder=decoder), volume)
    assert all(stage.tokens < whole.tokens for stage, whole in zip(geometry.stages, box.stages))
    costs = BrainCosts(build_geometry(cfg, volume, hidden=hidden), composed(COMPOSED)[0].task)
    patches = costs.patches(brain)[0]
    assert costs(patches) == costs(patches.clone()) == (predicted.total, geometry.tokens)


def test_the_hidden_part_is_that_of_the_masks() -> None:
    for kind in ("random", "tube", "temporal"):
        cfg = settings("model.tokens=brain", f"task.mask_kind={kind}", "task.mask_ratio=0.33")
        volume, patch = (*cfg.data.grid, cfg.data.frames), cfg.model.patch_size
        mask = draw_mask(0, torch.tensor([3]), volume, patch, patch, 0.33, kind)
        geometry = geometry_of(cfg)
        assert geometry.hidden == pytest.approx(mask.double().mean().item(), rel=1e-12)
        assert geometry.head_rows == round(geometry.tokens * geometry.hidden) < geometry.tokens
    for whole in ({"tokens": "box"}, {"maps": 4}, {"decoder": "linear"}):
        assert hidden_part(replace(cfg.model, **whole), cfg.task, volume) is None


def test_the_usual_brain_has_the_shares_of_measured_ones() -> None:
    """34-36, 47-49 and 86-89 % of the cells of stages 1 to 3 of 96x96x96 voxels with a patch of 6."""
    cfg, _ = composed([*COMPOSED, "model=7m", "model.tokens=brain"])
    shares = [stage.share for stage in build_geometry(cfg.model, CLIP).stages]
    assert shares == pytest.approx([0.35, 0.48, 0.88, 1.0], abs=0.02)


@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["v1", "joint", "factorized"])
def test_every_shape_and_decoder(variant: str, shape: str, decoder: str) -> None:
    """Padded, shifted, clipped windows, axes of one token: counted as they are computed."""
    check(config(variant, shape, decoder=decoder), (*SHAPES[shape].grid, SHAPES[shape].frames))


@pytest.mark.parametrize("variant", ["joint-rope_global", "factorized-ts", "factorized-each", "factorized-absolute"])
def test_other_options(variant: str) -> None:
    check(config(variant, "padded"), (*SHAPES["padded"].grid, SHAPES["padded"].frames))


FEWER = "model.depths=[2,2,4,2]"


@pytest.mark.parametrize(
    "overrides", [["model=806m", FEWER], ["model=v1"], ["model=51m", "model/variant=joint", FEWER]]
)
def test_sizes_of_the_ladder(overrides: list[str]) -> None:
    """At full size, on the meta device; of the third stage's equal blocks some are enough."""
    check(composed([*COMPOSED, *overrides])[0].model, CLIP, "meta")


@pytest.mark.parametrize("shape", ["four", "two"])
@pytest.mark.parametrize("variant", ["joint-rope", "factorized-ts", "factorized-each"])
def test_visible_units_alone(variant: str, shape: str) -> None:
    """Of task.hidden=drop: what is hidden costs nothing in the encoder."""
    model, clips, shown = visible_model(variant, shape)
    brain = torch.ones(1, *clips.shape[2:5], dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = hidden_loss(model.units, model(clips[:1], shown[:1]), clips[:1], brain, shown[:1], "l1")
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    predicted = model_flops(build_geometry(model.encoder.cfg, model.units.volume, model.units))
    assert predicted.forward == pytest.approx(forward.get_total_flops(), rel=1e-9)
    assert predicted.backward == pytest.approx(backward.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("shape", FRAME_SHAPES)
@pytest.mark.parametrize("variant", ["joint-rope", "factorized-ts", "factorized-each"])
def test_visible_frames_alone(variant: str, shape: str) -> None:
    model, clips, shown = frames_model(variant, shape)
    brain = torch.ones(1, *clips.shape[2:5], dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = frames_loss(model.units, model(clips[:1], shown[:1]), clips[:1], brain, shown[:1], "l1")
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    predicted = model_flops(build_geometry(model.encoder.cfg, model.units.volume, model.units))
    assert predicted.forward == pytest.approx(forward.get_total_flops(), rel=1e-9)
    assert predicted.backward == pytest.approx(backward.get_total_flops(), rel=1e-9)


def test_dropping_hidden_frames_at_full_size() -> None:
    """51m, 4 of 20 frames: all linear maps of the encoder at 0.2; the whole model at a third."""
    words = [*COMPOSED, "model=51m"]
    box, drop = (
        flops_by_part(geometry_of(composed([*words, *more])[0]))
        for more in ([], ["task.hidden=drop", "task.mask_kind=frames"])
    )
    for name in ("patch embedding", *(f"stage {n}" for n in range(1, 5)), *(f"merging {n}" for n in range(1, 4))):
        assert drop[name].forward == pytest.approx(0.2 * box[name].forward, rel=0.01), name
    assert sum(part.total for part in drop.values()) < 0.35 * sum(part.total for part in box.values())


def test_dropping_hidden_units_at_full_size() -> None:
    """51m, 13 of 64 units of 24 voxels: the encoder at 0.2 of all tokens, a little more for stage 4 on the grid."""
    words = [*COMPOSED, "model=51m"]
    box, drop = (
        flops_by_part(geometry_of(composed([*words, *more])[0]))
        for more in ([], ["task.hidden=drop", "task.mask_kind=tube"])
    )
    for name in ("patch embedding", "stage 1", "stage 2", "stage 3"):
        assert drop[name].forward == pytest.approx(13 / 64 * box[name].forward, rel=0.03), name
    assert drop["stage 4"] == box["stage 4"]


def test_blocks_follow_the_formulas_of_the_design() -> None:
    """Unshifted: 32 N C^2 + 4 N (n_space + n_time) C factorized, 24 N C^2 + 4 N n C joint; merging 4 N C^2."""
    cfg = composed([*COMPOSED, "model=51m", "model.depths=[1,1,1,1]"])[0].model
    parts = flops_by_part(build_geometry(cfg, CLIP))
    n, c = 16**3 * 20, 96
    assert parts["stage 1"].forward == 32 * n * c**2 + 4 * n * (64 + 10) * c
    assert parts["merging 1"].forward == 4 * n * c**2
    joint = composed([*COMPOSED, "model=51m", "model/variant=joint", "model.depths=[1,1,1,1]"])[0].model
    n = 16**3 * 10
    # Ten frames of tokens in windows of four leave one of two.
    groups = 4096 * (8 * 64 * 4 + 2 * 64 * 2)
    assert flops_by_part(build_geometry(joint, CLIP))["stage 1"].forward == 24 * n * c**2 + 4 * groups * c


def test_voxels_get_no_gradient() -> None:
    parts = flops_by_part(build_geometry(config("v1", "divisible"), (8, 8, 8, 4)))
    assert parts["patch embedding"].backward == parts["patch embedding"].forward
    assert parts["stage 1"].backward == 2 * parts["stage 1"].forward


def test_published_encoder_cost_of_v1() -> None:
    """v1's encoder at E=36, one 96^3 x 20 clip: 22.8 GFLOP forward, 40 % of its scores in windows a mask cuts.

    Counted without the decoder; the shifted layers of the rectangular groups compute only scores that count, so this is
    a little less.
    """
    cfg = composed([*COMPOSED, "model=v1"])[0].model
    parts = flops_by_part(build_geometry(cfg, CLIP))
    encoder = sum(part.forward for name, part in parts.items() if name != "decoder")
    assert 0.8 * 22.8e9 < encoder < 22.8e9


@pytest.mark.parametrize("shape", ["divisible", "padded"])
def test_spatial_maps(shape: str) -> None:
    """Trained maps: all products but the solution of K equations a frame, which torch does not count."""
    check(config("factorized", shape, maps=3, maps_of="shared"), (*SHAPES[shape].grid, SHAPES[shape].frames))


@pytest.mark.parametrize("how", ["scratch", "full", "linear", "attentive", "last_block", "lora"])
@pytest.mark.parametrize("variant", ["v1", "joint", "factorized", "factorized-ts-each"])
def test_a_frozen_encoder_has_no_backward_pass(variant: str, how: str) -> None:
    """What is frozen computes no gradients of its weights, and none of its inputs where nothing below trains."""
    shape = SHAPES["padded"]
    cfg, task = config(variant, "padded"), SimpleNamespace(adapt=how, lora_rank=3, lora_alpha=3.0)
    encoder = SwinEncoder(cfg, shape.grid, shape.frames)
    adapt(encoder, task)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            last = encoder(torch.zeros(1, 1, *shape.grid, shape.frames))[-1]
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            if last.requires_grad:
                last.sum().backward()
        backward = counter.get_total_flops()
    predicted = tuning_flops(build_geometry(cfg, (*shape.grid, shape.frames)), task)
    assert predicted.forward == pytest.approx(forward, rel=1e-9)
    assert predicted.backward == pytest.approx(backward, rel=1e-9)

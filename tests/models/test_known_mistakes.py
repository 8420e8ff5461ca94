"""Mistakes that existing fMRI transformers make, one test each; the numbers are those of the list in the brief."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swift.config.schema import ModelConfig
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.decoders import LinearDecoder, LocalDecoder, build_decoder
from swift.models.encoder import SwinEncoder
from swift.models.rope import WindowRotary
from swift.models.window_layout import plan_groups
from tests.models import cases
from tests.models import reference as ref

ALMOST_ONE = 1 - 1e-9
"""A dropping rate at which nothing survives."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(size: cases.Shape, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, 1, *size.grid, size.frames, generator=seeded(seed), dtype=torch.float64)


def encoder_and_state(cfg: ModelConfig, size: cases.Shape) -> tuple[SwinEncoder, ref.State]:
    """A float64 encoder in training mode, with ordinary weights."""
    state = ref.random_state(ref.parameter_shapes(cfg, size.grid, size.frames), seeded())
    model = SwinEncoder(cfg, size.grid, size.frames).double()
    model.load_state_dict(state)
    return model, state


# --- 1: the MLP run twice in a block ------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["v1", "factorized", "factorized-ts", "factorized-each", "factorized-ts-each"])
def test_1_every_branch_of_a_block_runs_once_and_in_order(variant: str) -> None:
    cfg, size = cases.config(variant, "divisible"), cases.SHAPES["divisible"]
    model, _ = encoder_and_state(cfg, size)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(".fn"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(clip(size))
    expected = [
        f"stages.{stage}.blocks.{block}.{branch}.fn"
        for stage, depth in enumerate(cfg.depths)
        for block in range(depth)
        for branch in ref.branches(cfg)
    ]
    assert calls == expected


# --- 2: angles of x, y and z summed -------------------------------------------------------------------------------
def test_2_every_place_of_a_window_has_its_own_rotation() -> None:
    """Adding x, y and z angles of equal frequency leaves 10 rotations for 64 places."""
    places = ref.coordinates((4, 4, 4, 1))
    assert len(set(places.sum(1).tolist())) == 10
    for head_dim in (6, 16):
        table = WindowRotary((4, 4, 4, 1), (0, 1, 2), head_dim, 100.0).rotations.reshape(64, -1)
        assert (torch.cdist(table, table) + 9 * torch.eye(64)).min() > 1e-2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_2_exchanging_axes_changes_the_scores(axis: int) -> None:
    """One step along x, one along y and one along z are three different distances."""
    rotary = WindowRotary((4, 4, 4, 1), (0, 1, 2), 6, 100.0).double()
    qk = torch.ones(1, 64, 2, 1, 6, dtype=torch.float64) * torch.arange(1, 7)
    q, k = rotary(qk, (4, 4, 4, 1))[0, :, :, 0].unbind(1)
    scores = (q @ k.T).reshape(4, 4, 4, 4, 4, 4)[0, 0, 0]
    steps = [scores[1, 0, 0], scores[0, 1, 0], scores[0, 0, 1]]
    # With one pair an axis (frequency 1), a step turns pair `axis` by one radian: |pair|^2 (1 - cos 1) is lost.
    loss = (qk[0, 0, 0, 0, 2 * axis : 2 * axis + 2] ** 2).sum() * (1 - math.cos(1.0))
    assert steps[axis].item() == pytest.approx((scores[0, 0, 0] - loss).item())


# --- 3 and 4: what a latent token may reach -----------------------------------------------------------------------
def reached(decoder: nn.Module, features: list[Tensor], stage: int, token: tuple[int, ...]) -> Tensor:
    """(X, Y, Z, T) bool: voxels that move when one latent token moves."""
    before = decoder(features)
    moved = [feature.clone() for feature in features]
    moved[stage][(0, *token)] += torch.randn(moved[stage].shape[-1], generator=seeded(9), dtype=torch.float64)
    return (decoder(moved) != before)[0, 0]


@pytest.mark.parametrize("kind", ["local", "linear"])
@pytest.mark.parametrize("token", [(0, 0, 0, 0), (2, 0, 1, 1), (0, 1, 2, 2), (1, 2, 0, 0), (2, 2, 2, 2)])
def test_3_and_4_a_latent_token_moves_the_voxels_of_its_own_cell(kind: str, token: tuple[int, ...]) -> None:
    """Tokens 6x5x5x3, patch 2x3x2x2: exchanged axes or a spreading pixel shuffle would move other voxels."""
    size = cases.SHAPES["padded"]
    cfg = cases.config("factorized", "padded", decoder=kind, depths=[1, 1], num_heads=[2, 2])
    decoder = build_decoder(cfg, size.grid, size.frames).double()
    features = [
        torch.randn(1, *tokens, cfg.embed_dim * 2**stage, generator=seeded(stage), dtype=torch.float64)
        for stage, tokens in enumerate(ref.stage_grids(cfg, size.grid, size.frames))
    ]
    for stage in (0, 1) if kind == "local" else (1,):
        cell = [p * (2**stage if axis < 3 else 1) for axis, p in enumerate(cfg.patch_size)]
        expected = torch.zeros(*size.grid, size.frames, dtype=torch.bool)
        expected[tuple(slice(i * c, (i + 1) * c) for i, c in zip(token, cell, strict=True))] = True
        assert expected.any()
        assert torch.equal(reached(decoder, features, stage, token), expected)


def test_3_the_local_decoder_writes_a_patch_in_the_order_in_which_the_encoder_reads_it() -> None:
    size = cases.Shape((4, 6, 8), 10, (2, 3, 4, 5), (2, 2, 2, 2), (1,), 120, (2,))
    cfg = cases.config("factorized", size, patch_norm=False, decoder_dim=8)
    encoder = SwinEncoder(cfg, size.grid, size.frames).double()
    nn.init.eye_(encoder.patch_embed.proj.weight)
    decoder = build_decoder(cfg, size.grid, size.frames).double()
    assert isinstance(decoder, LocalDecoder)
    nn.init.zeros_(decoder.head.weight)
    decoder.head.bias.data = torch.arange(120.0).double()
    voxels = decoder([torch.randn(1, 2, 2, 2, 2, 120, dtype=torch.float64)])
    # The encoder reads what the decoder wrote: input number i of every patch is voxel number i.
    assert torch.equal(encoder.embed(voxels), torch.arange(120.0).double().expand(1, 2, 2, 2, 2, 120))


def test_3_the_linear_decoder_writes_a_cell_in_x_y_z_and_frames_in_order() -> None:
    size = cases.Shape((4, 6, 8), 6, (2, 3, 4, 3), (2, 2, 2, 2), (1,), 12, (2,))
    cfg = cases.config("factorized", size, decoder="linear")
    decoder = build_decoder(cfg, size.grid, size.frames).double()
    assert isinstance(decoder, LinearDecoder)
    nn.init.zeros_(decoder.expand.weight)
    nn.init.zeros_(decoder.head.weight)
    decoder.head.bias.data = 10.0 * torch.arange(24).double()
    decoder.head.weight.data[:, 0] = 1.0
    decoder.time_embed.data = torch.arange(3.0).double()[:, None].expand(3, 12).clone()
    voxels = decoder([torch.randn(1, 2, 2, 2, 2, 12, dtype=torch.float64)])
    cells = rearrange(voxels, "1 1 (x px) (y py) (z pz) (t pt) -> (x y z t) (px py pz) pt", px=2, py=3, pz=4, pt=3)
    assert torch.equal(cells, (10.0 * torch.arange(24)[:, None] + torch.arange(3)).double().expand(16, 24, 3))


# --- 5: options that never reach the blocks -----------------------------------------------------------------------
LONG = cases.Shape((8, 8, 8), 5, (2, 2, 2, 1), (1, 2, 1, 2), (1, 2), 24, (2, 2))
"""Tokens 4x4x4x5, then 2x2x2x5: even the last stage has axes that are longer than their window."""

OPTIONS: list[tuple[str, Any, dict[str, Any]]] = [
    ("embed_dim", 48, {}),
    ("depths", [2, 2], {}),
    ("num_heads", [2, 4], {}),
    ("patch_size", [2, 2, 2, 2], {}),
    ("patch_norm", False, {}),
    ("position", "none", {}),
    ("position", "rope_global", {}),
    ("position", "absolute", {}),
    ("attention", "joint", {}),
    ("window", [2, 2, 1, 2], {}),
    ("window", [1, 2, 1, 3], {}),
    ("last_stage", "full", {}),
    ("last_stage", "unshifted", {}),
    ("last_stage", "full", {"attention": "joint"}),
    ("last_stage", "unshifted", {"attention": "joint"}),
    ("order", "ts", {}),
    ("order", "ts", {"mlp": "each"}),
    ("mlp", "each", {}),
    ("mlp_ratio", 3.0, {}),
    ("layer_scale", 0.5, {}),
    ("layer_scale", None, {}),
    ("final_norm", False, {}),
    ("rope_base", 200.0, {}),
    ("dropout", 0.1, {}),
    ("attention_dropout", 0.1, {}),
    ("drop_path", 0.9, {}),
    ("decoder", "linear", {}),
    ("decoder_dim", 20, {}),
    ("attention_base_width", 5, {}),
    ("maps", 4, {"maps_of": "shared"}),
    ("maps_of", "shared", {"maps": 4, "maps_of": "scan"}),
]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def training_prediction(model: nn.Module, cfg: ModelConfig, state: ref.State) -> Tensor:
    """What an autoencoder with these weights predicts in training mode, with always the same random numbers."""
    model.double().load_state_dict(state)
    hidden = torch.zeros(2, *ref.stage_grids(cfg, LONG.grid, LONG.frames)[0], dtype=torch.bool)
    torch.manual_seed(1)
    with torch.no_grad():
        return model(clip(LONG, batch=2, seed=7), hidden)


@pytest.mark.parametrize(("name", "value", "around"), OPTIONS)
def test_5_every_option_changes_the_parameters_or_the_prediction(name: str, value: Any, around: dict[str, Any]) -> None:
    base = cases.config("factorized", LONG, last_stage="windowed", layer_scale=1.0, **around)
    changed = dataclasses.replace(base, **{name: value})
    models = [MaskedAutoencoder(cfg, LONG.grid, LONG.frames) for cfg in (base, changed)]
    if shapes_of(models[0]) != shapes_of(models[1]):
        return
    if name == "layer_scale":  # it says where a parameter starts
        gammas = [parameter for key, parameter in models[1].named_parameters() if key.endswith("gamma")]
        assert gammas
        assert all((gamma == value).all() for gamma in gammas)
        return
    # Norms and scales start at 0 or 1: ordinary values instead, so that nothing is invisible.
    state = ref.random_state(shapes_of(models[0]), seeded(2))
    before, after = (training_prediction(m, c, state) for m, c in zip(models, (base, changed), strict=True))
    assert torch.equal(training_prediction(models[0], base, state), before)
    assert (after - before).abs().max() > 1e-6


def test_5_the_list_of_options_is_complete() -> None:
    labels = {"name", "variant"}  # shown to people, read by nothing
    # Which tokens exist shows where a brain is given: test_brain_tokens.py.
    known = {name for name, _, _ in OPTIONS} | labels | {"tokens", "cohort"}
    assert known == {field.name for field in dataclasses.fields(ModelConfig)}


# --- 6: masks and tables in the state dict ------------------------------------------------------------------------
@pytest.mark.parametrize("variant", list(cases.VARIANTS))
def test_6_the_state_dict_holds_parameters_only(variant: str) -> None:
    cfg, size = cases.config(variant, "padded"), cases.SHAPES["padded"]
    model = MaskedAutoencoder(cfg, size.grid, size.frames)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("variant", ["factorized", "joint-rope", "joint-none"])
def test_6_a_checkpoint_without_tables_loads_at_another_resolution(variant: str) -> None:
    size = cases.SHAPES["padded"]
    cfg = cases.config(variant, size)
    model, state = encoder_and_state(cfg, size)
    other = SwinEncoder(cfg, (7, 14, 10), 8).double()
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 1, 7, 14, 10, 8, generator=seeded(1), dtype=torch.float64)
    for got, expected in zip(other(x), ref.encode(cfg, (7, 14, 10), 8, state, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# --- 7 and 8: what a forward pass builds and moves ----------------------------------------------------------------
class Recorder(TorchDispatchMode):
    """Names of the operators that ran, and those that gave a boolean tensor (a mask)."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.masks: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operators.add(name)
        if any(isinstance(o, Tensor) and o.dtype == torch.bool for o in (out if isinstance(out, tuple) else (out,))):
            self.masks.add(name)
        return out


FACTORIES = {
    "arange",
    "linspace",
    "full",
    "full_like",
    "zeros",
    "ones",
    "eye",
    "tril",
    "triu",
    "masked_fill",
    "meshgrid",
}
COPIES = {"_to_copy", "lift_fresh", "scalar_tensor", "pin_memory"}


def record(model: nn.Module, x: Tensor) -> Recorder:
    with Recorder() as recorder, torch.no_grad():
        model(x)
    return recorder


@pytest.mark.parametrize("variant", ["v1", "joint-rope", "factorized", "factorized-rope_global"])
def test_7_no_mask_is_built_in_a_forward_pass(variant: str) -> None:
    """Shifted and padded windows: the plan is made once a grid, and there are no masks at all."""
    cfg, size = cases.config(variant, "padded"), cases.SHAPES["padded"]
    model, x = SwinEncoder(cfg, size.grid, size.frames).eval(), clip(size).float()
    model(x)
    planned = plan_groups.cache_info()
    recorder = record(model, x)
    assert "addmm" in recorder.operators or "linear" in recorder.operators
    assert not recorder.operators & FACTORIES
    assert not recorder.masks
    assert plan_groups.cache_info().misses == planned.misses
    assert plan_groups.cache_info().hits > planned.hits


@pytest.mark.parametrize("variant", ["v1", "joint-rope", "factorized", "factorized-rope_global"])
def test_8_no_table_is_moved_or_converted_in_a_forward_pass(variant: str) -> None:
    cfg, size = cases.config(variant, "padded"), cases.SHAPES["padded"]
    model, x = SwinEncoder(cfg, size.grid, size.frames).eval(), clip(size).float()
    before = {name: (buffer.data_ptr(), buffer.dtype) for name, buffer in model.named_buffers()}
    recorder = record(model, x)
    assert not recorder.operators & COPIES
    assert {name: (buffer.data_ptr(), buffer.dtype) for name, buffer in model.named_buffers()} == before
    assert bool(before) == ("rope" in cfg.position)


def test_8_low_precision_keeps_the_tables_exact() -> None:
    """A bf16 table would be wrong in the third digit; a model built without memory gets its tables with its weights."""
    cfg, size = cases.config("factorized", "padded"), cases.SHAPES["padded"]
    exact = dict(SwinEncoder(cfg, size.grid, size.frames).named_buffers())
    half = SwinEncoder(cfg, size.grid, size.frames).bfloat16()
    with torch.device("meta"):
        empty = SwinEncoder(cfg, size.grid, size.frames)
    filled = empty.to_empty(device="cpu")
    for model in (half, filled):
        tables = dict(model.named_buffers())
        assert tables.keys() == exact.keys()
        for name, table in tables.items():
            assert table.dtype == torch.float32, name
            assert torch.equal(table, exact[name]), name


# --- 9: one rate for three kinds of dropping ----------------------------------------------------------------------
def test_9_dropout_acts_after_embedding_projection_and_mlp() -> None:
    """When everything is dropped, stage 1 is zero and stage 2 is what merging makes of zeros."""
    cfg, size = cases.config("factorized", "divisible", dropout=ALMOST_ONE, final_norm=False), cases.SHAPES["divisible"]
    model, state = encoder_and_state(cfg, size)
    first, second = model(clip(size))
    assert not first.any()
    merged = state["stages.0.downsample.reduction.weight"] @ state["stages.0.downsample.norm.bias"]
    torch.testing.assert_close(second, merged.expand_as(second))
    assert not any(isinstance(module, DropPath) for module in model.modules())


@pytest.mark.parametrize("variant", ["joint", "factorized"])
def test_9_attention_dropout_acts_on_attention_weights_only(variant: str) -> None:
    """With all weights dropped, attention gives the bias of its projection: the same as values of zero."""
    cfg, size = cases.config(variant, "divisible", attention_dropout=ALMOST_ONE), cases.SHAPES["divisible"]
    model, state = encoder_and_state(cfg, size)
    without = dict(state)
    for name in state:
        if ".qkv." in name:
            without[name] = state[name].clone()
            without[name][2 * len(state[name]) // 3 :] = 0.0
    x = clip(size)
    for got, expected in zip(model(x), ref.encode(cfg, size.grid, size.frames, without, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, DropPath) for module in model.modules())
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, nn.Dropout))


def test_9_drop_path_drops_whole_branches_of_late_blocks() -> None:
    """Rates rise from 0 (the first block always runs) to the given one (the last block is skipped)."""
    size = dataclasses.replace(cases.SHAPES["divisible"], depths=(1, 1))
    cfg = cases.config("factorized", size, drop_path=ALMOST_ONE, final_norm=False)
    model, state = encoder_and_state(cfg, size)
    x = clip(size)
    first, second = model(x)
    expected = ref.encode(cfg, size.grid, size.frames, state, x)[0]
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second, ref.merge_patches(state, "stages.0.downsample", expected), rtol=1e-9, atol=1e-9)


def test_9_drop_path_rises_linearly_and_drops_samples_not_tokens() -> None:
    cfg, size = cases.config("factorized", "padded", drop_path=0.4), cases.SHAPES["padded"]
    model, _ = encoder_and_state(cfg, size)
    rates = []
    for stage in model.stages:
        for block in stage.blocks:
            drops = [branch.drop_path for branch in block.children()]
            found = {drop.drop_prob if isinstance(drop, DropPath) else 0.0 for drop in drops}
            assert len(drops) == 3
            assert len(found) == 1
            rates.append(found.pop())
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, nn.Dropout))

    branch = model.stages[-1].blocks[-1].get_submodule("mlp")
    x = torch.randn(64, 1, 1, 1, 2, cfg.embed_dim * 4, generator=seeded(), dtype=torch.float64)
    torch.manual_seed(0)
    change = branch(x) - x
    full = branch.eval()(x) - x
    kept = (change != 0).flatten(1).any(1)
    assert 20 < kept.sum() < 60
    assert not change[~kept].any()
    torch.testing.assert_close(change[kept], full[kept] / 0.6)


@pytest.mark.parametrize("variant", ["joint", "factorized"])
def test_9_nothing_is_dropped_in_evaluation(variant: str) -> None:
    size = cases.SHAPES["divisible"]
    cfg = cases.config(variant, size, dropout=0.5, attention_dropout=0.5, drop_path=0.5)
    model, state = encoder_and_state(cfg, size)
    x = clip(size)
    for got, expected in zip(model.eval()(x), ref.encode(cfg, size.grid, size.frames, state, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

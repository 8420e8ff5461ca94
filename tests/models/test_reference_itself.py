"""The slow reference, checked against closed forms and against the classical way to write a shifted window."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.models import cases
from tests.models import reference as ref


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# --- windows ------------------------------------------------------------------------------------------------------
def test_window_boundaries_by_hand() -> None:
    assert ref.boundaries(8, 4, shifted=False) == [0, 4, 8]
    assert ref.boundaries(8, 4, shifted=True) == [0, 2, 6, 8]
    assert ref.boundaries(10, 4, shifted=False) == [0, 4, 8, 10]
    assert ref.boundaries(10, 4, shifted=True) == [0, 2, 6, 10]
    assert ref.boundaries(5, 3, shifted=True) == [0, 1, 4, 5]
    assert ref.boundaries(4, 4, shifted=True) == [0, 4]
    assert ref.boundaries(3, 4, shifted=True) == [0, 3]
    assert ref.boundaries(3, 1, shifted=True) == [0, 1, 2, 3]


def swin_axis(length: int, window: int, shifted: bool) -> tuple[int, int, Tensor]:
    """Padded length, roll and region of every token after the roll, as Swin's `compute_mask` has them; pads are -1."""
    window = min(window, length)
    shift = window // 2 if shifted and length > window else 0
    padded = math.ceil(length / window) * window
    region = torch.zeros(padded, dtype=torch.long)
    if shift:
        region[padded - window : padded - shift] = 1
        region[padded - shift :] = 2
    region[(torch.arange(padded) + shift) % padded >= length] = -1
    return padded, shift, region


def swin_attention(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, ...], shifted: bool) -> Tensor:
    """Pad, roll, partition, mask, attend, reverse, roll back. q, k, v (X, Y, Z, T, D), one head."""
    tokens, dim = q.shape[:4], q.shape[4]
    axes = [swin_axis(n, w, shifted) for n, w in zip(tokens, window, strict=True)]
    sizes = [min(n, w) for n, w in zip(tokens, window, strict=True)]
    counts = [padded // size for (padded, _, _), size in zip(axes, sizes, strict=True)]

    def partition(x: Tensor) -> Tensor:
        split = x.reshape(*(n for pair in zip(counts, sizes, strict=True) for n in pair), -1)
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7, 8).reshape(math.prod(counts), math.prod(sizes), -1)

    def windows(x: Tensor) -> Tensor:
        grown = x.new_zeros(*(padded for padded, _, _ in axes), dim)
        grown[: tokens[0], : tokens[1], : tokens[2], : tokens[3]] = x
        return partition(torch.roll(grown, [-shift for _, shift, _ in axes], dims=(0, 1, 2, 3)))

    region = torch.stack(torch.meshgrid(*(r for _, _, r in axes), indexing="ij"), dim=-1)
    region = partition(region)  # (windows, n, 4)
    allowed = (region[:, :, None] == region[:, None]).all(-1) & (region[:, None] >= 0).all(-1)
    allowed |= torch.eye(allowed.shape[-1], dtype=torch.bool)  # a pad token sees itself: no empty softmax
    out = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=allowed)
    out = out.reshape(*counts, *sizes, dim).permute(0, 4, 1, 5, 2, 6, 3, 7, 8)
    out = out.reshape(*(padded for padded, _, _ in axes), dim)
    out = torch.roll(out, [shift for _, shift, _ in axes], dims=(0, 1, 2, 3))
    return out[: tokens[0], : tokens[1], : tokens[2], : tokens[3]]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("tokens", "window"),
    [
        ((4, 4, 2, 4), (2, 2, 2, 2)),
        ((8, 4, 4, 8), (4, 4, 2, 4)),
        ((6, 3, 3, 6), (3, 3, 1, 2)),
        ((5, 7, 3, 6), (2, 4, 3, 4)),
        ((5, 2, 3, 9), (3, 4, 2, 5)),
        ((3, 3, 3, 7), (1, 1, 1, 3)),
    ],
)
def test_attention_equals_roll_and_mask(tokens: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> None:
    cfg = cases.config("joint-none", "divisible")
    channels, heads = 8, 2
    state = {"a.qkv.weight": random(24, 8), "a.qkv.bias": random(24, seed=1)}
    state |= {"a.proj.weight": torch.eye(channels).double(), "a.proj.bias": torch.zeros(channels).double()}
    x = random(1, *tokens, channels, seed=2)
    got = ref.attention(cfg, state, "a", "attn", x, heads, window, shifted)
    q, k, v = rearrange(
        F.linear(x, state["a.qkv.weight"], state["a.qkv.bias"]),
        "1 x y z t (three n d) -> three n x y z t d",
        three=3,
        n=heads,
    )
    expected = torch.cat([swin_attention(q[h], k[h], v[h], window, shifted) for h in range(heads)], dim=-1)
    torch.testing.assert_close(got[0], expected, rtol=1e-10, atol=1e-12)


# --- rotary positions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("branch", "head_dim"), [("space", 6), ("space", 10), ("time", 6), ("attn", 8), ("attn", 12)])
def test_rope_scores_depend_on_the_distance_only(branch: str, head_dim: int) -> None:
    cfg = cases.config("factorized", "divisible")
    here = ref.coordinates((3, 2, 2, 4))
    there = here + torch.tensor([5, 11, 3, 7])
    q, k = random(1, len(here), 1, head_dim), random(1, len(here), 1, head_dim, seed=1)

    def scores(xyzt: Tensor) -> Tensor:
        angles = ref.rope_angles(cfg, branch, xyzt, head_dim)
        return torch.einsum("bind,bjnd->bnij", ref.rotate(q, angles), ref.rotate(k, angles))

    torch.testing.assert_close(scores(here), scores(there), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(scores(here), torch.einsum("bind,bjnd->bnij", q, k))


def test_rope_rotation_by_hand() -> None:
    """Base 100, four pairs on one axis: frequencies 1, 100^-1/4, 100^-1/2, 100^-3/4; a pair is two neighbours."""
    cfg = cases.config("factorized", "divisible", rope_base=100.0)
    angles = ref.rope_angles(cfg, "time", torch.tensor([[9, 9, 9, 2]]), 8)
    torch.testing.assert_close(angles[0], torch.tensor([2.0, 2 * 100**-0.25, 0.2, 2 * 100**-0.75]).double())
    x = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    x[..., 4] = 1.0
    turned = ref.rotate(x, angles)[0, 0, 0]
    assert turned.nonzero().flatten().tolist() == [4, 5]
    assert turned[4].item() == pytest.approx(math.cos(0.2))
    assert turned[5].item() == pytest.approx(math.sin(0.2))


def test_rope_pairs_are_dealt_evenly_first_axes_first() -> None:
    assert [ref.deal_pairs(p, 3) for p in (3, 4, 5, 16)] == [[1, 1, 1], [2, 1, 1], [2, 2, 1], [6, 5, 5]]
    assert ref.deal_pairs(6, 4) == [2, 2, 1, 1]


def test_rope_gives_every_position_of_a_window_its_own_rotation() -> None:
    cfg = cases.config("factorized", "divisible")
    for head_dim in (6, 8, 16):
        angles = ref.rope_angles(cfg, "space", ref.coordinates((4, 4, 4, 1)), head_dim)
        rotation = torch.cat([angles.cos(), angles.sin()], dim=1)
        distance = torch.cdist(rotation, rotation) + torch.eye(64) * 9
        assert distance.min() > 1e-2


# --- patches, merging, decoders -----------------------------------------------------------------------------------
def test_patch_inputs_run_x_y_z_t_channel() -> None:
    cfg = cases.config("factorized", "divisible", patch_size=[2, 3, 2, 2], embed_dim=48, patch_norm=False)
    x = random(2, 2, 4, 6, 4, 4)
    state = {"patch_embed.proj.weight": torch.eye(48).double(), "patch_embed.proj.bias": torch.zeros(48).double()}
    expected = rearrange(x, "b c (x px) (y py) (z pz) (t pt) -> b x y z t (px py pz pt c)", px=2, py=3, pz=2, pt=2)
    torch.testing.assert_close(ref.embed_patches(cfg, state, x), expected, rtol=0, atol=0)


def test_patch_pads_with_zeros_at_the_end() -> None:
    cfg = cases.config("factorized", "divisible", patch_size=[2, 2, 2, 2], embed_dim=16, patch_norm=False)
    state = {"patch_embed.proj.weight": torch.eye(16).double(), "patch_embed.proj.bias": torch.zeros(16).double()}
    y = ref.embed_patches(cfg, state, torch.ones(1, 1, 3, 2, 2, 2, dtype=torch.float64))
    assert y.shape == (1, 2, 1, 1, 1, 16)
    assert y[0, 1, 0, 0, 0].tolist() == [1.0] * 8 + [0.0] * 8


def test_merging_concatenates_x_outermost_and_fills_odd_axes_with_zeros() -> None:
    x = random(1, 3, 2, 4, 2, 5)
    state = {"m.norm.weight": torch.ones(40).double(), "m.norm.bias": torch.zeros(40).double()}
    state["m.reduction.weight"] = random(10, 40)
    got = ref.merge_patches(state, "m", x)
    assert got.shape == (1, 2, 1, 2, 2, 10)
    for i, k, t in product(range(2), range(2), range(2)):
        parts = []
        for dx, dy, dz in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]:
            inside = 2 * i + dx < 3
            parts.append(x[0, 2 * i + dx, dy, 2 * k + dz, t] if inside else torch.zeros(5).double())
        expected = state["m.reduction.weight"] @ F.layer_norm(torch.cat(parts), (40,))
        torch.testing.assert_close(got[0, i, 0, k, t], expected)


def test_small_pieces_equal_torch() -> None:
    x, weight, bias = random(3, 7), random(7, seed=1), random(7, seed=2)
    got = ref.layer_norm({"n.weight": weight, "n.bias": bias}, "n", x)
    torch.testing.assert_close(got, F.layer_norm(x, (7,), weight, bias, 1e-5))
    torch.testing.assert_close(ref.gelu(x), F.gelu(x))


def test_unpatch_is_the_inverse_of_the_patch_order() -> None:
    x = random(2, 1, 4, 6, 4, 4)
    values = rearrange(x, "b 1 (x px) (y py) (z pz) (t pt) -> b x y z t (px py pz pt)", px=2, py=3, pz=2, pt=2)
    torch.testing.assert_close(ref.unpatch(values, (2, 3, 2, 2), (4, 6, 4, 4)), x, rtol=0, atol=0)
    torch.testing.assert_close(ref.unpatch(values, (2, 3, 2, 2), (3, 5, 4, 3)), x[:, :, :3, :5, :4, :3], rtol=0, atol=0)


def test_upsampling_repeats_and_crops() -> None:
    x = torch.arange(3).double().reshape(1, 3, 1, 1, 1, 1)
    assert ref.upsample(x, 2, (5, 2, 1, 1))[0, :, 1, 0, 0, 0].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0]


def test_masked_l1_by_hand() -> None:
    pred, target = random(2, 1, 3, 2, 2, 4), random(2, 1, 3, 2, 2, 4, seed=1)
    hidden = torch.rand(2, 1, 3, 2, 2, 4, generator=seeded()) < 0.5
    brain = torch.rand(2, 3, 2, 2, generator=seeded(1)) < 0.6
    total, count = 0.0, 0
    for b, x, y, z, t in product(range(2), range(3), range(2), range(2), range(4)):
        if hidden[b, 0, x, y, z, t] and brain[b, x, y, z]:
            total += abs(pred[b, 0, x, y, z, t].item() - target[b, 0, x, y, z, t].item())
            count += 1
    assert 0 < count < hidden.numel()
    assert ref.masked_l1(pred, target, hidden, brain).item() == pytest.approx(total / count, rel=1e-12)


def test_voxels_of_patches() -> None:
    cfg = cases.config("joint", "divisible", patch_size=[2, 2, 2, 2])
    masked = torch.zeros(1, 2, 1, 1, 2, dtype=torch.bool)
    masked[0, 1, 0, 0, 0] = True
    voxels = ref.voxels_of_patches(masked, cfg, (3, 2, 2), 3)
    assert voxels.shape == (1, 1, 3, 2, 2, 3)
    assert voxels[0, 0, 2, :, :, :2].all()
    assert voxels.sum() == 8


@pytest.mark.parametrize("shape", list(cases.SHAPES))
@pytest.mark.parametrize("variant", list(cases.VARIANTS))
def test_every_parameter_reaches_the_features(variant: str, shape: str) -> None:
    """Shapes fit, outputs are finite, and only keys' biases (a constant over a softmax, without RoPE) may be idle."""
    cfg, size = cases.config(variant, shape), cases.SHAPES[shape]
    shapes = ref.parameter_shapes(cfg, size.grid, size.frames)
    state = {n: v.requires_grad_() for n, v in ref.random_state(shapes, seeded()).items()}
    features = ref.encode(cfg, size.grid, size.frames, state, random(1, 1, *size.grid, size.frames, seed=3))
    for stage, (feature, tokens) in enumerate(zip(features, ref.stage_grids(cfg, size.grid, size.frames), strict=True)):
        assert feature.shape == (1, *tokens, cfg.embed_dim * 2**stage)
        assert feature.isfinite().all()
    total = sum((f * random(*f.shape, seed=4)).sum() for f in features)
    grads = torch.autograd.grad(total, list(state.values()), allow_unused=True)
    idle = {n for n, g in zip(state, grads, strict=True) if g is None or not g.abs().max() > 0}
    assert idle == (set() if cfg.final_norm else {"norm.weight", "norm.bias"})

"""The slow reference of the model: plain functions over a state dict, written to be read, not to be fast.

Every attention is a full N x N softmax over all tokens of the clip with a boolean "same window" mask; nothing is
rolled, partitioned or fused. The fast code in `swift.models` must equal this one, outputs and gradients, in float64.

Legend: B batch, X Y Z T voxels and frames (tokens where a stage is meant), C channels, N tokens of the clip, H heads,
D channels of a head, P = D/2 rotated pairs.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch
from torch import Tensor

from swift.config.schema import ModelConfig

EPS = 1e-5
State = dict[str, Tensor]
AXES = (0, 1, 2, 3)


# --- small pieces -------------------------------------------------------------------------------------------------
def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    bias = state.get(f"{name}.bias")
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def pad_end(x: Tensor, axis: int, multiple: int) -> Tensor:
    """Zeros at the end of an axis up to a multiple."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[axis] = missing
    return torch.cat([x, x.new_zeros(shape)], dim=axis)


def patches_of(voxels: tuple[int, ...], patch: list[int]) -> tuple[int, ...]:
    return tuple(math.ceil(n / p) for n, p in zip(voxels, patch, strict=True))


def stage_grids(cfg: ModelConfig, grid: tuple[int, int, int], frames: int) -> list[tuple[int, ...]]:
    """Tokens x, y, z, t of every stage."""
    tokens = patches_of((*grid, frames), cfg.patch_size)
    out = [tokens]
    for _ in cfg.depths[1:]:
        x, y, z, t = out[-1]
        out.append((math.ceil(x / 2), math.ceil(y / 2), math.ceil(z / 2), t))
    return out


# --- windows ------------------------------------------------------------------------------------------------------
def boundaries(length: int, window: int, shifted: bool) -> list[int]:
    """Edges of the windows of an axis: 0, s + k w, length. An axis that one window covers is never shifted."""
    if length <= window:
        return [0, length]
    first = window // 2 if shifted else 0
    return sorted({0, *range(first, length, window), length})


def labels(length: int, window: int, shifted: bool) -> Tensor:
    """For every token of an axis, the number of its window."""
    edges = boundaries(length, window, shifted)
    out = torch.zeros(length, dtype=torch.long)
    for number, (start, stop) in enumerate(pairwise(edges)):
        for token in range(start, stop):
            out[token] = number
    return out


def coordinates(tokens: tuple[int, ...]) -> Tensor:
    """(N, 4) x, y, z, t of every token, t innermost."""
    return torch.tensor(list(product(*(range(n) for n in tokens))))


def same_window(tokens: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> Tensor:
    """(N, N) bool: may these two tokens see each other?"""
    xyzt = coordinates(tokens)
    same = torch.ones(len(xyzt), len(xyzt), dtype=torch.bool)
    for axis in AXES:
        label = labels(tokens[axis], window[axis], shifted)[xyzt[:, axis]]
        same &= label[:, None] == label[None, :]
    return same


def attention_windows(cfg: ModelConfig, branch: str, tokens: tuple[int, ...], last: bool) -> tuple[int, int, int, int]:
    """Window x, y, z, t of an attention branch (attn, space or time) at a stage of the given tokens."""
    wx, wy, wz, wt = cfg.window
    whole_grid = last and cfg.last_stage == "full"
    if branch == "attn":
        return tokens if whole_grid else (wx, wy, wz, wt)  # type: ignore[return-value]
    if branch == "space":
        return (*tokens[:3], 1) if whole_grid else (wx, wy, wz, 1)  # type: ignore[return-value]
    return (1, 1, 1, wt)


# --- rotary positions ---------------------------------------------------------------------------------------------
def deal_pairs(pairs: int, axes: int) -> list[int]:
    """Pairs of each axis: as even as possible, the first axes get the extra ones."""
    return [pairs // axes + (1 if axis < pairs % axes else 0) for axis in range(axes)]


def rope_angles(cfg: ModelConfig, branch: str, xyzt: Tensor, head_dim: int) -> Tensor:
    """(N, P) angle of every pair of channels at every token. xyzt: (N, 4)."""
    axes = {"attn": [0, 1, 2, 3], "space": [0, 1, 2], "time": [3]}[branch]
    columns = []
    for axis, pairs in zip(axes, deal_pairs(head_dim // 2, len(axes)), strict=True):
        for k in range(pairs):
            columns.append(cfg.rope_base ** (-k / pairs) * xyzt[:, axis].double())
    return torch.stack(columns, dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, N, H, D): channels 2i and 2i + 1 are the real and imaginary part of a number times exp(i angle)."""
    out = torch.zeros_like(x)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    real, imaginary = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = real * cos - imaginary * sin
    out[..., 1::2] = real * sin + imaginary * cos
    return out


# --- blocks -------------------------------------------------------------------------------------------------------
def attention(
    cfg: ModelConfig,
    state: State,
    name: str,
    branch: str,
    x: Tensor,
    heads: int,
    window: tuple[int, ...],
    shifted: bool,
    exists: Tensor | None = None,
) -> Tensor:
    """x (B, X, Y, Z, T, C) -> the same shape. exists: (B, X, Y, Z) bool, nobody looks at the others; None: all."""
    batch, *tokens, channels = x.shape
    head_dim = channels // heads
    qkv = linear(state, f"{name}.qkv", x.reshape(batch, -1, channels))  # (B, N, 3C)
    q, k, v = (part.reshape(batch, -1, heads, head_dim) for part in qkv.split(channels, dim=-1))
    if cfg.position in ("rope", "rope_global"):
        angles = rope_angles(cfg, branch, coordinates(tuple(tokens)), head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
    allowed = same_window(tuple(tokens), window, shifted)[None]
    if exists is not None:
        keys = exists[..., None].expand(batch, *tokens).reshape(batch, 1, -1)
        # What does not exist sees itself, so that its softmax has something: nobody reads the result.
        allowed = (allowed & keys) | torch.eye(keys.shape[2], dtype=torch.bool)
    outputs = []
    for head in range(heads):
        score = q[:, :, head] @ k[:, :, head].transpose(1, 2) / math.sqrt(head_dim)  # (B, N, N)
        score = torch.where(allowed, score, torch.full_like(score, -torch.inf))
        weight = torch.exp(score - score.amax(-1, keepdim=True))
        weight = weight / weight.sum(-1, keepdim=True)
        outputs.append(weight @ v[:, :, head])
    return linear(state, f"{name}.proj", torch.cat(outputs, dim=-1)).reshape(x.shape)


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.fc2", gelu(linear(state, f"{name}.fc1", x)))


def branches(cfg: ModelConfig) -> list[str]:
    """Residual branches of a block, in order."""
    if cfg.attention == "joint":
        return ["attn", "mlp"]
    first, second = ("space", "time") if cfg.order == "st" else ("time", "space")
    return [first, second, "mlp"] if cfg.mlp == "shared" else [first, "mlp1", second, "mlp2"]


def block(cfg: ModelConfig, state: State, stage: int, number: int, x: Tensor, exists: Tensor | None = None) -> Tensor:
    last = stage == len(cfg.depths) - 1
    shifted = number % 2 == 1 and not (last and cfg.last_stage == "unshifted")
    for branch in branches(cfg):
        name = f"stages.{stage}.blocks.{number}.{branch}"
        y = layer_norm(state, f"{name}.norm", x)
        if branch.startswith("mlp"):
            y = mlp(state, f"{name}.fn", y)
        else:
            window = attention_windows(cfg, branch, tuple(x.shape[1:5]), last)
            y = attention(cfg, state, f"{name}.fn", branch, y, cfg.num_heads[stage], window, shifted, exists)
        x = x + (y if cfg.layer_scale is None else state[f"{name}.gamma"] * y)
    return x


def existing(brain: Tensor, cell: list[int]) -> Tensor:
    """(B, X, Y, Z) bool over voxels -> which cells of so many voxels have one that is True."""
    out = brain
    for axis, size in enumerate(cell, start=1):
        out = pad_end(out, axis, size)
        out = torch.stack([out.index_select(axis, torch.arange(k, out.shape[axis], size)) for k in range(size)]).any(0)
    return out


# --- encoder ------------------------------------------------------------------------------------------------------
def embed_patches(cfg: ModelConfig, state: State, x: Tensor) -> Tensor:
    """x (B, C, X, Y, Z, T) voxels -> (B, X', Y', Z', T', E)."""
    for axis in AXES:
        x = pad_end(x, 2 + axis, cfg.patch_size[axis])
    px, py, pz, pt = cfg.patch_size
    inputs = []
    for dx, dy, dz, dt, channel in product(range(px), range(py), range(pz), range(pt), range(x.shape[1])):
        inputs.append(x[:, channel, dx::px, dy::py, dz::pz, dt::pt])
    y = linear(state, "patch_embed.proj", torch.stack(inputs, dim=-1))
    return layer_norm(state, "patch_embed.norm", y) if cfg.patch_norm else y


def merge_patches(state: State, name: str, x: Tensor) -> Tensor:
    """x (B, X, Y, Z, T, C) -> (B, X/2, Y/2, Z/2, T, 2C), halves rounded up."""
    for axis in (1, 2, 3):
        x = pad_end(x, axis, 2)
    neighbours = [x[:, dx::2, dy::2, dz::2] for dx, dy, dz in product((0, 1), (0, 1), (0, 1))]
    return linear(state, f"{name}.reduction", layer_norm(state, f"{name}.norm", torch.cat(neighbours, dim=-1)))


def encode(
    cfg: ModelConfig,
    grid: tuple[int, int, int],
    frames: int,
    state: State,
    x: Tensor,
    masked: Tensor | None = None,
    brain: Tensor | None = None,
) -> list[Tensor]:
    """Features (B, Xs, Ys, Zs, Ts, Cs) of every stage. masked: (B, X', Y', Z', T') bool, patches to hide.

    brain: (B, X, Y, Z) bool, tokens=brain: a cell without a brain voxel is no token. It is computed here like others,
    but no other token looks at it, it is merged as zeros, and its features are zeros.
    """
    assert x.shape[2:] == (*grid, frames)
    x = embed_patches(cfg, state, x)
    if masked is not None:
        x = torch.where(masked[..., None], state["mask_token"], x)
    if cfg.position == "rope_global":
        x = x + state["position.x"][:, None, None, None]
        x = x + state["position.y"][:, None, None]
        x = x + state["position.z"][:, None]
        x = x + state["position.t"]
    features = []
    for stage, depth in enumerate(cfg.depths):
        exists = None if brain is None else existing(brain, [p * 2**stage for p in cfg.patch_size[:3]])
        if cfg.position == "absolute":
            x = x + state[f"stages.{stage}.position.space"][:, :, :, None] + state[f"stages.{stage}.position.time"]
        for number in range(depth):
            x = block(cfg, state, stage, number, x, exists)
        if exists is not None:
            x = torch.where(exists[..., None, None], x, 0.0)
        features.append(x)
        if stage < len(cfg.depths) - 1:
            x = merge_patches(state, f"stages.{stage}.downsample", x)
    if cfg.final_norm:
        features[-1] = layer_norm(state, "norm", features[-1])
        if brain is not None:
            features[-1] = torch.where(exists[..., None, None], features[-1], 0.0)
    return features


# --- decoders and loss --------------------------------------------------------------------------------------------
def unpatch(values: Tensor, cell: tuple[int, int, int, int], size: tuple[int, ...]) -> Tensor:
    """values (B, X', Y', Z', T', cell voxels ordered x, y, z, t) -> (B, 1, X, Y, Z, T), cropped to size."""
    batch, *tokens, _ = values.shape
    out = values.new_zeros(batch, 1, *(n * c for n, c in zip(tokens, cell, strict=True)))
    for number, (dx, dy, dz, dt) in enumerate(product(*(range(c) for c in cell))):
        out[:, 0, dx :: cell[0], dy :: cell[1], dz :: cell[2], dt :: cell[3]] = values[..., number]
    return out[:, :, : size[0], : size[1], : size[2], : size[3]]


def upsample(x: Tensor, factor: int, tokens: tuple[int, ...]) -> Tensor:
    """Repeat every token along x, y, z; crop to the patch grid."""
    source = [torch.arange(n) // factor for n in tokens[:3]]
    return x[:, source[0]][:, :, source[1]][:, :, :, source[2]]


def decode_local(
    cfg: ModelConfig, grid: tuple[int, int, int], frames: int, state: State, features: list[Tensor]
) -> Tensor:
    """Features of all stages -> (B, 1, X, Y, Z, T)."""
    tokens = patches_of((*grid, frames), cfg.patch_size)
    h = torch.zeros(())
    for s, feature in enumerate(features):
        lateral = linear(state, f"decoder.laterals.{s}", layer_norm(state, f"decoder.norms.{s}", feature))
        h = h + upsample(lateral, 2**s, tokens)
    values = linear(state, "decoder.head", gelu(layer_norm(state, "decoder.norm", h)))
    px, py, pz, pt = cfg.patch_size
    return unpatch(values, (px, py, pz, pt), (*grid, frames))


def decode_linear(
    cfg: ModelConfig, grid: tuple[int, int, int], frames: int, state: State, features: list[Tensor]
) -> Tensor:
    """Features of the last stage -> (B, 1, X, Y, Z, T)."""
    feature = features[-1]
    channels = feature.shape[-1]
    pt = cfg.patch_size[3]
    cx, cy, cz = (p * 2 ** (len(cfg.depths) - 1) for p in cfg.patch_size[:3])
    expanded = linear(state, "decoder.expand", feature)
    out = []
    for frame in range(feature.shape[4]):
        for dt in range(pt):
            part = expanded[:, :, :, :, frame, dt * channels : (dt + 1) * channels] + state["decoder.time_embed"][dt]
            out.append(linear(state, "decoder.head", part))  # (B, X', Y', Z', cx cy cz) of one voxel frame
    return unpatch(torch.stack(out, dim=4), (cx, cy, cz, 1), (*grid, frames))


def masked_l1(pred: Tensor, target: Tensor, mask_voxels: Tensor, brain: Tensor) -> Tensor:
    """Mean absolute error over masked brain voxels.

    pred, target (B, 1, X, Y, Z, T); mask_voxels (B, 1, X, Y, Z, T) bool, True where hidden; brain (B, X, Y, Z) bool.
    """
    counted = mask_voxels & brain[:, None, ..., None]
    return (pred - target).abs()[counted].sum() / counted.sum()


def voxels_of_patches(masked: Tensor, cfg: ModelConfig, grid: tuple[int, int, int], frames: int) -> Tensor:
    """(B, X', Y', Z', T') bool over patches -> (B, 1, X, Y, Z, T) bool over voxels."""
    index = [torch.arange(n) // p for n, p in zip((*grid, frames), cfg.patch_size, strict=True)]
    voxels = masked[:, index[0]][:, :, index[1]][:, :, :, index[2]][:, :, :, :, index[3]]
    return voxels[:, None]


# --- parameters ---------------------------------------------------------------------------------------------------
def parameter_shapes(
    cfg: ModelConfig, grid: tuple[int, int, int], frames: int, in_channels: int = 1
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every encoder parameter."""
    width = cfg.embed_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def add_linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def add_norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    add_linear("patch_embed.proj", width, math.prod(cfg.patch_size) * in_channels)
    if cfg.patch_norm:
        add_norm("patch_embed.norm", width)
    grids = stage_grids(cfg, grid, frames)
    if cfg.position == "rope_global":
        for axis, size in zip("xyzt", grids[0], strict=True):
            shapes[f"position.{axis}"] = (size, width)
    for stage, depth in enumerate(cfg.depths):
        c = width * 2**stage
        if cfg.position == "absolute":
            shapes[f"stages.{stage}.position.space"] = (*grids[stage][:3], c)
            shapes[f"stages.{stage}.position.time"] = (grids[stage][3], c)
        for number, branch in product(range(depth), branches(cfg)):
            name = f"stages.{stage}.blocks.{number}.{branch}"
            add_norm(f"{name}.norm", c)
            if branch.startswith("mlp"):
                hidden = int(c * cfg.mlp_ratio)
                add_linear(f"{name}.fn.fc1", hidden, c)
                add_linear(f"{name}.fn.fc2", c, hidden)
            else:
                add_linear(f"{name}.fn.qkv", 3 * c, c)
                add_linear(f"{name}.fn.proj", c, c)
            if cfg.layer_scale is not None:
                shapes[f"{name}.gamma"] = (c,)
        if stage < len(cfg.depths) - 1:
            add_norm(f"stages.{stage}.downsample.norm", 8 * c)
            add_linear(f"stages.{stage}.downsample.reduction", 2 * c, 8 * c, bias=False)
    add_norm("norm", width * 2 ** (len(cfg.depths) - 1))
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> State:
    """float64 values of ordinary size, away from every initial value (no zeros, no ones), so that nothing hides."""
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2 and "position" not in name:
            value = value / math.sqrt(shape[1])
        elif name.endswith((".gamma", "norm.weight")) or (".norms." in name and name.endswith("weight")):
            value = 1.0 + 0.2 * value
        else:
            value = 0.3 * value
        state[name] = value
    return state

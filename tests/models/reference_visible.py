"""The slow reference of task.hidden=drop: an ordinary encoder over all tokens of the clip, hidden ones included.

Every attention is a full N x N softmax with a mask that leaves out hidden keys; what hidden queries find is never read.
Nothing is gathered. In the first stages tokens see those of their own window of their own unit, from then on all of
their frame (or time window). Where whole frames are left out, windows are as ever in space, and whole in time. Names
and legend as in `reference`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from swift.config.schema import ModelConfig
from tests.models import reference as plain
from tests.models.reference import AXES, State


def allowed_keys(
    tokens: tuple[int, ...], unit: tuple[int, ...], window: tuple[int, ...], shifted: bool, visible: Tensor
) -> Tensor:
    """(B, N, N) bool: is this key a visible token of the query's window of the query's unit?

    unit: tokens x, y, z, t of a unit; visible: (B, X, Y, Z, T) bool.
    """
    xyzt = plain.coordinates(tokens)
    same = torch.ones(len(xyzt), len(xyzt), dtype=torch.bool)
    for axis in AXES:
        number, inside = xyzt[:, axis] // unit[axis], xyzt[:, axis] % unit[axis]
        label = plain.labels(unit[axis], window[axis], shifted)[inside]
        same &= (number[:, None] == number[None, :]) & (label[:, None] == label[None, :])
    # A hidden token may see itself, so that no row is empty.
    return same & (visible.flatten(1)[:, None, :] | torch.eye(len(xyzt), dtype=torch.bool))


def attention(cfg: ModelConfig, state: State, name: str, branch: str, x: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """x (B, X, Y, Z, T, C) -> the same shape; allowed (B, N, N)."""
    batch, *tokens, channels = x.shape
    head_dim = channels // heads
    qkv = plain.linear(state, f"{name}.qkv", x.reshape(batch, -1, channels))
    q, k, v = (part.reshape(batch, -1, heads, head_dim) for part in qkv.split(channels, dim=-1))
    if cfg.position in ("rope", "rope_global"):
        angles = plain.rope_angles(cfg, branch, plain.coordinates(tuple(tokens)), head_dim)
        q, k = plain.rotate(q, angles), plain.rotate(k, angles)
    score = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(head_dim)
    weight = score.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2)
    return plain.linear(state, f"{name}.proj", out).reshape(x.shape)


def block(
    cfg: ModelConfig,
    state: State,
    stage: int,
    number: int,
    x: Tensor,
    unit: tuple[int, ...] | None,
    visible: Tensor,
    whole_time: bool = False,
) -> Tensor:
    """One block of stage `stage`; unit: tokens of a unit, None: the whole grid is one, and one window in space.

    whole_time: Windows that extend in time extend over all of it.
    """
    tokens = tuple(x.shape[1:5])
    last = stage == len(cfg.depths) - 1
    shifted = number % 2 == 1 and not (last and cfg.last_stage == "unshifted")
    for branch in plain.branches(cfg):
        name = f"stages.{stage}.blocks.{number}.{branch}"
        y = plain.layer_norm(state, f"{name}.norm", x)
        if branch.startswith("mlp"):
            y = plain.mlp(state, f"{name}.fn", y)
        else:
            window = plain.attention_windows(cfg, branch, tokens, last)
            if unit is None and branch != "time":
                window = (*tokens[:3], window[3])
            if whole_time and branch != "space":
                window = (*window[:3], tokens[3])
            allowed = allowed_keys(tokens, unit or tokens, window, shifted, visible)
            y = attention(cfg, state, f"{name}.fn", branch, y, cfg.num_heads[stage], allowed)
        x = x + (y if cfg.layer_scale is None else state[f"{name}.gamma"] * y)
    return x


def encode(
    cfg: ModelConfig, inner: int, unit: tuple[int, ...], state: State, x: Tensor, visible: Tensor
) -> list[Tensor]:
    """Features of stage `inner` and those after it, each (B, Xs, Ys, Zs, T, Cs); hidden tokens of the first are 0.

    inner: stages whose tokens see only their own unit; unit: patches x, y, z of a unit; visible: bool (B, X, Y, Z, T),
    of any shape: a token of a later stage is visible if one is of those that it is merged of.
    """
    x = plain.embed_patches(cfg, state, x)
    if cfg.position == "rope_global":
        x = x + state["position.x"][:, None, None, None]
        x = x + state["position.y"][:, None, None]
        x = x + state["position.z"][:, None]
        x = x + state["position.t"]
    features = []
    for stage, depth in enumerate(cfg.depths):
        if cfg.position == "absolute":
            x = x + state[f"stages.{stage}.position.space"][:, :, :, None] + state[f"stages.{stage}.position.time"]
        for number in range(depth):
            if stage > inner:
                x = plain.block(cfg, state, stage, number, x)
            else:
                size = None if stage == inner else (*(n // 2**stage for n in unit), x.shape[4])
                x = block(cfg, state, stage, number, x, size, visible)
        if stage <= inner:
            x = torch.where(visible[..., None], x, 0.0)
        if stage >= inner:
            features.append(x)
        if stage < len(cfg.depths) - 1:
            x = plain.merge_patches(state, f"stages.{stage}.downsample", x)
            if stage < inner:
                eight = [visible[:, i::2, j::2, k::2] for i, j, k in product(range(2), repeat=3)]
                visible = torch.stack(eight).any(0)
    if cfg.final_norm:
        features[-1] = plain.layer_norm(state, "norm", features[-1])
    return features


def decode(cfg: ModelConfig, volume: tuple[int, ...], state: State, features: list[Tensor], visible: Tensor) -> Tensor:
    """Features of stage `inner` and those after it -> voxels (B, 1, X, Y, Z, T); visible: (B, X, Y, Z, T) of `inner`.

    A mask token stands for what is hidden; then positions, features of coarser stages, two blocks over all cells of a
    frame and over time, and a linear map from a cell to its voxels.
    """
    x = plain.linear(state, "decoder.laterals.0", plain.layer_norm(state, "decoder.norms.0", features[0]))
    x = torch.where(visible[..., None], x, state["decoder.mask_token"])
    for number, feature in enumerate(features[1:], start=1):
        here = plain.layer_norm(state, f"decoder.norms.{number}", feature)
        x = x + plain.upsample(plain.linear(state, f"decoder.laterals.{number}", here), 2**number, tuple(x.shape[1:4]))
    x = x + state["decoder.position.x"][:, None, None, None] + state["decoder.position.y"][:, None, None]
    x = x + state["decoder.position.z"][:, None] + state["decoder.position.t"]
    width = cfg.decoder_dim
    heads = max(heads for heads in range(1, max(1, width // 16) + 1) if width % heads == 0)
    inside = replace(
        cfg,
        attention="factorized",
        order="st",
        mlp="shared",
        position="none",
        layer_scale=None,
        last_stage="windowed",
        depths=[2],
        num_heads=[heads],
        window=[*x.shape[1:4], cfg.window[3]],
    )
    names = {name.replace("decoder.blocks.", "stages.0.blocks."): value for name, value in state.items()}
    inner = {name: value for name, value in names.items() if name not in state}
    for number in range(2):
        x = plain.block(inside, inner, 0, number, x)
    values = plain.linear(state, "decoder.head", plain.gelu(plain.layer_norm(state, "decoder.norm", x)))
    cell = tuple(n // size for n, size in zip(volume, x.shape[1:4]))
    # Frames of a patch are outermost in the map of a cell.
    values = values.unflatten(-1, (cfg.patch_size[3], -1)).transpose(-1, -2).flatten(-2)
    return plain.unpatch(values, (*cell, cfg.patch_size[3]), volume)  # type: ignore[arg-type]


# --- whole frames -------------------------------------------------------------------------------------------------
def encode_frames(cfg: ModelConfig, state: State, x: Tensor, visible: Tensor) -> list[Tensor]:
    """Features (B, Xs, Ys, Zs, T, Cs) of every stage of a model that leaves frames out; hidden tokens are 0.

    Windows in space are as ever, in time all tokens see each other. visible: bool (B, X, Y, Z, T), of any shape.
    """
    x = plain.embed_patches(cfg, state, x)
    if cfg.position == "rope_global":
        for axis, name in enumerate("xyz"):
            x = x + state[f"position.{name}"].reshape(-1, *[1] * (3 - axis), x.shape[-1])
        x = x + state["position.t"]
    features = []
    for stage, depth in enumerate(cfg.depths):
        if cfg.position == "absolute":
            x = x + state[f"stages.{stage}.position.space"][:, :, :, None] + state[f"stages.{stage}.position.time"]
        for number in range(depth):
            x = block(cfg, state, stage, number, x, tuple(x.shape[1:5]), visible, whole_time=True)
        x = torch.where(visible[..., None], x, 0.0)
        features.append(x)
        if stage < len(cfg.depths) - 1:
            x = plain.merge_patches(state, f"stages.{stage}.downsample", x)
            for axis in (1, 2, 3):
                visible = plain.pad_end(visible, axis, 2)
            eight = [visible[:, i::2, j::2, k::2] for i, j, k in product(range(2), repeat=3)]
            visible = torch.stack(eight).any(0)
    if cfg.final_norm:
        features[-1] = plain.layer_norm(state, "norm", features[-1])
    return features


def decode_frames(
    cfg: ModelConfig, volume: tuple[int, ...], state: State, features: list[Tensor], visible: Tensor
) -> Tensor:
    """Features of every stage -> voxels (B, 1, X, Y, Z, T); visible: bool (B, X, Y, Z, T).

    A mask token stands for what is hidden; then positions, a block over all time steps of a place, and a linear map.
    """
    tokens = tuple(visible.shape[1:])
    x = torch.zeros(())
    for number, feature in enumerate(features):
        here = plain.layer_norm(state, f"decoder.norms.{number}", feature)
        x = x + plain.upsample(plain.linear(state, f"decoder.laterals.{number}", here), 2**number, tokens)
    x = torch.where(visible[..., None], x, state["decoder.mask_token"])
    x = x + state["decoder.position.x"][:, None, None, None] + state["decoder.position.y"][:, None, None]
    x = x + state["decoder.position.z"][:, None] + state["decoder.position.t"]
    y = plain.layer_norm(state, "decoder.blocks.0.attn.norm", x)
    inside = replace(cfg, position="none")
    every = torch.ones(len(x), *tokens, dtype=torch.bool)
    width = cfg.decoder_dim
    heads = max(heads for heads in range(1, max(1, width // 16) + 1) if width % heads == 0)
    allowed = allowed_keys(tokens, (1, 1, 1, tokens[3]), (1, 1, 1, tokens[3]), False, every)
    x = x + attention(inside, state, "decoder.blocks.0.attn.fn", "time", y, heads, allowed)
    y = plain.layer_norm(state, "decoder.blocks.0.mlp.norm", x)
    x = x + plain.mlp(state, "decoder.blocks.0.mlp.fn", y)
    values = plain.linear(state, "decoder.head", plain.gelu(plain.layer_norm(state, "decoder.norm", x)))
    return plain.unpatch(values, tuple(cfg.patch_size), volume)  # type: ignore[arg-type]

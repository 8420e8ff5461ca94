"""The model's parts on brain tokens only: features are (P, T, C), their places a `TokenSet`.

Every function does on places what a module of `layers`, `attention` or `decoders` does on a whole grid, with its
weights.

Shapes: B batch, x y z grid of a stage, P places of a batch, T time steps, C channels, M = P * T tokens, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.models.rope import WindowRotary, rotate, rotate_real
from swift.models.token_sets import Layout, TokenSet, Windows

MULTIPLE = {"cpu": 1, "meta": 1}
"""Windows of a device get empty slots up to a multiple of so many places. On a CPU no score is wasted, and a call of
SDPA for every length costs little; elsewhere few calls are better."""
MULTIPLE_ELSEWHERE = 16


class AttentionLayer(Protocol):
    """What of `attention.WindowAttention` is needed here."""

    heads: int
    shifted: bool
    rotary: WindowRotary | None
    scale: float
    qkv: nn.Linear
    proj: nn.Linear
    dropout: nn.Dropout

    @property
    def multiple(self) -> int | None:
        """Windows get empty slots up to a multiple of so many places; None: what suits the device."""

    @property
    def drop_rate(self) -> float:
        """Of attention weights, now."""

    def window_on(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a window on a grid."""


class Reorder(torch.autograd.Function):
    """(..., rows, C) -> (..., len(index), C). `inverse` leads back, so that the gradient is another gather, no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(-2, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(-2, ctx.saved_tensors[0]), None, None


class _Spread(torch.autograd.Function):
    """(rows, C) -> (size, C), row i at index[i], no two at one; zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        out = x.new_zeros(size, x.shape[1])
        out[index] = x
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class Take(torch.autograd.Function):
    """(rows, C) -> (len(index), C), no row twice. Nothing comes back to the others: zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = grads[0].new_zeros(ctx.size, grads[0].shape[1])
        out[ctx.saved_tensors[0]] = grads[0]
        return out, None


def to_grid(x: Tensor, where: TokenSet) -> Tensor:
    """(P, T, C) -> (B, x, y, z, T, C), zeros where nothing exists."""
    size = where.batch * where.cells
    return _Spread.apply(x.flatten(1), where.place, size).view(where.batch, *where.grid, *x.shape[1:])


def to_places(x: Tensor, where: TokenSet) -> Tensor:
    """(B, x, y, z, T, ...) -> (P, T, ...), for what needs no gradient."""
    return x.flatten(0, 3).index_select(0, where.place)


def patches(x: Tensor, patch: Sequence[int], where: TokenSet) -> Tensor:
    """(B, C, X, Y, Z, T) voxels -> (P, t, px*py*pz*pt*C), in the order of `layers.patchify`."""
    pads = [-n % p for n, p in zip(x.shape[2:], patch, strict=True)]
    if any(pads):
        x = F.pad(x, [value for pad in reversed(pads) for value in (0, pad)])
    for axis, size in zip((5, 4, 3, 2), reversed(patch)):
        x = x.unflatten(axis, (-1, size))
    # b c x px y py z pz t pt
    cut = x.permute(0, 2, 4, 6, 8, 3, 5, 7, 9, 1)
    return cut[(where.clip, *where.xyz)].flatten(2)


def drop_clips(drop: nn.Module, y: Tensor, where: TokenSet) -> Tensor:
    """Stochastic depth: what timm's DropPath draws for a clip holds for all of its places."""
    if isinstance(drop, nn.Identity):
        return y
    return y * drop(y.new_ones(where.batch, 1, 1)).index_select(0, where.clip)


def eight_neighbours(x: Tensor, where: TokenSet) -> Tensor:
    """(P, T, C) -> (P', T, 8C), the places that merge into one of the next stage; zeros for those that do not exist."""
    assert where.parent is not None
    assert where.eighth is not None
    frames, channels = x.shape[1:]
    time = torch.arange(frames, device=x.device)
    row = ((where.parent.unsqueeze(1) * frames + time) * 8 + where.eighth.unsqueeze(1)).flatten()
    return _Spread.apply(x.flatten(0, 1), row, where.parents * frames * 8).view(where.parents, frames, 8 * channels)


def _rotated(rotary: WindowRotary, qk: Tensor, windows: Windows) -> Tensor:
    """Turn (W, w, slots, frames, 2, heads, head_dim) by the places of the slots."""
    table = rotary.rotations[..., : windows.run.size, :, :].flatten(0, 2)
    # Windows of one place have position 0 in space.
    turned = table[:1, None] if windows.cells is None else table[windows.cells]
    if torch.compiler.is_compiling():
        return rotate_real(qk, turned[:, None, :, :, None, None])
    return rotate(qk, torch.view_as_complex(turned)[:, None, :, :, None, None])


def _attend(layer: AttentionLayer, qkv: Tensor, windows: Windows) -> Tensor:
    """(rows, 3C) -> (rows, C) inside windows of one length."""
    parts = qkv.view(*windows.shape, 3, layer.heads, -1)
    if layer.rotary is None:
        q, k, v = parts.unbind(4)
    else:
        qk, v = parts.split((2, 1), dim=4)
        q, k = _rotated(layer.rotary, qk, windows).unbind(4)
        v = v.squeeze(4)
    q, k, v = (part.flatten(2, 3).flatten(0, 1).transpose(1, 2) for part in (q, k, v))
    seen = windows.seen
    if seen is not None:
        count, times, slots, frames = windows.shape
        seen = seen[:, None, :, None].expand(count, times, slots, frames).reshape(count * times, 1, 1, slots * frames)
    out = F.scaled_dot_product_attention(q, k, v, seen, layer.drop_rate, scale=layer.scale)
    return out.transpose(1, 2).reshape(windows.rows, -1)


def layout_of(layer: AttentionLayer, x: Tensor, where: TokenSet) -> Layout:
    """How an attention takes tokens (P, T, C); made once. A compiled forward pass finds it, and could not make it."""
    window = layer.window_on((*where.grid, x.shape[1]))
    table = window if layer.rotary is None else layer.rotary.window
    multiple = layer.multiple or MULTIPLE.get(x.device.type, MULTIPLE_ELSEWHERE)
    return where.layout(window, layer.shifted, x.shape[1], table, multiple)


def attention(layer: AttentionLayer, x: Tensor, where: TokenSet) -> Tensor:
    """Attention inside the windows of the grid, among the tokens that exist: (P, T, C) -> the same."""
    layout = layout_of(layer, x, where)
    rows = x.flatten(0, 1)
    qkv = layer.qkv(rows if layout.same else Reorder.apply(rows, layout.order, layout.slot))
    pieces = qkv.split([windows.rows for windows in layout.windows])
    found = [_attend(layer, piece, windows) for piece, windows in zip(pieces, layout.windows)]
    out = layer.proj(found[0] if len(found) == 1 else torch.cat(found))
    if not layout.same:
        # Empty slots have seen the tokens of their window: what is read of them must be nothing, in the gradient too.
        full = len(layout.order) == len(layout.slot)
        out = Reorder.apply(out, layout.slot, layout.order) if full else Take.apply(out, layout.slot)
    return layer.dropout(out).view(x.shape)


def from_parents(x: Tensor, where: TokenSet) -> Tensor:
    """(P', T, C) of the next stage -> (P, T, C), to each place what its parent has."""
    assert where.parent is not None
    return x.index_select(0, where.parent)

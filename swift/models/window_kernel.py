"""Attention inside windows as one Triton kernel a direction: gather, rotary positions, softmax and scatter in one pass.

The windows of a sample lie in tiles of `slots` tokens (`window_layout.pack`). A program handles one head of one tile:
it reads queries, keys and values from where the linear map left them, so no token is moved before or after, and two
tokens of different windows of a tile do not see each other. The whole table of scores of a tile fits in registers, so
the backward pass computes it again and nothing but queries, keys and values is kept.

Written for CUDA and ROCm. With TRITON_INTERPRET=1 the same code runs on a CPU, which is how it is tested without one.
Imported only where Triton is installed: see `swift.models.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swift.models.window_layout import pack, plan_groups

WHOLE_HEAD = 128
"""Channels of a head that a program holds at once in 16 bits on CUDA. Wider heads, float32, and ROCm with its 64 KiB
of shared memory take parts of PART channels."""
PART = 64
HEADS = 8
"""Most heads of a tile that a program computes, one after the other with the same angles."""
PROGRAMS = 2048
"""So many a launch at least, before a program takes several heads."""


@triton.jit
def _turn(x, cosine, sine):
    """Turn the channel pairs (2i, 2i+1) of x (slots, channels) by angles given as (slots, channels / 2)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (x.shape[0], x.shape[1]))


@triton.jit
def _angles(table, place, first, dim, ROTARY: tl.constexpr, CHANNELS: tl.constexpr):
    """Cosines and sines (slots, CHANNELS / 2) of the pairs from channel `first` on; table is (places, dim / 2, 2)."""
    pair = first // 2 + tl.arange(0, CHANNELS // 2)
    at = place[:, None] * dim + 2 * pair[None, :]
    inside = (pair < dim // 2)[None, :] & ROTARY
    return tl.load(table + at, mask=inside, other=1.0), tl.load(table + at + 1, mask=inside, other=0.0)


@triton.jit
def _load(x, row, used, first, stride, dim, CHANNELS: tl.constexpr):
    """(slots, CHANNELS) of the rows of x, 0 where there is no token or no channel."""
    channel = first + tl.arange(0, CHANNELS)
    inside = used[:, None] & (channel < dim)[None, :]
    return tl.load(x + row[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, value, row, used, first, stride, dim, CHANNELS: tl.constexpr):
    channel = first + tl.arange(0, CHANNELS)
    inside = used[:, None] & (channel < dim)[None, :]
    tl.store(x + row[:, None] * stride + channel[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _load_turned(x, row, used, first, stride, dim, cosine, sine, ROTARY: tl.constexpr, CHANNELS: tl.constexpr):
    value = _load(x, row, used, first, stride, dim, CHANNELS)
    if ROTARY:
        value = _turn(value.to(tl.float32), cosine, sine).to(value.dtype)
    return value


@triton.jit
def _tile(token, segment, tokens, groups, SLOTS: tl.constexpr):
    """Slots of a program, its group of heads, rows of its tokens in the batch, which slots hold one, their windows."""
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    at = tile * SLOTS + tl.arange(0, SLOTS)
    index = tl.load(token + at)
    row = index.to(tl.int64) + tl.program_id(1).to(tl.int64) * tokens
    return at, group, row, index >= 0, tl.load(segment + at)


@triton.jit
def _softmax(score, window, scale):
    """Attention weights (slots, slots). Empty slots see each other, so that no row is without a token."""
    score = tl.where(window[:, None] == window[None, :], score * scale, float("-inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def _forward(
    qkv, out, table, token, place, segment, tokens, heads, dim, scale,
    ROTARY: tl.constexpr, SLOTS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    at, group, row, used, window = _tile(token, segment, tokens, heads // HEADS, SLOTS)
    angle = tl.load(place + at)
    width = heads * dim
    stride = 3 * width
    cosine, sine = _angles(table, angle, 0, dim, ROTARY, CHANNELS)
    for head in range(group * HEADS, group * HEADS + HEADS):
        q = qkv + head * dim
        k, v = q + width, q + 2 * width
        score = tl.zeros((SLOTS, SLOTS), tl.float32)
        for part in tl.static_range(PARTS):
            first = part * CHANNELS
            if PARTS > 1:
                cosine, sine = _angles(table, angle, first, dim, ROTARY, CHANNELS)
            queries = _load_turned(q, row, used, first, stride, dim, cosine, sine, ROTARY, CHANNELS)
            keys = _load_turned(k, row, used, first, stride, dim, cosine, sine, ROTARY, CHANNELS)
            score = tl.dot(queries, tl.trans(keys), score, input_precision=PRECISION)
        weight = _softmax(score, window, scale).to(qkv.dtype.element_ty)
        for part in tl.static_range(PARTS):
            values = _load(v, row, used, part * CHANNELS, stride, dim, CHANNELS)
            value = tl.dot(weight, values, input_precision=PRECISION)
            _store(out + head * dim, value, row, used, part * CHANNELS, width, dim, CHANNELS)


@triton.jit
def _backward(
    qkv, grad_out, grad, table, token, place, segment, tokens, heads, dim, scale,
    ROTARY: tl.constexpr, SLOTS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    at, group, row, used, window = _tile(token, segment, tokens, heads // HEADS, SLOTS)
    angle = tl.load(place + at)
    width = heads * dim
    stride = 3 * width
    cosine, sine = _angles(table, angle, 0, dim, ROTARY, CHANNELS)
    for head in range(group * HEADS, group * HEADS + HEADS):
        q, do, dq = qkv + head * dim, grad_out + head * dim, grad + head * dim
        k, v = q + width, q + 2 * width
        score = tl.zeros((SLOTS, SLOTS), tl.float32)
        slope = tl.zeros((SLOTS, SLOTS), tl.float32)
        for part in tl.static_range(PARTS):
            first = part * CHANNELS
            if PARTS > 1:
                cosine, sine = _angles(table, angle, first, dim, ROTARY, CHANNELS)
            queries = _load_turned(q, row, used, first, stride, dim, cosine, sine, ROTARY, CHANNELS)
            keys = _load_turned(k, row, used, first, stride, dim, cosine, sine, ROTARY, CHANNELS)
            score = tl.dot(queries, tl.trans(keys), score, input_precision=PRECISION)
            outer = _load(do, row, used, first, width, dim, CHANNELS)
            values = _load(v, row, used, first, stride, dim, CHANNELS)
            slope = tl.dot(outer, tl.trans(values), slope, input_precision=PRECISION)
        weight = _softmax(score, window, scale)
        slope = (weight * (slope - tl.sum(weight * slope, 1)[:, None]) * scale).to(qkv.dtype.element_ty)
        weight = weight.to(qkv.dtype.element_ty)
        for part in tl.static_range(PARTS):
            first = part * CHANNELS
            if PARTS > 1:
                # Nothing of a head that is taken in parts is kept: read it again.
                cosine, sine = _angles(table, angle, first, dim, ROTARY, CHANNELS)
                queries = _load_turned(q, row, used, first, stride, dim, cosine, sine, ROTARY, CHANNELS)
                keys = _load_turned(k, row, used, first, stride, dim, cosine, sine, ROTARY, CHANNELS)
                outer = _load(do, row, used, first, width, dim, CHANNELS)
            of_values = tl.dot(tl.trans(weight), outer, input_precision=PRECISION)
            _store(dq + 2 * width, of_values, row, used, first, stride, dim, CHANNELS)
            of_queries = tl.dot(slope, keys, input_precision=PRECISION)
            of_keys = tl.dot(tl.trans(slope), queries, input_precision=PRECISION)
            if ROTARY:
                of_queries, of_keys = _turn(of_queries, cosine, -sine), _turn(of_keys, cosine, -sine)
            _store(dq, of_queries, row, used, first, stride, dim, CHANNELS)
            _store(dq + width, of_keys, row, used, first, stride, dim, CHANNELS)


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32: as torch's own matrix products. Three TF32 products are as exact as one of float32."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if torch.version.hip is None else "ieee"


def _launch(kernel: Any, qkv: Tensor, buffers: tuple[Tensor, ...], rotations: Tensor | None, where: Any) -> None:
    """Run one program for every head of every tile of every sample."""
    grid, window, shifted, slots, heads, scale = where
    batch, tokens, width = qkv.shape
    dim = width // (3 * heads)
    largest = tuple(window) if rotations is None else tuple(rotations.shape[:4])
    tiles = pack(tuple(grid), tuple(window), shifted, largest, slots, qkv.device)
    channels = max(16, triton.next_power_of_2(dim))
    whole = channels <= (WHOLE_HEAD if qkv.dtype != torch.float32 and torch.version.hip is None else PART)
    channels = channels if whole else PART
    programs = tiles.token.shape[0] * batch * heads
    together = max(n for n in range(1, HEADS + 1) if heads % n == 0 and (n == 1 or programs // n >= PROGRAMS))
    together = together if whole else 1
    table = qkv if rotations is None else rotations.contiguous()
    kernel[(tiles.token.shape[0] * heads // together, batch)](
        qkv,
        *buffers,
        table,
        tiles.token,
        tiles.place,
        tiles.segment,
        tokens,
        heads,
        dim,
        scale,
        ROTARY=rotations is not None,
        SLOTS=slots,
        CHANNELS=channels,
        PARTS=triton.cdiv(dim, channels),
        HEADS=together,
        PRECISION=_precision(qkv.dtype),
        num_warps=2 if slots < 64 else 4 if channels <= 64 else 8,
        num_stages=3 if channels > PART else 1,
    )


@torch.library.custom_op("swift::window_attention", mutates_args=())
def window_attention(
    qkv: Tensor,
    rotations: Tensor | None,
    grid: list[int],
    window: list[int],
    shifted: bool,
    slots: int,
    heads: int,
    scale: float,
) -> Tensor:
    """Attention inside the windows of a grid.

    Args:
        qkv: (B, tokens, 3 * heads * head_dim), tokens in the order of the grid; float32 or bf16.
        rotations: of `WindowRotary`, (x, y, z, t, head_dim / 2, 2) in float32 for the largest window; None: no rotary
            positions.
        grid: tokens x, y, z, t of a sample.
        window: tokens x, y, z, t of a window.
        shifted: whether windows are shifted.
        slots: tokens of a tile, 16, 32 or 64 and no fewer than a window has.
        heads: attention heads.
        scale: of the scores.

    Returns:
        (B, tokens, heads * head_dim) in the order of the grid.
    """
    qkv = qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    _launch(_forward, qkv, (out,), rotations, (grid, window, shifted, slots, heads, scale))
    return out


@torch.library.custom_op("swift::window_attention_backward", mutates_args=())
def window_attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    rotations: Tensor | None,
    grid: list[int],
    window: list[int],
    shifted: bool,
    slots: int,
    heads: int,
    scale: float,
) -> Tensor:
    """The gradient of `qkv`."""
    qkv = qkv.contiguous()
    grad = torch.empty_like(qkv)
    _launch(_backward, qkv, (grad_out.contiguous(), grad), rotations, (grid, window, shifted, slots, heads, scale))
    return grad


@window_attention.register_fake
def _(qkv: Tensor, *args: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@window_attention_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, rotations, *ctx.where = inputs
    ctx.save_for_backward(qkv, rotations)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    qkv, rotations = ctx.saved_tensors
    grad = window_attention_backward(grad_out, qkv, rotations, *ctx.where)
    return grad, *([None] * (1 + len(ctx.where)))


window_attention.register_autograd(_gradient, setup_context=_keep)


def _products(shape: torch.Size, grid: list[int], window: list[int], shifted: bool) -> int:
    """FLOPs of scores and weighted sums, tokens of one window only."""
    pairs = sum(group.windows * group.tokens**2 for group in plan_groups(tuple(grid), tuple(window), shifted))
    return 4 * shape[0] * pairs * (shape[2] // 3)


@register_flop_formula(torch.ops.swift.window_attention)
def _forward_flops(qkv: Any, rotations: Any, grid: Any, window: Any, shifted: Any, *_: Any, **__: Any) -> int:
    return _products(qkv, grid, window, shifted)


@register_flop_formula(torch.ops.swift.window_attention_backward)
def _backward_flops(
    _: Any, qkv: Any, rotations: Any, grid: Any, window: Any, shifted: Any, *__: Any, **___: Any
) -> int:
    """Four products; the scores, which are computed again, are no FLOPs of the model."""
    return 2 * _products(qkv, grid, window, shifted)

"""Multi-head self-attention inside 4D windows, computed in the way that suits the device.

Shapes: B batch, X Y Z T token grid, C channels, M = B*X*Y*Z*T, W windows of a group (batch included), N tokens of one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.models import packed
from swift.models.cells import Cells, Frames, Seen, scattered_window
from swift.models.pieces import cut, joined, rows_at_once
from swift.models.rope import WindowRotary
from swift.models.token_sets import TokenSet
from swift.models.window_layout import (
    Group,
    Tiles,
    largest_window,
    merge,
    pack,
    partition,
    plan_groups,
    slabs,
    tokens_of,
    whole_windows,
)

METHODS = ("groups", "tiles", "kernel")
KERNEL_SLOTS = (16, 32, 64)
"""Tokens of a tile that the kernel is written for."""
TILE_SLOTS = 128
"""Tokens of a tile for SDPA: CUDA's kernels pad shorter ones to that, some of them only in the backward pass."""
MOST_ROWS = 65_535
"""Rows in one call of SDPA: CUDA's kernels have one block of the grid's second or third axis for each."""
MOST_ELEMENTS = 2**31 - 1
"""Elements of a tensor in one call of SDPA: its backward pass counts them in 32 bits."""


HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; it comes with torch for CUDA and ROCm."""


def method_for(device: torch.device, dtype: torch.dtype, tokens: int, dropout: float, compiling: bool) -> str:
    """How attention is computed. All methods agree to rounding; the tests compare each with the slow reference.

    - groups, on a CPU (and on the meta device, for counts): windows of one shape are one call of SDPA. No score is
      wasted, and 8 to 16 calls cost nothing.
    - kernel, on CUDA and ROCm: everything between the two linear maps in one Triton kernel, for windows of up to 64
      tokens in float32 or narrower and without dropout of attention weights.
    - tiles, where the kernel cannot: windows are packed into tiles of one length, so that a few calls of SDPA do all,
      inside the limits of CUDA's kernels; and under torch.compile on a CPU, in one graph.
    """
    if device.type in ("cpu", "meta"):
        return "tiles" if compiling else "groups"
    fits = tokens <= KERNEL_SLOTS[-1] and not dropout and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return "kernel" if fits and device.type == "cuda" and HAS_TRITON else "tiles"


def kernel_slots(tokens: int) -> int:
    """Tokens of a tile of the kernel for windows of `tokens`: at least three windows of time, one of space."""
    return next(slots for slots in KERNEL_SLOTS if tokens <= slots // 2 or slots == KERNEL_SLOTS[-1])


def tile_slots(tokens: int) -> int:
    """Tokens of a tile of SDPA: whole windows, a multiple of 8 as its kernels want a mask to be."""
    return max(TILE_SLOTS, -(-tokens // 8) * 8)


def _rows(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The arguments of SDPA, on CUDA in pieces of windows that its kernels can launch at once."""
    if not q.is_cuda or len(q) <= MOST_ROWS:
        return [(q, k, v, seen)]
    masks = [None] * -(-len(q) // MOST_ROWS) if seen is None else seen.split(MOST_ROWS)
    return list(zip(q.split(MOST_ROWS), k.split(MOST_ROWS), v.split(MOST_ROWS), masks))


class WindowAttention(nn.Module):
    """Attention among the tokens of one window of x, y, z, t tokens.

    Args:
        dim: channels C.
        heads: attention heads.
        window: tokens along x, y, z, t; an entry of 0 means the whole axis.
        shifted: shift the windows by half a window on each axis longer than its window.
        rotary: rotary positions, or None.
        attention_dropout: on the attention weights.
        dropout: after the output projection.
        scale: of the scores; None: 1/sqrt(head_dim).
    """

    method: ClassVar[str | None] = None
    """One of METHODS for every layer, in tests and benchmarks; None: what suits the device."""
    multiple: ClassVar[int | None] = None
    """On a TokenSet: windows get empty slots up to a multiple of so many places; None: what suits the device."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: tuple[int, ...],
        shifted: bool,
        rotary: WindowRotary | None,
        attention_dropout: float,
        dropout: float,
        scale: float | None = None,
    ):
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rotary = rotary
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)
        self.scale = scale or (dim // heads) ** -0.5
        self._tiles: Tiles | None = None

    def plan(self, x: Tensor) -> Tiles:
        """Make (once a grid) and keep the tiles of inputs like x: a compiled forward pass cannot make them."""
        grid = tuple(x.shape[1:5])
        window = self.window_on(grid)
        largest = window if self.rotary is None else self.rotary.window
        slots = tile_slots(largest_window(grid, window))
        self._tiles = pack(grid, window, self.shifted, largest, slots, x.device)
        return self._tiles

    def window_on(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a window on a grid."""
        return tuple(w or n for w, n in zip(self.window, grid))

    def split_heads(
        self, qkv: Tensor, shape: tuple[int, ...], cells: Cells | Frames | None = None
    ) -> tuple[Tensor, ...]:
        """(W, N, 3C) -> queries, keys and values (W, heads, N, head_dim) of windows of `shape` = x, y, z, t tokens."""
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        if self.rotary is None:
            q, k, v = qkv.unbind(2)
        else:
            # split, not slices: its gradient is one concatenation instead of a zero-filled tensor a slice.
            qk, v = qkv.split((2, 1), dim=2)
            turned = self.rotary(qk, shape) if cells is None else cells.turn(self.rotary, qk, shape)
            q, k = turned.unbind(2)
            v = v.squeeze(2)
        return tuple(part.transpose(1, 2) for part in (q, k, v))

    @property
    def drop_rate(self) -> float:
        """Of attention weights, now."""
        return self.attention_dropout if self.training else 0.0

    def _attend(self, qkv: Tensor, shape: tuple[int, ...], cells: Cells | Frames | None, keys: Tensor | None) -> Tensor:
        """(W, N, 3C) -> (W * N, C) for windows of `shape` = x, y, z, t tokens; keys: bool (W, N, 1), those seen."""
        q, k, v = self.split_heads(qkv, shape, cells)
        seen = None
        if keys is not None:
            # A token that nobody sees may see itself, so that no row is empty.
            own = torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
            seen = (keys.transpose(1, 2) | own).unsqueeze(1)
        parts = [
            F.scaled_dot_product_attention(some_q, some_k, some_v, mask, self.drop_rate, scale=self.scale)
            for some_q, some_k, some_v, mask in _rows(q, k, v, seen)
        ]
        out = joined(parts)
        return out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3])

    def _by_groups(
        self, x: Tensor, window: tuple[int, ...], cells: Cells | Frames | None = None, visible: Tensor | None = None
    ) -> Tensor:
        groups = plan_groups(tuple(x.shape[1:5]), window, self.shifted)
        # Places of scattered tokens are those of a whole batch, and random numbers are drawn for all at once.
        rows = x.shape[:5].numel()
        if cells is None and not self.drop_rate:
            rows = rows_at_once(x, rows, 3 * x.shape[5])
        pieces = whole_windows(groups, len(x), rows)
        sizes = [tokens_of(piece) for piece in pieces]
        tokens = cut(partition(x, groups), sizes)
        seen: Sequence[Tensor] | list[None] = [None] * len(pieces)
        if visible is not None:
            seen = cut(partition(visible.unsqueeze(-1), groups), sizes)
        out = [self._windows(part, piece, cells, keys) for part, piece, keys in zip(tokens, pieces, seen)]
        return merge(joined(out), groups, x.shape)

    def _windows(
        self, x: Tensor, piece: Sequence[tuple[Group, int]], cells: Cells | Frames | None, visible: Tensor | None
    ) -> Tensor:
        """(M, C) -> the same: windows of a piece of `whole_windows`; visible: bool (M, 1)."""
        keys: list[Tensor] | list[None] = [None] * len(piece) if visible is None else slabs(visible, piece)
        qkv = slabs(self.qkv(x), piece)
        parts = [self._attend(slab, group.shape, cells, seen) for slab, (group, _), seen in zip(qkv, piece, keys)]
        return self.proj(joined(parts))

    def _by_tiles(self, x: Tensor, window: tuple[int, ...]) -> Tensor:
        """SDPA over tiles of whole windows, a mask keeping the windows of a tile apart."""
        tiles = self._tiles if torch.compiler.is_compiling() else self.plan(x)
        assert tiles is not None, "plan() comes before a compiled forward pass"
        # Empty slots repeat token 0, see only each other and are never read: no gradient comes back from them.
        gather = tiles.token.clamp(min=0).flatten()
        qkv = packed.Reorder.apply(self.qkv(x).flatten(1, 4), gather, tiles.slot)
        q, k, v = qkv.unflatten(1, tiles.token.shape).unflatten(-1, (3, self.heads, -1)).unbind(3)
        if self.rotary is not None:
            q, k = self.rotary.turn(q, tiles.place), self.rotary.turn(k, tiles.place)
        seen = None if tiles.alone else (tiles.segment.unsqueeze(2) == tiles.segment.unsqueeze(1)).unsqueeze(1)
        out = self._in_calls(q, k, v, seen).flatten(3).flatten(1, 2)
        return self.proj(packed.Reorder.apply(out, tiles.slot, gather)).view(x.shape)

    def _in_calls(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """SDPA of (B, tiles, slots, heads, head_dim) in calls that the kernels can launch; a mask is one a tile."""
        batch, tiles, _, _, dim = q.shape
        # One call for all samples: a tile is a row, a head of a sample a head. Kernels want 8 channels or more of them.
        q, k, v = (F.pad(part.permute(1, 0, 3, 2, 4), (0, -dim % 8)).flatten(1, 2) for part in (q, k, v))
        rows = max(1, min(MOST_ROWS, MOST_ELEMENTS // q[0].numel()))
        parts = []
        for start in range(0, tiles, rows):
            cut = slice(start, start + rows)
            mask = None if seen is None else seen[cut]
            part = F.scaled_dot_product_attention(q[cut], k[cut], v[cut], mask, self.drop_rate, scale=self.scale)
            parts.append(part[..., :dim])
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.unflatten(1, (batch, self.heads)).permute(1, 0, 3, 2, 4)

    def _by_kernel(self, x: Tensor, window: tuple[int, ...]) -> Tensor:
        from swift.models.window_kernel import window_attention

        qkv, grid = self.qkv(x).flatten(1, 4), list(x.shape[1:5])
        rotations = None if self.rotary is None else self.rotary.rotations
        slots = kernel_slots(largest_window(tuple(grid), window))
        out = window_attention(qkv, rotations, grid, list(window), self.shifted, slots, self.heads, self.scale)
        return self.proj(out).view(x.shape)

    def forward(self, x: Tensor, where: Cells | Frames | Seen | TokenSet | None = None) -> Tensor:
        """(B, X, Y, Z, T, C) -> the same.

        Args:
            x: Tokens.
            where: Which places of the grid (B, N, 1, 1, T, C) tokens have: all N of a frame then see each other. Or the
                places of (P, T, C) tokens: windows are those of the grid. Or the time steps of tokens: those of a clip
                then all see each other. Or which tokens of a whole grid are seen.
        """
        if isinstance(where, TokenSet):
            return packed.attention(self, x, where)
        cells, visible = (where.cells, where.visible) if isinstance(where, Seen) else (where, None)
        grid = tuple(x.shape[1:5])
        if isinstance(cells, Frames):
            if visible is not None or self.window[3] != 1:
                rotated = None if self.window[3] == 1 else cells
                return self.dropout(self._by_groups(x, cells.window(self.window_on(grid), grid), rotated, visible))
            cells = None
        if cells is not None and self.window[:3] != (1, 1, 1):
            return self.dropout(self._by_groups(x, scattered_window(self.window, grid), cells, visible))
        window = self.window_on(grid)
        if visible is not None:
            return self.dropout(self._by_groups(x, window, None, visible))
        tokens = largest_window(grid, window)
        method = self.method or method_for(x.device, x.dtype, tokens, self.drop_rate, torch.compiler.is_compiling())
        by = {"groups": self._by_groups, "tiles": self._by_tiles, "kernel": self._by_kernel}[method]
        return self.dropout(by(x, window))

"""Multi-head self-attention inside 4D windows.

Shapes: B batch, X Y Z T token grid, C channels, M = B*X*Y*Z*T, W windows of a group (batch included), N tokens of one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.models.rope import WindowRotary
from swift.models.window_layout import merge, partition, plan_groups, slabs


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
        self.scale = scale

    def split_heads(self, qkv: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """(W, N, 3C) -> queries, keys and values (W, heads, N, head_dim) of windows of `shape` = x, y, z, t tokens."""
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        if self.rotary is None:
            q, k, v = qkv.unbind(2)
        else:
            # split, not slices: its gradient is one concatenation instead of a zero-filled tensor a slice.
            qk, v = qkv.split((2, 1), dim=2)
            q, k = self.rotary(qk, shape).unbind(2)
            v = v.squeeze(2)
        return tuple(part.transpose(1, 2) for part in (q, k, v))

    def _attend(self, qkv: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(W, N, 3C) -> (W * N, C) for windows of `shape` = x, y, z, t tokens."""
        q, k, v = self.split_heads(qkv, shape)
        drop = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        return out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3])

    def forward(self, x: Tensor) -> Tensor:
        """(B, X, Y, Z, T, C) -> the same."""
        grid = tuple(x.shape[1:5])
        window = tuple(w or n for w, n in zip(self.window, grid))
        groups = plan_groups(grid, window, self.shifted)
        qkv = self.qkv(partition(x, groups))
        parts = [self._attend(slab, group.shape) for slab, group in zip(slabs(qkv, groups, x.shape[0]), groups)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.dropout(merge(self.proj(out), groups, x.shape))

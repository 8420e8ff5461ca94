"""Rotary position embedding (Su et al. 2021), axial over the axes of an attention window.

Each axis owns its own channel pairs, so that every coordinate can be read back: adding the angles of x, y and z in one
pair would leave only their sum (64 places of a 4x4x4 window, 10 rotations).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def pairs_per_axis(head_dim: int, axes: int) -> list[int]:
    """Deal the head_dim / 2 rotation pairs to the axes as evenly as possible, the first axes getting the extra ones.

    Raises:
        ValueError: odd head_dim, or fewer pairs than axes.
    """
    pairs = head_dim // 2
    if head_dim % 2 or pairs < axes:
        raise ValueError(
            f"rotary positions over {axes} axes need an even head_dim of at least {2 * axes}, got {head_dim}: "
            "use fewer heads, a wider embed_dim, or model.position=absolute"
        )
    return [pairs // axes + (axis < pairs % axes) for axis in range(axes)]


def window_rotations(window: tuple[int, ...], axes: tuple[int, ...], head_dim: int, base: float) -> Tensor:
    """Unit complex rotations of the tokens of a window.

    Args:
        window: tokens along x, y, z, t.
        axes: which of the four carry a position: (0, 1, 2) in space, (3,) in time.
        head_dim: channels of an attention head.
        base: an axis with n pairs rotates pair k by coordinate * base^(-k/n).

    Returns:
        complex128 (x, y, z, t, head_dim / 2).
    """
    parts = []
    for axis, pairs in zip(axes, pairs_per_axis(head_dim, len(axes))):
        frequency = base ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        angle = torch.outer(torch.arange(window[axis], dtype=torch.float64, device="cpu"), frequency)
        shape = [1, 1, 1, 1, pairs]
        shape[axis] = window[axis]
        parts.append(angle.view(shape).expand(*window, pairs))
    angles = torch.cat(parts, dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i+1) of x by complex rotations, in float32 at least.

    One complex product is 4 to 6 times cheaper on a CPU than the usual sum of products of halves.

    Args:
        x: (..., head_dim), float.
        rotations: complex, broadcastable to (..., head_dim / 2).
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def rotate_real(x: Tensor, rotations: Tensor) -> Tensor:
    """As `rotate`, with cosine and sine (..., head_dim / 2, 2): compilers have no code for complex numbers."""
    cosine, sine = rotations.unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class WindowRotary(nn.Module):
    """Rotations of the queries and keys of a window, held as a buffer that no checkpoint contains."""

    rotations: Tensor

    def __init__(self, window: tuple[int, ...], axes: tuple[int, ...], head_dim: int, base: float):
        super().__init__()
        self.window, self.axes, self.head_dim, self.base = window, axes, head_dim, base
        # On the default device, so that a model built on the meta device runs there.
        table = self._table(torch.float32).to(torch.empty(0).device)
        self.register_buffer("rotations", table, persistent=False)

    def _table(self, dtype: torch.dtype) -> Tensor:
        # Real (..., 2) and not complex: `Module.to(dtype)` would drop the imaginary part of a complex buffer.
        return torch.view_as_real(window_rotations(self.window, self.axes, self.head_dim, self.base)).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WindowRotary:
        # Rebuilt, not converted: a bf16 table would be wrong in the third digit, and one made by `to_empty` garbage.
        moved = fn(self.rotations)
        self.rotations = self._table(torch.promote_types(moved.dtype, torch.float32)).to(moved.device)
        return self

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotate (B, tiles, slots, heads, head_dim) tokens by their `places` (tiles, slots) in the largest window.

        In real numbers, as compilers have no code for complex ones; in float32 at least.
        """
        return rotate_real(x, self.rotations.flatten(0, 3)[places].unsqueeze(2))

    def forward(self, qk: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Rotate (W, N, 2, heads, head_dim) tokens of windows with `shape` = x, y, z, t tokens, N = their product."""
        x, y, z, t = shape
        table = self.rotations[:x, :y, :z, :t]
        if table.shape[:4] != shape:
            raise ValueError(f"window {shape} is larger than the {self.window} that the model was built for")
        return rotate(qk, torch.view_as_complex(table.reshape(-1, 1, 1, *table.shape[4:])))

"""Tokens that have only some places of their grid: where they are, and rotary positions for them.

The visible cells of a stage whose hidden ones do not exist (`swift.models.visible`), and the visible time steps of a
clip (`swift.models.visible_frames`).

Shapes: B batch, N tokens of a frame, W windows of a sample, G places of the grid in a frame, V visible time steps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from swift.models.rope import WindowRotary, rotate, window_rotations


@lru_cache(maxsize=64)
def _rotations(
    window: tuple[int, ...],
    axes: tuple[int, ...],
    head_dim: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(G, t, head_dim / 2) complex rotations of a window of x, y, z, t tokens, G = x * y * z."""
    # A table made in inference mode could not be used in training.
    with torch.inference_mode(False):
        table = torch.view_as_real(window_rotations(window, axes, head_dim, base).flatten(0, 2))
        return torch.view_as_complex(table.to(device, dtype))


def scattered_window(window: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The window x, y, z, t on (N, 1, 1, T) `tokens`: all of a frame, and in time that of `window`."""
    return (*tokens[:3], window[3] or tokens[3])


class Cells(NamedTuple):
    """Places of the tokens of each sample."""

    places: Tensor
    """int64 (B, N), in the order x, y, z of the grid."""
    grid: tuple[int, ...]
    """Tokens x, y, z of the whole grid."""

    def turn(self, rotary: WindowRotary, qk: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Rotate (B * W, N * frames, 2, heads, head_dim) tokens of windows by their places in the grid."""
        frames = shape[3]
        # The whole grid, also where it is larger than the window that the layer was built for: what counts is how far
        # two tokens are apart.
        window = (*self.grid, max(frames, rotary.window[3]))
        # bf16 weights rotate in float32 too.
        dtype = torch.promote_types(rotary.rotations.dtype, torch.float32)
        table = _rotations(window, rotary.axes, rotary.head_dim, rotary.base, dtype, qk.device)
        rotations = table[self.places][:, :, :frames].flatten(1, 2)  # (B, N * frames, head_dim / 2)
        turned = rotate(qk.unflatten(0, (len(self.places), -1)), rotations[:, None, :, None, None])
        return turned.flatten(0, 1)


class Frames(NamedTuple):
    """Time steps that the tokens of each sample have; those of one sample all see each other, in no windows of time."""

    steps: Tensor
    """int64 (B, V), ascending."""
    total: int
    """Time steps of a whole clip."""

    def window(self, window: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The window x, y, z, t on `tokens`: in time all there are, where it has an extent in time."""
        return window if window[3] == 1 else (*window[:3], tokens[3])

    def turn(self, rotary: WindowRotary, qk: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Rotate (B * W, N, 2, heads, head_dim) tokens of windows of `shape` by place and by their true time step."""
        x, y, z, _ = shape
        window = (*rotary.window[:3], max(self.total, rotary.window[3]))
        dtype = torch.promote_types(rotary.rotations.dtype, torch.float32)
        table = _rotations(window, rotary.axes, rotary.head_dim, rotary.base, dtype, qk.device)
        inside = table.view(*window, -1)[:x, :y, :z, self.steps]  # (x, y, z, B, V, head_dim / 2)
        rotations = inside.permute(3, 0, 1, 2, 4, 5).flatten(1, 4)
        turned = rotate(qk.unflatten(0, (len(self.steps), -1)), rotations[:, None, :, None, None])
        return turned.flatten(0, 1)


class Seen(NamedTuple):
    """Which tokens of a grid are there to be seen; the others are computed, and nobody looks at them."""

    visible: Tensor
    """bool (B, X, Y, Z, T)."""
    cells: Cells | Frames | None
    """Their places, where all tokens of a frame see each other, or all time steps do."""


@lru_cache(maxsize=64)
def unit_tokens(units: tuple[int, ...], inside: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tokens of a grid a unit has.

    Args:
        units: Units along x, y, z.
        inside: Tokens of a unit along x, y, z.
        device: Where the table goes.

    Returns:
        int64 (U, tokens of a unit), both in the order x, y, z.
    """
    grid = [n * size for n, size in zip(units, inside)]
    with torch.inference_mode(False):
        index = torch.arange(math.prod(grid), device=device).view(
            units[0], inside[0], units[1], inside[1], units[2], inside[2]
        )
        return index.permute(0, 2, 4, 1, 3, 5).reshape(math.prod(units), math.prod(inside))

"""The voxels that maps are compared in, and the coarser cells that they are predicted in.

Legend: X Y Z voxels of the store's grid, x y z cells, K contrasts, V voxels and C cells of the brain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cell_grid(grid: Sequence[int], step: int) -> tuple[int, int, int]:
    """Cells of `step` voxels along an edge that cover a grid; the last ones may reach beyond it."""
    x, y, z = (math.ceil(n / step) for n in grid)
    return x, y, z


class MapGrid:
    """Brain voxels and cells.

    Args:
        brain: (X, Y, Z) bool.
        step: Voxels along an edge of a cell.

    Attributes:
        voxels: (V,) int64 flat places in the grid, ascending.
        cells: (C,) int64 flat places in the grid of cells, ascending: those with at least one brain voxel.
        shape: x, y, z.
    """

    def __init__(self, brain: np.ndarray, step: int) -> None:
        self.grid, self.step = tuple(brain.shape), step
        self.shape = cell_grid(brain.shape, step)
        self.voxels = np.flatnonzero(brain)
        places = tuple(axis // step for axis in np.nonzero(brain))
        self.cells, self._cell = np.unique(np.ravel_multi_index(places, self.shape), return_inverse=True)

    def coarse(self, values: np.ndarray) -> np.ndarray:
        """(K, V) -> (K, C) float32: mean over the voxels of each cell that have a value; NaN where none has one."""
        if self.step == 1:
            return np.asarray(values, np.float32)
        known = np.isfinite(values)
        size = len(self.cells)
        out = np.full((len(values), size), np.nan, np.float32)
        for row, (some, there) in enumerate(zip(values, known, strict=True)):
            count = np.bincount(self._cell[there], minlength=size)
            total = np.bincount(self._cell[there], some[there], size)
            np.divide(total, count, out=out[row], where=count > 0, casting="same_kind")
        return out

    def fine(self, values: np.ndarray) -> np.ndarray:
        """(K, C) -> (K, V) float32, interpolated between the middles of cells; those without brain take no part."""
        if self.step == 1:
            return np.asarray(values, np.float32)
        dense = torch.zeros(len(values) + 1, math.prod(self.shape))
        dense[:-1, self.cells] = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        dense[-1, self.cells] = 1.0
        big = enlarge(dense.view(1, -1, *self.shape), self.step, self.grid)[0].flatten(1)[:, self.voxels]
        return np.asarray(big[:-1] / big[-1])


def enlarge(cells: Tensor, step: int, grid: Sequence[int]) -> Tensor:
    """(B, K, x, y, z) -> (B, K, X, Y, Z), trilinear between the middles of cells."""
    if step == 1:
        return cells
    big = F.interpolate(cells, scale_factor=step, mode="trilinear", align_corners=False)
    return big[:, :, : grid[0], : grid[1], : grid[2]]

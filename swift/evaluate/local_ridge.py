"""A hidden voxel from the visible ones around it, in space and time: the local linear prediction.

The signal is taken for a stationary Gaussian field with a separable covariance c(d, dt) = s(d) r(dt). Each hidden voxel
is predicted from the visible neighbours that tell most of it. This is simple kriging, a ridge regression on them: the
noise, which no two voxels share, lies on the diagonal of the covariance.

    x = c_n' C_nn^-1 x_n   with the MOST neighbours n of largest |c|.

s and r are averages of products over all pairs at a distance, divided by the number of all voxels (frames) and not by
that of the pairs: then every matrix C made of them is positive semidefinite, as the autocorrelation of a finite signal.

Legend: V voxels of one brain, n frames, X Y Z grid, O offsets in the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

RADIUS, LAGS, MOST = 2, 2, 8
"""Window in voxels and frames; neighbours of a voxel."""
RIDGE = 1e-3
"""Added to the diagonal, as a part of the variance."""
CHUNK = 1 << 18
"""Hidden values predicted at a time."""


@dataclass(frozen=True)
class LocalRidge:
    """A fitted covariance.

    Attributes:
        space: (4R+1, 4R+1, 4R+1) s of the offsets -2R .. 2R, 1 at 0.
        time: (4L+1,) r of the lags -2L .. 2L, 1 at 0.
    """

    space: Tensor
    time: Tensor

    @staticmethod
    def of(frames: Sequence[Tensor], index: Sequence[Tensor], grid: Sequence[int]) -> LocalRidge:
        """Fit to scans.

        Args:
            frames: Of each scan (V, n) consecutive frames.
            index: Of each scan (V,) flat places of its voxels in the grid.
            grid: X, Y, Z.
        """
        pads = [size + 2 * RADIUS for size in grid]
        space = torch.zeros([4 * RADIUS + 1] * 3, dtype=torch.float64)
        time = torch.zeros(4 * LAGS + 1, dtype=torch.float64)
        around = torch.arange(-2 * RADIUS, 2 * RADIUS + 1)
        for values, where in zip(frames, index, strict=True):
            values = values.float().cpu()
            volume = torch.zeros(grid[0] * grid[1] * grid[2])
            power = torch.zeros(*pads[:2], pads[2] // 2 + 1)
            for frame in values.T:
                volume[where.long().cpu()] = frame
                power += torch.fft.rfftn(volume.view(*grid), s=pads).abs().square()
            products = torch.fft.irfftn(power, s=pads).double()
            x, y, z = (around % size for size in pads)
            space += products[x][:, y][:, :, z]
            for lag in range(min(2 * LAGS + 1, values.shape[1])):
                product = float((values[:, lag:] * values[:, : values.shape[1] - lag]).double().sum())
                time[2 * LAGS + lag] += product
                if lag:
                    time[2 * LAGS - lag] += product
        middle = 2 * RADIUS
        return LocalRidge(
            (space / space[middle, middle, middle].clamp(min=1e-12)).float(),
            (time / time[2 * LAGS].clamp(min=1e-12)).float(),
        )

    @cached_property
    def _offsets(self) -> Tensor:
        """(O, 4) offsets x, y, z, t, the most telling first: the whole window, without the voxel itself."""
        steps = [np.arange(-RADIUS, RADIUS + 1)] * 3 + [np.arange(-LAGS, LAGS + 1)]
        every = torch.from_numpy(np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 4))
        every = every[every.abs().sum(1) > 0]
        # Far in space and in time tells next to nothing; this keeps the table of neighbours small.
        every = every[(every[:, :3].abs().sum(1) <= RADIUS) & ((every[:, 3] == 0) | (every[:, :3].abs().sum(1) <= 1))]
        assert len(every) < 63, "their visibility is kept in the bits of one number"
        strength = self.covariance(every).abs()
        return every[strength.argsort(descending=True, stable=True)]

    def covariance(self, offset: Tensor) -> Tensor:
        """C of (..., 4) offsets within twice the window, variance 1."""
        x, y, z = ((offset[..., axis] + 2 * RADIUS) for axis in range(3))
        return self.space[x, y, z] * self.time[offset[..., 3] + 2 * LAGS]

    def predict(self, values: Tensor, visible: Tensor, index: Tensor, grid: Sequence[int]) -> Tensor:
        """Expected value of every hidden voxel given its visible neighbours; 0 without any, and in visible voxels.

        Args:
            values: (V, n) consecutive frames; what is hidden is not looked at.
            visible: bool (V, n).
            index: (V,) flat places in the grid.
            grid: X, Y, Z.

        Returns:
            (V, n) float32.
        """
        values, visible, index = values.cpu(), visible.cpu(), index.long().cpu()
        voxels, frames = values.shape
        offsets = self._offsets
        table = _neighbours(index, offsets[:, :3], grid)  # (V, O), V where there is none
        # One voxel and LAGS frames on both sides that are never visible.
        seen = torch.zeros(voxels + 1, frames + 2 * LAGS, dtype=torch.bool)
        seen[:-1, LAGS:-LAGS] = visible
        shown = torch.zeros(voxels + 1, frames + 2 * LAGS)
        shown[:-1, LAGS:-LAGS] = torch.where(visible, values.float(), 0.0)
        places, frames_of = (~visible).nonzero(as_tuple=True)
        found = []
        for at in range(0, len(places), CHUNK):
            place, frame = places[at : at + CHUNK], frames_of[at : at + CHUNK]
            when = offsets[:, 3] + LAGS + frame[:, None]
            rows = table[place]
            # Which neighbours are visible, as the bits of a number: patches are hidden whole, so few numbers occur.
            code = (seen[rows, when].long() << torch.arange(len(offsets))).sum(1)
            patterns, which = code.unique(return_inverse=True)
            chosen, weights = self._weights(patterns)
            taken = chosen[which]
            x = shown[rows.gather(1, taken), when.gather(1, taken)]
            found.append((weights[which] * x).sum(1))
        out = torch.zeros(voxels, frames)
        out[places, frames_of] = torch.cat(found) if found else torch.zeros(0)
        return out

    def _weights(self, patterns: Tensor) -> tuple[Tensor, Tensor]:
        """For each set of visible neighbours (bits in the order of `_offsets`) those to use, and their weights.

        Returns:
            (n, MOST) places in `_offsets` and (n, MOST) float32, 0 where there are fewer.
        """
        offsets = self._offsets
        known = (patterns[:, None] >> torch.arange(len(offsets))) & 1 > 0
        chosen = torch.sort((~known).to(torch.uint8), dim=1, stable=True).indices[:, :MOST]
        use = known.gather(1, chosen)
        between = self.covariance((offsets[:, None] - offsets[None]).clamp(-2 * RADIUS, 2 * RADIUS))
        between = between + RIDGE * torch.eye(len(offsets))
        matrix = between[chosen[:, :, None], chosen[:, None]] * (use[:, :, None] & use[:, None])
        matrix = matrix + torch.diag_embed((~use).float())
        own = self.covariance(offsets)[chosen] * use
        return chosen, torch.linalg.solve(matrix, own[..., None])[..., 0]


def _neighbours(index: Tensor, offsets: Tensor, grid: Sequence[int]) -> Tensor:
    """(V, O) row of the voxel at each offset from each voxel; V where there is none."""
    voxels = len(index)
    pads = [size + 2 * RADIUS for size in grid]
    rows = torch.full(pads, voxels, dtype=torch.long)
    x, y, z = (torch.from_numpy(part) + RADIUS for part in np.unravel_index(index.numpy(), tuple(grid)))
    rows[x, y, z] = torch.arange(voxels)
    at = [place[:, None] + offsets[None, :, axis] for axis, place in enumerate((x, y, z))]
    return rows[at[0], at[1], at[2]]

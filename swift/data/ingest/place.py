"""Bring a scan to one isotropic grid: resampling and centred crop or pad in a single interpolation, frame by frame.

Legend: X Y Z voxels (RAS+); "source" is the scan as read, "target" the grid of the store; V target voxels in the brain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nibabel.spaces import vox2out_vox
from scipy.ndimage import affine_transform, map_coordinates

from swift.data.store.spaces import OWN, box_affine
from swift.utils.errors import BadScan


@dataclass(frozen=True)
class GridPlan:
    """Where the target grid lies."""

    grid: tuple[int, int, int]
    spacing: float
    affine: np.ndarray
    """(4, 4) target voxel to world mm: spacing on the diagonal, RAS+."""
    to_source: np.ndarray
    """(4, 4) target voxel to source voxel."""
    outside: float
    """Part of the source's brain voxels that lies outside the target grid."""


def plan_grid(
    brain: np.ndarray, affine: np.ndarray, grid: tuple[int, int, int], spacing: float, placement: str = OWN
) -> GridPlan:
    """Lay the target grid: in a template's fixed box, or around the middle of the brain's bounding box.

    In a template's box a voxel is the same place of the world in every scan. Around a brain's own mask the grid's voxel
    centres coincide with those of the isotropic grid that spans the source (nibabel's vox2out_vox), so a source that
    has the wanted spacing already is only shifted by whole voxels: its values are not touched.

    Args:
        brain: (X, Y, Z) bool of the source.
        affine: (4, 4) source voxel to world mm.
        grid: Target voxels x, y, z.
        spacing: Target voxel size, mm.
        placement: Name of a template's box, or OWN.

    Returns:
        The plan; the planning itself reads no voxel of the scan.
    """
    if placement != OWN:
        target = box_affine(placement, grid, spacing)
        to_target = np.linalg.inv(target) @ affine
        places = np.argwhere(brain) @ to_target[:3, :3].T + to_target[:3, 3]
        inside = ((places > -0.5) & (places < np.asarray(grid) - 0.5)).all(axis=1)
        to_source = np.round(np.linalg.inv(affine) @ target, 7)
        return GridPlan(grid, float(spacing), target, to_source, float(1 - inside.mean()))
    _, full = vox2out_vox((brain.shape, affine), voxel_sizes=(spacing,) * 3)
    source_to_full = np.linalg.inv(full) @ affine
    places = np.argwhere(brain) @ source_to_full[:3, :3].T + source_to_full[:3, 3]
    size = np.asarray(grid)
    middle = (places.min(axis=0) + places.max(axis=0)) / 2
    start = np.floor(np.round(middle - (size - 1) / 2, 6) + 0.5)
    inside = ((places > start - 0.5) & (places < start + size - 0.5)).all(axis=1)
    shift = np.eye(4)
    shift[:3, 3] = start
    target = full @ shift
    # Rounding makes whole-voxel shifts exact: 1e-7 of a voxel is no error, but it would blur every value a little.
    to_source = np.round(np.linalg.inv(affine) @ target, 7)
    return GridPlan(grid, float(spacing), target, to_source, float(1 - inside.mean()))


class Sampler:
    """Takes the in-brain voxels of the target grid out of source frames by trilinear interpolation (scipy).

    Source voxels that cannot be used (NaN, flat, beyond the field of view) take no part: the weights of the others are
    scaled up, and a target voxel that gets less than half of its weight from good voxels is left out of the mask.
    """

    def __init__(self, plan: GridPlan, brain: np.ndarray, good: np.ndarray, name: str) -> None:
        """Compute the target mask.

        Args:
            plan: From plan_grid.
            brain: (X, Y, Z) bool of the source.
            good: (X, Y, Z) bool of the source.
            name: The scan, for messages.

        Raises:
            BadScan: no brain voxel is left.
        """
        matrix = plan.to_source[:3, :3]
        # A diagonal matrix as a vector takes scipy's separable, faster path.
        linear = np.diag(matrix).copy() if np.count_nonzero(matrix - np.diag(np.diag(matrix))) == 0 else matrix

        def resampled(volume: np.ndarray) -> np.ndarray:
            return np.asarray(
                affine_transform(
                    volume.astype(np.float32), linear, plan.to_source[:3, 3], plan.grid, order=1, mode="grid-constant"
                )
            )

        weight = resampled(good)
        self.mask: np.ndarray = (resampled(brain) >= 0.5) & (weight >= 0.5)
        """(X, Y, Z) bool of the target grid."""
        if not self.mask.any():
            raise BadScan(f"{name}: no usable brain voxel inside the {plan.grid} grid of {plan.spacing:g} mm")
        self._bad = None if good.all() else ~good
        self._gain = (1.0 / weight[self.mask]).astype(np.float32)
        places = np.argwhere(self.mask) @ matrix.T + plan.to_source[:3, 3]
        self._places = np.ascontiguousarray(np.round(places, 6).T)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Values of one frame.

        Args:
            frame: (X, Y, Z) float32 of the source.

        Returns:
            (V,) float32, in C order of the True cells of `mask`.
        """
        if self._bad is not None:
            frame = np.where(self._bad, np.float32(0), frame)
        values = map_coordinates(frame, self._places, output=np.float32, order=1, mode="grid-constant")
        return np.asarray(values) * self._gain

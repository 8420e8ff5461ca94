"""First pass over a scan (what is NaN, flat, the mean image) and its brain mask, given or computed.

Legend: X Y Z voxels of the scan as read (RAS+), T frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from swift.data.ingest.nifti import plan_volume, read_volume
from swift.utils.errors import BadScan

GRID_TOLERANCE_MM = 0.1
"""Largest distance between the same corner of a scan and of its mask."""
SMALLEST_BRAIN = 8
"""Voxels below which a mask is no brain."""
CENTRED = 0.5
"""A series is centred whose brightest voxels have a mean below this part of their own range over time."""


@dataclass(frozen=True)
class Survey:
    """What one pass over the frames found. Arrays are (X, Y, Z)."""

    mean: np.ndarray
    """float32, over the finite values; 0 where there are none."""
    nan: np.ndarray
    """bool, a value that is not finite in some frame."""
    flat: np.ndarray
    """bool, finite and the same value in every frame."""
    frames: int
    flat_frames: int
    """Frames that hold one single value."""
    span: np.ndarray
    """float32, largest less smallest finite value over time; 0 where there is none."""

    @property
    def good(self) -> np.ndarray:
        """bool, voxels whose every value can be used."""
        return ~(self.nan | self.flat)

    @property
    def centred(self) -> bool:
        """Whether the mean of a voxel tells nothing, as in residuals and z-scores: it is small beside the changes.

        Of BOLD as scanned the mean of a brain voxel is many times its range over time.
        """
        moving = self.span > 0
        if not moving.any():
            return False
        mean, span = np.abs(self.mean[moving]), self.span[moving]
        bright = mean >= np.quantile(mean, 0.8)
        return bool(np.median(mean[bright] / span[bright]) < CENTRED)


def survey(frames: Iterable[np.ndarray], name: str) -> Survey:
    """Run once over the frames of a scan, holding six volumes at most.

    Args:
        frames: float32 (X, Y, Z) each.
        name: The scan, for messages.

    Raises:
        BadScan: fewer than 2 frames, or some frame has no finite value.
    """
    total = low = high = nan = None
    count = flat_frames = 0
    empty: list[int] = []
    for index, frame in enumerate(frames):
        finite = np.isfinite(frame)
        if total is None or low is None or high is None or nan is None:
            total = np.zeros(frame.shape, dtype=np.float64)
            low, high = np.full(frame.shape, np.inf, np.float32), np.full(frame.shape, -np.inf, np.float32)
            nan = np.zeros(frame.shape, dtype=bool)
        if not finite.all():
            nan |= ~finite
            if not finite.any():
                empty.append(index)
            frame = np.where(finite, frame, np.float32(np.nan))
        total += np.nan_to_num(frame, nan=0.0)
        np.fmin(low, frame, out=low)
        np.fmax(high, frame, out=high)
        flat_frames += int(np.nanmin(frame) == np.nanmax(frame)) if finite.any() else 0
        count += 1
    if total is None or low is None or high is None or nan is None or count < 2:
        raise BadScan(f"{name}: {count} frame{'s' if count != 1 else ''}; a scan has at least 2")
    if empty:
        raise BadScan(f"{name}: frames without a finite value: {_listed(empty)} of {count}")
    mean = (total / count).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # voxels without a finite value
        span = np.where(high > low, high - low, np.float32(0))
    flat = (low == high) & ~nan
    return Survey(mean=mean, nan=nan, flat=flat, frames=count, flat_frames=flat_frames, span=span)


def _listed(numbers: list[int], most: int = 8) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return f"{shown} and {len(numbers) - most} more" if len(numbers) > most else shown


def read_mask(path: Path, shape: tuple[int, int, int], affine: np.ndarray, name: str) -> np.ndarray:
    """A given brain mask, checked to lie on the scan's own grid.

    Args:
        path: NIfTI of one volume; voxels above 0.5 are brain.
        shape: (X, Y, Z) of the scan, RAS+.
        affine: (4, 4) of the scan, RAS+.
        name: The scan, for messages.

    Returns:
        (X, Y, Z) bool.

    Raises:
        BadScan: the mask cannot be read, is empty, or lies on another grid.
    """
    plan = plan_volume(path)
    if plan.shape != shape:
        raise BadScan(f"{name}: mask {path.name} is of another grid: {plan.shape} voxels, the scan has {shape}")
    ends = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    apart = float(np.linalg.norm((ends @ (plan.affine - affine).T)[:, :3], axis=1).max())
    if apart > GRID_TOLERANCE_MM:
        raise BadScan(
            f"{name}: mask {path.name} is of another grid: same shape, but its corners lie {apart:.1f} mm apart"
        )
    mask = np.nan_to_num(read_volume(plan)) > 0.5
    if mask.sum() < SMALLEST_BRAIN:
        raise BadScan(f"{name}: mask {path.name} is empty ({int(mask.sum())} voxels above 0.5)")
    return mask


def changing_voxels(seen: Survey, name: str) -> np.ndarray:
    """The voxels that change over time, as the brain of a series that is centred and 0 outside.

    Args:
        seen: Of the scan.
        name: The scan, for messages.

    Returns:
        (X, Y, Z) bool.

    Raises:
        BadScan: the background changes too, or nothing does.
    """
    changing = ~seen.flat
    shell = np.ones(changing.shape, bool)
    shell[1:-1, 1:-1, 1:-1] = False
    if changing[shell].mean() > 0.5:
        raise BadScan(
            f"{name}: no brain mask given and none can be computed: values are centred (mean near 0) and the "
            "background changes too; give a mask"
        )
    if changing.sum() < SMALLEST_BRAIN:
        raise BadScan(f"{name}: no brain mask given, and {int(changing.sum())} voxels change over time; give a mask")
    return changing


def compute_mask(mean: np.ndarray, affine: np.ndarray, name: str) -> np.ndarray:
    """A brain mask from the mean image by nilearn's histogram method (compute_epi_mask).

    Args:
        mean: (X, Y, Z) float32.
        affine: (4, 4).
        name: The scan, for messages.

    Returns:
        (X, Y, Z) bool.

    Raises:
        BadScan: no brain is found; the message asks for a mask.
    """
    # Imported here: scikit-learn behind it takes a second.
    from nilearn.masking import compute_epi_mask

    zeros = float((mean == 0).mean())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nilearn warns of an empty mask; we raise for it below
            found = compute_epi_mask(nib.Nifti1Image(mean, affine), exclude_zeros=zeros > 0.2, opening=2)
            mask = np.asarray(found.dataobj) > 0
    except (ValueError, IndexError) as error:
        raise BadScan(
            f"{name}: no brain mask given and none could be computed ({' '.join(str(error).split())})"
        ) from error
    if mask.sum() < SMALLEST_BRAIN:
        raise BadScan(f"{name}: no brain mask given and the computed one is empty; give a mask")
    return mask

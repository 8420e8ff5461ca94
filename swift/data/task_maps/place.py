"""One subject's maps brought to the grid of the store, as ingestion brings scans there.

Legend: K contrasts, X Y Z voxels of the file (RAS+), V voxels of the store's grid that have a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swift.data.ingest.nifti import Volumes, plan_volume, read_volume, strip_suffix
from swift.data.ingest.place import Sampler, plan_grid
from swift.data.store.spaces import MNI_CODE, placement_of
from swift.utils.errors import BadScan

LEAST_COVERED = 0.5
"""Part of the subject's brain that its map must cover."""
Key = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True)
class PlacedMap:
    """Attributes:
    values: (K, V) float32.
    index: (V,) int32 flat places in the store's grid, ascending.
    affine: (4, 4) of the files, RAS+, voxel to mm.
    shape: Voxels of the files, RAS+.
    ornt: (3, 2) turns the files' own voxel order into RAS+.
    """

    values: np.ndarray
    index: np.ndarray
    affine: np.ndarray
    shape: tuple[int, ...]
    ornt: np.ndarray


def grid_key(plan: Volumes) -> Key:
    """What must be alike in all maps of a task: shape and affine (to a hundredth of a mm)."""
    return tuple(plan.shape), tuple(np.round(plan.affine, 2).ravel().tolist())


def plan_maps(files: Mapping[str, Path], space: str | None, placement: str) -> list[Volumes]:
    """Read the headers of a subject's maps, one a contrast.

    Args:
        files: Contrast -> file.
        space: As told in the settings, where files do not say it.
        placement: Where the store's grid lies.

    Raises:
        BadScan: not readable, or of another space than the store.
    """
    plans = []
    for file in files.values():
        plan = plan_volume(file)
        said = next((part[6:] for part in strip_suffix(file).split("_") if part.startswith("space-")), None)
        named = said or (space or ("MNI" if plan.code == MNI_CODE else ""))
        if not named:
            raise BadScan(f"{file.name}: neither name nor header say its space; name it with task.target.space=")
        if placement_of(named) != placement:
            raise BadScan(f"{file.name}: is in the space {named}, and the scans of the store lie in {placement}")
        plans.append(plan)
    if len({grid_key(plan) for plan in plans}) > 1:
        raise BadScan(f"{', '.join(plan.path.name for plan in plans)}: contrasts of one subject on different grids")
    return plans


def usual_grid(plans: Sequence[Volumes]) -> Key:
    """Shape and affine of most maps."""
    return Counter(map(grid_key, plans)).most_common(1)[0][0]


def place_map(
    plans: Sequence[Volumes], brain: np.ndarray, grid: tuple[int, int, int], spacing: float, placement: str
) -> PlacedMap:
    """Read a subject's maps and interpolate them once. Voxels that are NaN, or 0 in all contrasts, have no value.

    Args:
        plans: One a contrast, on one grid.
        brain: (X, Y, Z) bool on the store's grid: nothing outside is kept.
        grid: Of the store.
        spacing: Of the store, mm.
        placement: Of the store: the name of a template's box.

    Raises:
        BadScan: no finite value, a constant map, or one that covers less than half of the brain.
    """
    name = plans[0].path.name
    volumes = [read_volume(plan) for plan in plans]
    good = np.isfinite(volumes).all(0) & (np.asarray(volumes) != 0).any(0)
    if not good.any():
        raise BadScan(f"{name}: holds nothing but NaN and 0")
    for plan, volume in zip(plans, volumes, strict=True):
        if np.ptp(volume[good]) == 0:
            raise BadScan(f"{plan.path.name}: constant, {volume[good][0]:g} in all {int(good.sum())} voxels")
    sampler = Sampler(plan_grid(good, plans[0].affine, grid, spacing, placement), good, good, name)
    values = np.stack([sampler(volume) for volume in volumes])
    inside = brain[sampler.mask]
    covered = inside.sum() / brain.sum()
    if covered < LEAST_COVERED:
        raise BadScan(f"{name}: covers {covered:.0%} of the subject's brain: another space, or a part of the brain")
    index = np.flatnonzero(sampler.mask & brain).astype(np.int32)
    return PlacedMap(values[:, inside], index, plans[0].affine, tuple(plans[0].shape), plans[0].ornt)

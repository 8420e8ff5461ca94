"""Is it a head, and is all of it there? What the size and the place of a brain mask say about a scan's header.

A header that says 1 mm for a scan of 4 mm makes a brain of 30 ml; nothing later would notice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swift.utils.errors import BadScan

USUAL_LITRES = (0.5, 2.5)
"""Brain volumes outside are said: newborns have 0.4, the largest adults 1.9, masks are generous."""
POSSIBLE_LITRES = (0.05, 5.0)
"""Scans outside are left out, unless --any-size says that it is meant."""
MOST_CUT = 0.10
"""Part of a brain that may lie outside the grid, or hold no data; beyond, it has to be meant (--cropped)."""


@dataclass(frozen=True)
class Meant:
    """What the user says is meant."""

    any_size: bool = False
    cropped: bool = False


def check_head(
    name: str, brain: np.ndarray, affine: np.ndarray, no_data: np.ndarray, outside: float, grid: str, meant: Meant
) -> list[str]:
    """Refuse what cannot be a whole head; say what is unusual.

    Args:
        name: The scan, for messages.
        brain: (X, Y, Z) bool of the source.
        affine: (4, 4) of the source.
        no_data: (X, Y, Z) bool: brain voxels without values, as beyond the edge of what was scanned.
        outside: Part of the brain outside the target grid.
        grid: The target grid, for messages.
        meant: What is not refused.

    Returns:
        Sentences for the notes.

    Raises:
        BadScan: volume, or part that is cut off, beyond the limits.
    """
    notes = []
    voxels = int(brain.sum())
    litres = voxels * abs(float(np.linalg.det(affine[:3, :3]))) / 1e6
    size = " x ".join(f"{value:.3g}" for value in np.linalg.norm(affine[:3, :3], axis=0))
    said = f"brain of {litres:.3g} litres ({voxels} voxels of {size} mm)"
    if not POSSIBLE_LITRES[0] <= litres <= POSSIBLE_LITRES[1] and not meant.any_size:
        raise BadScan(
            f"{name}: {said}: no head ({POSSIBLE_LITRES[0]} to {POSSIBLE_LITRES[1]:g} litres); is the voxel size of "
            "the header right? --any-size if it is meant"
        )
    if not USUAL_LITRES[0] <= litres <= USUAL_LITRES[1]:
        notes.append(
            f"{said}, unusual ({USUAL_LITRES[0]} to {USUAL_LITRES[1]}): is the voxel size of the header right?"
        )
    empty = float((no_data & brain).sum()) / voxels
    for share, where, option in (
        (outside, f"outside the {grid}", "a larger --grid, or --cropped if it is meant"),
        (empty, "where the scan has no data (its field of view is too small)", "--cropped if it is meant"),
    ):
        if share > MOST_CUT and not meant.cropped:
            raise BadScan(f"{name}: {100 * share:.3g} % of the brain lies {where}; {option}")
        if share > 0:
            notes.append(f"{100 * share:.2g} % of the brain lies {where}")
    edge = edge_share(brain)
    if edge > 0:
        notes.append(
            f"the brain mask is cut by the edge of the field of view: {100 * edge:.2g} % of it lies on the edge"
        )
    return notes


_TOLD = tuple(
    re.compile(rf"([0-9.e+-]+) % of {what}")
    for what in (r"the brain lies outside the", r"the brain lies where the scan has no data", r"it lies on the edge")
)


def shares_told(notes: Sequence[str]) -> tuple[float, float, float]:
    """What `check_head` said in a scan's notes.

    Returns:
        Parts of the brain outside the grid, without data, and of the mask on the edge of the scan; 0 where not said.
    """
    found = [next((match for note in notes if (match := told.search(note))), None) for told in _TOLD]
    outside, empty, edge = (float(match[1]) / 100 if match else 0.0 for match in found)
    return outside, empty, edge


def edge_share(brain: np.ndarray) -> float:
    """Part of a mask (X, Y, Z) bool that lies in the outermost planes of the volume."""
    inner = brain[1:-1, 1:-1, 1:-1].sum()
    return float(1 - inner / max(1, brain.sum()))

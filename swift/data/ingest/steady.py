"""Frames at the start of a series that are no steady state: which are dropped, and which look as if they should be.

Before the magnetisation has settled the first frames are brighter. fMRIPrep keeps them and only flags them
(`non_steady_state_outlier00`, ... in the confounds: https://fmriprep.org/en/stable/outputs.html). Two such frames in a
scan of 200 make the standard deviation of every voxel, and so the scale of its z-scores, four times too large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swift.utils.errors import BadScan

FLAG = "non_steady_state_outlier"
LOOKED_AT = 6
"""Frames at the start that are looked at; a scanner settles within about 10 s."""
DEVIATIONS = 6.0
"""A frame stands out whose brain mean is so many robust standard deviations from the median of the later frames."""
SHARE = 0.01
"""... and by so large a part of the median."""


def frames_to_drop(flags: dict[str, np.ndarray], first: int, frames: int, name: str) -> tuple[int, list[str]]:
    """How many frames at the start to leave out, and what to say.

    Args:
        flags: Columns of the confounds whose names begin with FLAG, (T,) each, 1 at the flagged frame.
        first: Frames to drop in any case (--drop-first).
        frames: T.
        name: The scan, for messages.

    Raises:
        BadScan: fewer than 2 frames would be left.
    """
    flagged = sorted({int(t) for column in flags.values() for t in np.flatnonzero(np.nan_to_num(column) > 0.5)})
    lead = 0
    while lead in flagged:
        lead += 1
    dropped, notes = max(lead, first), []
    if lead:
        notes.append(f"{lead} frames at the start are flagged as no steady state ({FLAG}*): dropped")
    if first > lead:
        notes.append(f"{first} frames at the start dropped (--drop-first)")
    later = [t for t in flagged if t >= dropped]
    if later:
        notes.append(f"frames {', '.join(map(str, later[:8]))} are flagged as no steady state, not at the start: kept")
    if frames - dropped < 2:
        raise BadScan(f"{name}: {frames - dropped} of {frames} frames are left after {dropped} are dropped")
    return dropped, notes


def standing_out(level: Sequence[float] | np.ndarray) -> list[int]:
    """Frames at the start whose brain mean is not that of the later ones.

    Args:
        level: (T,) mean over the brain, of each kept frame.

    Returns:
        Their places from 0 on without a gap; empty for series too short to tell.
    """
    level = np.asarray(level, np.float64)
    if len(level) < 3 * LOOKED_AT:
        return []
    later = level[LOOKED_AT:]
    middle = float(np.median(later))
    spread = 1.4826 * float(np.median(np.abs(later - middle)))
    far = np.abs(level[:LOOKED_AT] - middle) > max(DEVIATIONS * spread, SHARE * abs(middle))
    return list(range(int(np.argmin(far)) if not far.all() else LOOKED_AT))

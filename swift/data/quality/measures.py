"""Figures of a scan's quality, from the store alone, and what stands out among the scans of a store.

Legend: T frames, V in-brain voxels, n of them sampled for the carpet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from swift.data.ingest.head import shares_told
from swift.data.store.reader import Store

CARPET_VOXELS = 1500
BLOCK = 32
"""Frames that are read at once."""
HEAD_RADIUS = 50.0
"""mm; turns become ways on a sphere of this radius (Power et al. 2012, doi 10.1016/j.neuroimage.2011.10.018)."""
MOVES = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
"""fMRIPrep's names: mm and radians."""
HIGH_MOTION = 0.5
"""mm of mean framewise displacement that is marked in any store."""
FAR = 3.5
"""Modified z-score beyond which a scan is an outlier among the others (Iglewicz and Hoaglin 1993)."""
ENOUGH = 6
"""Scans of which an outlier can be told."""
CENTRED = 0.1
"""A scan whose mean is below this part of its standard deviation was centred before: it has no tSNR."""


@dataclass
class Courses:
    """What is drawn over time.

    carpet: (T, n) float32 z-scores of voxels spread evenly over the brain; change: (T,) root mean square change of them
    from the frame before (0 first); displacement: (T,) mm, NaN where not known, or None; place: (n,) of V.
    """

    carpet: np.ndarray
    change: np.ndarray
    displacement: np.ndarray | None
    place: np.ndarray


@dataclass
class Measures:
    """One scan's line of the table; None: cannot be known."""

    scan_id: str
    subject: str
    frames: int
    voxels: int
    tr: float
    source: str = ""
    source_sha256: str = ""
    tsnr: float | None = None
    """Median over voxels of mean / standard deviation over time."""
    displacement: float | None = None
    """Mean framewise displacement, mm."""
    in_grid: float = 1.0
    """Part of the brain that lies in the grid and has data."""
    on_edge: float = 0.0
    """Part of the brain mask on the edge of what was scanned."""
    outliers: float | None = None
    """Part of the frames whose change is above the third quartile + 1.5 interquartile ranges."""
    mean_change: float | None = None
    largest_change: float | None = None
    problem: str = ""
    """Why it could not be read."""
    marks: list[str] = field(default_factory=list)


def courses(store: Store, scan: int) -> Courses:
    """Read every frame once, each compared with its checksum.

    Raises:
        CorruptData: bytes differ from their checksum.
    """
    info = store.scans[scan]
    place = np.unique(np.linspace(0, info.voxels - 1, min(CARPET_VOXELS, info.voxels)).astype(int))
    a, b = store.normalizer(scan, "zscore_voxel")
    carpet = np.empty((info.frames, len(place)), np.float32)
    for start in range(0, info.frames, BLOCK):
        stop = min(start + BLOCK, info.frames)
        carpet[start:stop] = store.read(scan, start, stop, verify=True)[:, place] * a[place] + b[place]
    change = np.zeros(info.frames)
    change[1:] = np.sqrt((np.diff(carpet, axis=0) ** 2).mean(axis=1))
    return Courses(carpet, change, displacement_of(store.confounds(scan)), place)


def displacement_of(confounds: dict[str, np.ndarray]) -> np.ndarray | None:
    """(T,) framewise displacement, mm: as it was kept, else from the six movements (Power et al. 2012); else None."""
    if "framewise_displacement" in confounds:
        return np.asarray(confounds["framewise_displacement"], np.float64)
    if not all(name in confounds for name in MOVES):
        return None
    moves = np.stack([confounds[name] for name in MOVES], axis=1).astype(np.float64)
    moves[:, 3:] *= HEAD_RADIUS
    return np.concatenate([[np.nan], np.abs(np.diff(moves, axis=0)).sum(axis=1)])


def outlier_frames(change: np.ndarray) -> np.ndarray:
    """(T,) bool: frames that differ too much from the one before, by the box plot rule (as FSL fsl_motion_outliers)."""
    if len(change) < 3:
        return np.zeros(len(change), bool)
    first, third = np.quantile(change[1:], [0.25, 0.75])
    found = change > third + 1.5 * (third - first)
    found[0] = False
    return np.asarray(found)


def measure(store: Store, scan: int, course: Courses) -> Measures:
    """The line of one scan."""
    info, attributes = store.scans[scan], store.attributes(scan)
    outside, empty, edge = shares_told(json.loads(attributes["notes"]))
    known = None if course.displacement is None else course.displacement[np.isfinite(course.displacement)]
    later = course.change[1:]
    return Measures(
        info.scan_id,
        info.subject,
        info.frames,
        info.voxels,
        info.tr,
        source=str(attributes["source"]),
        source_sha256=str(attributes["source_sha256"]),
        tsnr=None if centred(store, scan) else float(np.median(tsnr_map(store, scan))),
        displacement=float(known.mean()) if known is not None and len(known) else None,
        in_grid=max(0.0, 1 - outside - empty),
        on_edge=edge,
        outliers=float(outlier_frames(course.change).mean()) if info.frames > 2 else None,
        mean_change=float(later.mean()) if len(later) else None,
        largest_change=float(later.max()) if len(later) else None,
    )


def centred(store: Store, scan: int) -> bool:
    """Whether the values have no baseline, so that mean / standard deviation says nothing."""
    attributes = store.attributes(scan)
    return float(attributes["global_mean"]) < CENTRED * float(attributes["global_std"])


def tsnr_map(store: Store, scan: int) -> np.ndarray:
    """(V,) mean / standard deviation over time; 0 where a voxel is constant."""
    mean, std = store.array(scan, "stats/mean"), store.array(scan, "stats/std")
    return np.divide(mean, std, out=np.zeros_like(mean), where=std > 0)


# ---------------------------------------------------------------------------------------------------- what stands out
def far_out(values: Sequence[float | None]) -> np.ndarray:
    """Modified z-scores 0.6745 (x - median) / MAD; 0 where unknown, of few scans, or without any spread."""
    known = np.array([np.nan if value is None else value for value in values], np.float64)
    good = np.isfinite(known)
    if good.sum() < ENOUGH:
        return np.zeros(len(known))
    middle = np.median(known[good])
    spread = np.median(np.abs(known[good] - middle))
    if spread == 0:
        return np.zeros(len(known))
    return np.where(good, 0.6745 * (np.where(good, known, middle) - middle) / spread, 0.0)


def usual_tr(rows: Sequence[Measures]) -> float | None:
    """The TR that more than half of the scans have (to 1 in 1000), or None."""
    (tr, count), *_ = Counter(float(f"{row.tr:.3g}") for row in rows).most_common(1)
    return tr if 2 * count > len(rows) else None


def mark(rows: Sequence[Measures]) -> None:
    """Put what stands out into each line's `marks`, in words."""
    same: dict[str, list[str]] = {}
    for row in rows:
        if row.source_sha256:
            same.setdefault(row.source_sha256, []).append(row.scan_id)
    usual, frames = usual_tr(rows), float(np.median([row.frames for row in rows]))
    tsnr = far_out([row.tsnr for row in rows])
    moved = far_out([row.displacement for row in rows])
    jumped = far_out([row.outliers for row in rows])
    for place, row in enumerate(rows):
        marks = [f"not readable: {row.problem}"] if row.problem else []
        others = [name for name in same.get(row.source_sha256, []) if name != row.scan_id]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            marks.append(f"same file as {others[0]}{more}")
        if usual is not None and abs(row.tr - usual) > 0.005 * usual:
            marks.append(f"TR {row.tr:g} s, most have {usual:g} s")
        if row.in_grid < 0.999:
            marks.append(f"cropped: {100 * row.in_grid:.3g} % of the brain in the grid")
        if row.on_edge > 0:
            marks.append(f"cropped: {100 * row.on_edge:.2g} % of the mask on the edge of the scan")
        if row.frames < frames / 2 and len(rows) > 2:
            marks.append(f"short: {row.frames} frames, the median is {frames:g}")
        if tsnr[place] < -FAR:
            marks.append(f"low tSNR: {row.tsnr:.3g}")
        high = row.displacement is not None and row.displacement > HIGH_MOTION
        if high or moved[place] > FAR:
            marks.append(f"motion: {row.displacement:.2g} mm")
        if jumped[place] > FAR and row.outliers is not None:
            marks.append(f"signal outliers: {100 * row.outliers:.2g} % of the frames")
        row.marks = marks

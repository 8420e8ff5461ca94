"""Repetition time: found, checked and corrected; a scan brought to another one.

Legend: T frames, V in-brain voxels.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import make_interp_spline
from scipy.signal import butter, sosfiltfilt

from swift.utils.errors import BadScan

TR_SECONDS = (0.05, 30.0)
TR_MILLISECONDS = (100.0, 30000.0)
BLOCK = 4096
"""Voxels resampled together, so that float64 copies stay small."""


def resolve_tr(
    name: str, raw: float, unit: int, option: float | None = None, sidecar: float | None = None
) -> tuple[float, list[str]]:
    """Seconds between frames from, in this order, the user's option, the JSON sidecar and the header.

    Args:
        name: The file, for messages.
        raw: The header's fourth voxel size.
        unit: The header's code for it: 8 s, 16 ms, 24 us, 0 unknown.
        option: Seconds, as told by the user.
        sidecar: RepetitionTime of the JSON sidecar, seconds.

    Returns:
        The TR in seconds and the sentences that say what was corrected.

    Raises:
        BadScan: no usable value anywhere.
    """
    notes: list[str] = []
    from_header, header_note = _header_seconds(raw, unit)
    if option is not None:
        if not TR_SECONDS[0] <= option <= TR_SECONDS[1]:
            raise BadScan(f"{name}: --tr {option:g} is not between {TR_SECONDS[0]} and {TR_SECONDS[1]} seconds")
        return option, [f"TR {option:g} s given by option"]
    if sidecar is not None:
        seconds, note = _header_seconds(float(sidecar), 8)
        if seconds is None:
            raise BadScan(f"{name}: RepetitionTime {sidecar:g} in the JSON sidecar is no TR in seconds; give --tr")
        notes += [f"JSON sidecar: {note}"] if note else []
        if from_header is not None and abs(from_header - seconds) > 0.01 * seconds:
            notes.append(f"TR {seconds:g} s of the JSON sidecar used; the header says {from_header:g} s")
        return seconds, notes
    if from_header is None:
        raise BadScan(
            f"{name}: TR missing (header says {raw:g}, no RepetitionTime in a JSON sidecar); give --tr SECONDS"
        )
    return from_header, [header_note] if header_note else []


def _header_seconds(raw: float, unit: int) -> tuple[float | None, str]:
    """A header's TR in seconds (None: unusable) and what was corrected; unit as in NIfTI (8 s, 16 ms, 24 us)."""
    if not np.isfinite(raw) or raw <= 0:
        return None, ""
    name, factor = {16: ("msec", 1e-3), 24: ("usec", 1e-6)}.get(unit, ("sec" if unit == 8 else "no unit", 1.0))
    seconds = raw * factor
    if TR_SECONDS[0] <= seconds <= TR_SECONDS[1]:
        if unit not in (8, 16, 24):
            lost = " (1 without a unit is what tools write that lose the TR)" if raw == 1.0 else ""
            return round(
                seconds, 6
            ), f"TR {raw:g} without a time unit in the header: seconds assumed{lost}; else give --tr"
        return round(seconds, 6), f"TR {raw:g} {name} read as {seconds:g} s" if factor != 1.0 else ""
    if factor == 1.0 and TR_MILLISECONDS[0] <= raw <= TR_MILLISECONDS[1]:
        return round(
            raw / 1000, 6
        ), f"TR corrected: header says {raw:g} with {name}, read as milliseconds, {raw / 1000:g} s"
    if factor != 1.0 and TR_SECONDS[0] <= raw <= TR_SECONDS[1]:
        return round(raw, 6), f"TR corrected: header says {raw:g} {name}, read as {raw:g} s"
    return None, ""


def resample_tr(bold: np.ndarray, tr: float, new_tr: float) -> np.ndarray:
    """Bring a scan to another repetition time by cubic splines.

    A longer TR is preceded by a zero-phase low-pass (Butterworth, order 4) at 0.9 of the new Nyquist frequency, so that
    fast fluctuations do not fold into slow ones.

    Args:
        bold: (T, V) float32, frame i taken at i * tr.
        tr: Seconds between frames.
        new_tr: Wanted seconds between frames.

    Returns:
        (T', V) float32 with T' = floor((T - 1) * tr / new_tr) + 1, frame i at i * new_tr.

    Raises:
        BadScan: fewer than 4 frames, or fewer than 2 after resampling.
    """
    frames, voxels = bold.shape
    count = int(np.floor((frames - 1) * tr / new_tr + 1e-9)) + 1
    if frames < 4 or count < 2:
        raise BadScan(
            f"{frames} frames of TR {tr:g} s cannot be brought to TR {new_tr:g} s ({count} frames would be left)"
        )
    old, new = np.arange(frames) * tr, np.arange(count) * new_tr
    ratio = tr / new_tr  # the new Nyquist frequency as a part of the old one
    sos = butter(4, 0.9 * ratio, output="sos") if ratio < 0.9 else None
    out = np.empty((count, voxels), dtype=np.float32)
    for start in range(0, voxels, BLOCK):
        block = bold[:, start : start + BLOCK].astype(np.float64)
        if sos is not None:
            block = sosfiltfilt(sos, block, axis=0, padlen=min(27, frames - 1))
        out[:, start : start + BLOCK] = make_interp_spline(old, block, k=3)(np.minimum(new, old[-1]))
    return out

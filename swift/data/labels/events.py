"""Labels of frames from an events.tsv, as BIDS defines it.

Onsets are seconds from the first volume that was acquired, negative ones included. Frame k stands for start + k TR:
start is the StartTime of slice-timing correction plus the time of frames that ingestion has dropped.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from swift.config.check_target import class_names
from swift.config.schema import TargetConfig
from swift.data.labels.columns import NOT_KNOWN, encode, listed, number
from swift.data.store.format import ScanInfo
from swift.utils.errors import BadScan

REST = "rest"
"""The class of frames without an event."""
HRF_SECONDS = 32.0
"""Length of nilearn's canonical response: an event that ended longer ago no longer shows."""
TICKS = 6
"""Decimals of a second that times are compared with: 3 * 0.7 is not below 2.1."""


class Event(NamedTuple):
    """One line of an events.tsv: seconds from the first volume, and the text of the column asked for.

    `end` is NaN where the duration is not known; it equals `onset` for an impulse.
    """

    line: int
    onset: float
    end: float
    text: str


@dataclass
class Unused:
    """Lines of the events of a scan that label no frame."""

    outside: list[int] = field(default_factory=list)
    """Before the scan or after its end."""
    unknown: list[int] = field(default_factory=list)
    """Of unknown duration: the frames from their onset to the next event have no label."""


def read_events(text: str, info: ScanInfo, column: str | None) -> list[Event]:
    """The events of a scan in order of time.

    Raises:
        BadScan: no such columns, an onset or a duration that is no number; names the lines.
    """
    reader = csv.DictReader(io.StringIO(text), delimiter="\t")
    there = reader.fieldnames or []
    where = f"events of scan {info.scan_id}"
    for name in ("onset", "duration", *([column] if column else [])):
        if name not in there:
            raise BadScan(f"{where}: no column {name}; there are {', '.join(there) or 'none'}")
    events, wrong = [], []
    for line, row in enumerate(reader, start=2):
        onset = number(row["onset"] or "")
        # Not known is not 0: a duration of 0 is an impulse.
        duration = math.nan if (row["duration"] or "").strip() in NOT_KNOWN else number(row["duration"])
        if onset is None or duration is None or duration < 0:
            wrong.append(f"line {line}")
        else:
            events.append(Event(line, onset, onset + duration, (row[column] or "") if column else ""))
    if wrong:
        raise BadScan(f"{where}: onset or duration is no number of seconds in {listed(wrong)}")
    return sorted(events, key=lambda event: (event.onset, event.line))


def frame_times(info: ScanInfo, start: float) -> np.ndarray:
    """(T,) seconds from the first acquired volume that the frames of a scan stand for."""
    return np.round(start + np.arange(info.frames) * info.tr, TICKS)


def label_frames(text: str, info: ScanInfo, start: float, target: TargetConfig) -> tuple[np.ndarray, Unused]:
    """Labels of the frames of a scan, (T,) float64 with NaN for "no label", and the lines that label none.

    Args:
        text: The events.tsv.
        info: The scan.
        start: Seconds that its first frame stands for.
        target: What is asked for.

    Raises:
        BadScan: events that cannot be read, or of which none reaches into the scan; durations that response=hrf needs.
        UserError: values that are no class.
    """
    events = read_events(text, info, target.column)
    if target.column is None:
        values = np.ones(len(events))
    else:
        events = [event for event in events if event.text.strip() not in NOT_KNOWN]
        rows = [f"{info.scan_id} line {event.line}" for event in events]
        values = encode([event.text for event in events], rows, target)
    if target.response == "hrf":
        known = np.isfinite(values)
        events = [event for event, there in zip(events, known, strict=True) if there]
        found, unused = _convolved(events, values[known], frame_times(info, start), info)
    else:
        found, unused = _shifted(events, values, frame_times(info, start - target.delay_seconds), info.tr, target)
    if events and len(unused.outside) == len(events):
        first = min(events)
        raise BadScan(
            f"events of scan {info.scan_id}: all {len(events)} lie outside the scan, which ends at "
            f"{start + info.frames * info.tr:g} s ({info.frames} frames of {info.tr:g} s): line {first.line} at "
            f"{first.onset:g} s; onsets are seconds from the first volume"
        )
    return found, unused


def _shifted(
    events: Sequence[Event], values: np.ndarray, times: np.ndarray, tr: float, target: TargetConfig
) -> tuple[np.ndarray, Unused]:
    """Label of the event that goes on at each time, of several the last begun.

    An event that no time falls into (an impulse, or one shorter than the TR) labels the frame nearest to its middle.
    Before the first acquired volume nothing is known but the events that reach into it. NaN values are events that are
    no class (others=leave_out): their frames are not rest.
    """
    names = class_names(target)
    nothing = math.nan
    if target.kind != "regression" and (target.column is None or REST in names):
        nothing = 0.0 if target.column is None else float(names.index(REST))
    unused = Unused()
    out = np.full(len(times), math.nan)
    masked = times < 0
    last: dict[float, float] = {}
    for place, (event, value) in enumerate(zip(events, values.tolist(), strict=True)):
        begin, end = event.onset, event.end
        if math.isnan(end):
            unused.unknown.append(event.line)
            after = [later.onset for later in events[place + 1 :] if later.onset > begin]
            masked |= (times >= begin) & (times < (after[0] if after else math.inf))
            continue
        if value in last and 0 <= begin - last[value] <= target.bridge_seconds:
            begin = last[value]
        if math.isfinite(value):
            last[value] = max(end, last.get(value, end))
        on = (times >= round(begin, TICKS)) & (times < round(end, TICKS))
        if not on.any():
            away = np.abs(times - (event.onset + end) / 2)
            on = np.zeros(len(times), bool)
            on[int(away.argmin())] = away.min() <= tr / 2
        if not on.any():
            unused.outside.append(event.line)
        elif math.isfinite(value):
            out[on] = value
        else:
            masked |= on
    return np.where(np.isnan(out) & ~masked, nothing, out), unused


def _convolved(
    events: Sequence[Event], values: np.ndarray, times: np.ndarray, info: ScanInfo
) -> tuple[np.ndarray, Unused]:
    """Values as boxcars, convolved with Glover's response (nilearn), at the times of the frames.

    Events before the scan count as far as their response reaches into it.
    """
    from nilearn.glm.first_level import compute_regressor

    unknown = [f"line {event.line}" for event in events if math.isnan(event.end)]
    if unknown:
        raise BadScan(
            f"events of scan {info.scan_id}: task.target.response=hrf needs durations, and they are not known in "
            f"{listed(unknown)}"
        )
    unused, kept = Unused(), []
    for event, value in zip(events, values.tolist(), strict=True):
        if event.onset > times[-1] or event.end < times[0] - HRF_SECONDS:
            unused.outside.append(event.line)
        else:
            onset = max(event.onset, times[0] - HRF_SECONDS)
            kept.append((onset, event.end - onset, value))
    if not kept:
        return np.full(len(times), np.nan), unused
    condition = np.array(kept).T
    # nilearn's own default, unless an event began earlier.
    reach = min(-24.0, float(condition[0].min() - times[0]))
    regressor, _ = compute_regressor(condition, "glover", times, min_onset=reach)
    return np.asarray(regressor[:, 0], np.float64), unused

"""What a task is to predict, read from a store: one value a subject, or one a frame.

Per subject from a column of the manifest; per frame from events (with the haemodynamic delay) or from a column of the
per-frame table that the store keeps of a scan. NaN stands for "no label".
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from swift.config.schema import TargetConfig
from swift.data.clips.mixture import Stores
from swift.data.labels.subjects import NOT_KNOWN
from swift.data.store.format import ScanInfo
from swift.utils.errors import UserError

REST = "rest"
"""The class of frames without an event."""


@dataclass(frozen=True)
class Labels:
    """Labels of all scans of a store.

    Attributes:
        kind: binary | multiclass | regression.
        per: subject | frame.
        classes: Names, [] for a regression.
        values: One array a scan: (), or (T,) per frame; float64, the place of the class or the number, NaN: none.
    """

    kind: str
    per: str
    classes: list[str]
    values: list[np.ndarray]

    def known(self, scan: int, first: int, length: int) -> np.ndarray:
        """Labels of a part of a scan that are there: (1,) or (0,) per subject, (n,) per frame."""
        value = np.atleast_1d(self.values[scan])
        part = value if self.per == "subject" else value[first : first + length]
        return part[np.isfinite(part)]


def read_labels(store: Stores, target: TargetConfig) -> Labels:
    """The labels that a task asks for.

    Raises:
        UserError: no such column (the message names those there are), text where numbers are due (which rows), values
            that are no class, a subject with two values, events that cannot be read or lie outside the scan.
    """
    names = [entry.split("|")[0] for entry in target.classes]
    if target.source == "manifest":
        values = _from_manifest(store.scans, target)
    elif target.source == "confounds":
        values = [_from_confounds(store, scan, target) for scan in range(len(store.scans))]
    else:
        tables = [_events_text(store, scan, target) for scan in range(len(store.scans))]
        values = [_from_events(text, info, target) for text, info in zip(tables, store.scans, strict=True)]
    return Labels(target.kind, target.per, names, values)


# ------------------------------------------------------------------------------------------------------ one value
def _named(rows: Sequence[str]) -> str:
    return ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


def encode(texts: Sequence[str], rows: Sequence[str], target: TargetConfig) -> np.ndarray:
    """Texts of a column as places of classes, or as numbers: (n,) float64, NaN where empty or n/a.

    Args:
        texts: The column.
        rows: What to call each row in a message.
        target: Classes and kind.

    Raises:
        UserError: names the rows that are no number, or no class.
    """
    found = np.full(len(texts), np.nan)
    places = {text: place for place, entry in enumerate(target.classes) for text in entry.split("|")}
    numbers = {number: place for text, place in places.items() if (number := _number(text)) is not None}
    wrong = []
    for row, raw in enumerate(texts):
        text = raw.strip()
        if text in NOT_KNOWN:
            continue
        number = _number(text)
        value = (
            number
            if target.kind == "regression"
            else places.get(text, numbers.get(number) if number is not None else None)
        )
        if value is None and target.others == "refuse":
            wrong.append(f"{rows[row]}: {text!r}")
        elif value is not None:
            found[row] = value
    if wrong:
        what = "not a number" if target.kind == "regression" else f"none of the classes {', '.join(target.classes)}"
        hint = (
            "" if target.kind == "regression" else "; name it in task.target.classes, or task.target.others=leave_out"
        )
        raise UserError(f"task.target.column={target.column}: {what} in {len(wrong)} rows ({_named(wrong)}){hint}")
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _from_manifest(scans: Sequence[ScanInfo], target: TargetConfig) -> list[np.ndarray]:
    column = target.column or ""
    fixed = ("site", "task", "session", "run")
    there = [*sorted({name for scan in scans for name in scan.phenotypes}), *fixed]
    if column not in there:
        raise UserError(f"task.target.column={column}: the manifest has no such column; it has {', '.join(there)}")
    texts = [str(getattr(scan, column)) if column in fixed else scan.phenotypes.get(column, "") for scan in scans]
    rows = [f"{scan.scan_id} (line {line})" for line, scan in enumerate(scans, start=2)]
    values = encode(texts, rows, target)
    own: dict[str, float] = {}
    for scan, value in zip(scans, values.tolist(), strict=True):
        if math.isfinite(value) and own.setdefault(scan.subject, value) != value:
            raise UserError(f"task.target.column={column}: subject {scan.subject} has two values")
    # A scan whose own line lacks it has the label of its subject.
    return [np.array(own.get(scan.subject, math.nan)) for scan in scans]


def _from_confounds(store: Stores, scan: int, target: TargetConfig) -> np.ndarray:
    columns = store.confounds(scan)
    if target.column not in columns:
        raise UserError(
            f"task.target.column={target.column}: scan {store.scans[scan].scan_id} has no such per-frame column; it "
            f"has {', '.join(columns) or 'none'}"
        )
    values = columns[target.column].astype(np.float64)
    if target.kind == "regression":
        return values
    texts = [f"{value:g}" if math.isfinite(value) else "" for value in values]
    return encode(texts, [f"{store.scans[scan].scan_id} frame {frame}" for frame in range(len(texts))], target)


# --------------------------------------------------------------------------------------------------------- events
class Event(NamedTuple):
    """One line of an events.tsv: seconds from the first frame, and the text of the column asked for."""

    line: int
    onset: float
    end: float
    text: str


def _events_text(store: Stores, scan: int, target: TargetConfig) -> str:
    info = store.scans[scan]
    if target.events is None:
        text = store.events(scan)
        if not text:
            raise UserError(
                f"scan {info.scan_id}: the store has kept no events of it; ingest it anew, or name their folder in "
                "task.target.events"
            )
        return text
    folder = Path(target.events)
    if not folder.is_dir():
        raise UserError(f"task.target.events={target.events}: no such folder")
    mine = set(info.scan_id.split("_"))
    fits = [
        (len(parts), path)
        for path in sorted(folder.rglob("*_events.tsv"))
        if (parts := set(path.name.removesuffix("_events.tsv").split("_"))) <= mine
    ]
    if not fits:
        raise UserError(f"task.target.events={target.events}: no *_events.tsv there whose name fits {info.scan_id}")
    return max(fits)[1].read_text(encoding="utf-8-sig")


def read_events(text: str, info: ScanInfo, column: str | None) -> list[Event]:
    """The events of a scan in order of time.

    Raises:
        UserError: no such columns, an onset or duration that is no number, an event outside the scan; names the lines.
    """
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    there = list(rows[0]) if rows else []
    where = f"events of scan {info.scan_id}"
    for name in ("onset", "duration", *([column] if column else [])):
        if name not in there:
            raise UserError(f"{where}: no column {name}; there are {', '.join(there) or 'none'}")
    events, wrong, outside = [], [], []
    length = info.frames * info.tr
    for line, row in enumerate(rows, start=2):
        onset = _number(row["onset"] or "")
        duration = 0.0 if (row["duration"] or "").strip() in NOT_KNOWN else _number(row["duration"])
        if onset is None or duration is None or duration < 0:
            wrong.append(f"line {line}")
        elif onset >= length or onset + duration < 0:
            outside.append(f"line {line} at {onset:g} s")
        else:
            events.append(Event(line, onset, onset + duration, (row[column] or "") if column else ""))
    if wrong:
        raise UserError(f"{where}: onset or duration is no number of seconds in {_named(wrong)}")
    if outside:
        raise UserError(
            f"{where}: outside the scan, which ends at {length:g} s ({info.frames} frames of {info.tr:g} s): "
            f"{_named(outside)}"
        )
    return sorted(events, key=lambda event: (event.onset, event.line))


def _from_events(text: str, info: ScanInfo, target: TargetConfig) -> np.ndarray:
    events = read_events(text, info, target.column)
    times = np.arange(info.frames) * info.tr
    rows = [f"{info.scan_id} line {event.line}" for event in events]
    texts = [event.text for event in events]
    if target.column is None:
        values = np.ones(len(events))
    else:
        ours = [place for place, one in enumerate(texts) if one.strip() not in NOT_KNOWN]
        events, texts, rows = ([column[place] for place in ours] for column in (events, texts, rows))  # type: ignore[assignment]
        values = encode(texts, rows, target)
        events = [event for event, value in zip(events, values, strict=True) if math.isfinite(value)]
        values = values[np.isfinite(values)]
    if target.response == "hrf":
        return _convolved(events, values, times)
    return _shifted(events, values, times - target.delay_seconds, target)


def _shifted(events: Sequence[Event], values: np.ndarray, times: np.ndarray, target: TargetConfig) -> np.ndarray:
    """Label of the event that goes on at each time, of several the last begun; NaN before the scan's first frame."""
    names = [entry.split("|")[0] for entry in target.classes]
    nothing = math.nan
    if target.kind != "regression" and (target.column is None or REST in names):
        nothing = 0.0 if target.column is None else float(names.index(REST))
    out = np.where(times >= 0, nothing, np.nan)
    last: dict[float, float] = {}
    for event, value in zip(events, values.tolist(), strict=True):
        begin = event.onset
        if value in last and 0 <= begin - last[value] <= target.bridge_seconds:
            begin = last[value]
        last[value] = max(event.end, last.get(value, event.end))
        out[(times >= max(begin, 0)) & (times < event.end)] = value
    return out


def _convolved(events: Sequence[Event], values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Values as boxcars, convolved with Glover's response (nilearn), at the times of the frames."""
    from nilearn.glm.first_level import compute_regressor

    if not events:
        return np.full(len(times), np.nan)
    condition = np.array([[event.onset, event.end - event.onset, value] for event, value in zip(events, values)])
    regressor, _ = compute_regressor(condition.T, "glover", times)
    return np.asarray(regressor[:, 0], np.float64)

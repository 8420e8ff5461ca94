"""What a task is to predict, read from a store: one value a subject, or one a frame.

Per subject from a column of the manifest; per frame from events (with the haemodynamic delay) or from a column of the
per-frame table that the store keeps of a scan. NaN stands for "no label".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from swift.config.check_target import class_names
from swift.config.schema import TargetConfig
from swift.data.clips.mixture import Stores
from swift.data.labels.columns import encode, listed
from swift.data.labels.events import Unused, label_frames
from swift.data.store.format import ScanInfo
from swift.utils.errors import BadScan, UserError

log = logging.getLogger("swift.data")


@dataclass(frozen=True)
class Labels:
    """Labels of all scans of a store.

    Attributes:
        kind: binary | multiclass | regression | map.
        per: subject | frame.
        classes: Names, [] for a regression.
        values: One array a scan: (), or (T,) per frame; float64, the place of the class or the number, NaN: none. Of
            maps 1 where there is one.
        failed: Of scans whose labels cannot be read: scan_id -> why.
    """

    kind: str
    per: str
    classes: list[str]
    values: list[np.ndarray]
    failed: dict[str, str] = field(default_factory=dict)

    def known(self, scan: int, first: int, length: int) -> np.ndarray:
        """Labels of a part of a scan that are there: (1,) or (0,) per subject, (n,) per frame."""
        value = np.atleast_1d(self.values[scan])
        part = value if self.per == "subject" else value[first : first + length]
        return part[np.isfinite(part)]


def read_labels(store: Stores, target: TargetConfig) -> Labels:
    """The labels that a task asks for.

    Raises:
        UserError: no such column (the message names those there are), text where numbers are due (which rows), values
            that are no class, a subject with two values, no scan with events that can be read.
    """
    names = class_names(target)
    if target.source == "manifest":
        return Labels(target.kind, target.per, names, _from_manifest(store.scans, target))
    return Labels(target.kind, target.per, names, *_per_frame(store, target))


# -------------------------------------------------------------------------------------------------- of subjects
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
        raise BadScan(
            f"task.target.column={target.column}: scan {store.scans[scan].scan_id} has no such per-frame column; it "
            f"has {', '.join(columns) or 'none'}"
        )
    values = columns[target.column].astype(np.float64)
    if target.kind == "regression":
        return values
    texts = [f"{value:g}" if math.isfinite(value) else "" for value in values]
    return encode(texts, [f"{store.scans[scan].scan_id} frame {frame}" for frame in range(len(texts))], target)


# ----------------------------------------------------------------------------------------------------- of frames
def _per_frame(store: Stores, target: TargetConfig) -> tuple[list[np.ndarray], dict[str, str]]:
    """Labels of the frames of every scan; one whose table cannot be used has none: it is left out by name, and why.

    Raises:
        BadScan: no scan has one that can be used: what is wrong with the first one's.
        UserError: a value that is no class.
    """
    values: list[np.ndarray] = []
    failed: dict[str, BadScan] = {}
    unused: dict[str, Unused] = {}
    for scan, info in enumerate(store.scans):
        try:
            if target.source == "confounds":
                found = _from_confounds(store, scan, target)
            else:
                start = float(store.attributes(scan).get("start_time", 0.0))
                found, unused[info.scan_id] = label_frames(_events_text(store, scan, target), info, start, target)
        except BadScan as error:
            found, failed[info.scan_id] = np.full(info.frames, math.nan), error
        values.append(found)
    if len(failed) == len(values):
        raise next(iter(failed.values()))
    for reason in list(failed.values())[:5]:
        log.warning("left out: %s", reason)
    if failed:
        log.warning("%d of %d scans are left out, as their frames cannot be labelled", len(failed), len(values))
    _say_unused(unused)
    return values, {name: str(error) for name, error in failed.items()}


def _say_unused(unused: dict[str, Unused]) -> None:
    """Say how many events label no frame, of which scans."""
    outside = {name: lines.outside for name, lines in unused.items()}
    unknown = {name: lines.unknown for name, lines in unused.items()}
    gap = "have no known duration: from their onset to the next event frames have no label"
    for what, found in (("lie outside their scans and label no frame", outside), (gap, unknown)):
        told = [f"{name} line {line}" for name, lines in found.items() for line in lines]
        if told:
            scans = sum(bool(lines) for lines in found.values())
            log.warning("%d events of %d scans %s (%s)", len(told), scans, what, listed(told))


def _events_text(store: Stores, scan: int, target: TargetConfig) -> str:
    info = store.scans[scan]
    if target.events is None:
        text = store.events(scan)
        if not text:
            raise BadScan(
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
        raise BadScan(f"task.target.events={target.events}: no *_events.tsv there whose name fits {info.scan_id}")
    return max(fits)[1].read_text(encoding="utf-8-sig")

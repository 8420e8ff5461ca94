"""The predictions of one model for one part of a split: one row a unit, kept as CSV so that any number can be redone.

A unit is what has one label: a subject, or a frame of a scan. N units, K classes.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swift.utils.errors import UserError

KINDS = ("binary", "multiclass", "regression", "map")
HEAD = ("subject", "scan", "frame", "target")
VALUE = "prediction"
MARK = "p_"
OWN_SCORE = "s_"
SUM_TOLERANCE = 1e-5
"""Probabilities of a unit must sum to 1 within this; they are saved as softmax in float32 gave them."""


@dataclass(frozen=True)
class Predictions:
    """Targets and predictions, one row a unit.

    Args:
        kind: binary | multiclass | regression | map.
        classes: Their names in the order of the columns of `scores`; the second of two is the positive one. Empty for
            regression. Of maps the names of scores.
        subject: (N,) names.
        scan: (N,) names; "" where the unit is a subject.
        frame: (N,) places in the scan; -1 where the unit is a subject.
        target: (N,) float64: place in `classes`, or the value in the label's own unit.
        scores: (N, K) float64 probabilities; (N, 1) values in the label's unit for regression; of maps each
            subject's own scores (`swift.evaluate.map_scores`).

    Raises:
        UserError: Shapes that do not fit, a unit twice, a value that is not finite, probabilities that do not sum to 1.
    """

    kind: str
    classes: list[str]
    subject: np.ndarray
    scan: np.ndarray
    frame: np.ndarray
    target: np.ndarray
    scores: np.ndarray
    name: str = field(default="predictions", compare=False)
    """What messages call it: the file."""

    def __post_init__(self) -> None:
        for key in ("subject", "scan"):
            object.__setattr__(self, key, np.asarray(getattr(self, key), dtype=np.str_))
        object.__setattr__(self, "frame", np.asarray(self.frame, np.int64))
        object.__setattr__(self, "target", np.asarray(self.target, np.float64))
        scores = np.asarray(self.scores, np.float64)
        object.__setattr__(self, "scores", scores[:, None] if scores.ndim == 1 else scores)
        self._check_form()
        self._check_rows()

    def _check_form(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"{self.name}: kind {self.kind!r}; legal are {', '.join(KINDS)}")
        n = len(self.target)
        if not n:
            raise UserError(f"{self.name}: no rows; a part of a split needs at least one unit with a label")
        lengths = {key: len(getattr(self, key)) for key in ("subject", "scan", "frame", "scores")}
        if any(length != n for length in lengths.values()):
            raise UserError(f"{self.name}: {n} targets, but {lengths}")
        columns = 1 if self.kind == "regression" else len(self.classes)
        if self.scores.shape != (n, columns):
            raise UserError(f"{self.name}: scores of shape {self.scores.shape}; {(n, columns)} belong to {self.kind}")
        if (self.kind == "binary" and columns != 2) or (self.kind == "multiclass" and columns < 3):
            raise UserError(f"{self.name}: {columns} classes do not make a {self.kind} task")
        if len(set(self.classes)) != len(self.classes):
            raise UserError(f"{self.name}: classes named twice in {self.classes}")

    def _check_rows(self) -> None:
        bad = np.flatnonzero(~(np.isfinite(self.target) & np.isfinite(self.scores).all(1)))
        if len(bad):
            raise UserError(f"{self.name}, {self.unit(bad[0])}: not finite (and {len(bad) - 1} other rows)")
        units = list(zip(self.subject.tolist(), self.scan.tolist(), self.frame.tolist(), strict=True))
        if len(set(units)) != len(units):
            seen: set[Any] = set()
            twice = next(i for i, unit in enumerate(units) if unit in seen or seen.add(unit))  # type: ignore[func-returns-value]
            raise UserError(f"{self.name}, {self.unit(twice)}: twice; every unit must be there exactly once")
        if self.kind in ("regression", "map"):
            return
        wrong = np.flatnonzero(~np.isin(self.target, np.arange(len(self.classes))))
        if len(wrong):
            raise UserError(f"{self.name}, {self.unit(wrong[0])}: target {self.target[wrong[0]]:g} is no class")
        off = np.flatnonzero((np.abs(self.scores.sum(1) - 1) > SUM_TOLERANCE) | (self.scores < 0).any(1))
        if len(off):
            raise UserError(f"{self.name}, {self.unit(off[0])}: {self.scores[off[0]]} are no probabilities")

    def __len__(self) -> int:
        return len(self.target)

    def unit(self, row: int) -> str:
        """Row `row` in words."""
        scan, frame = str(self.scan[row]), int(self.frame[row])
        inside = (f", scan {scan}" if scan else "") + (f", frame {frame}" if frame >= 0 else "")
        return f"subject {self.subject[row]}{inside}"

    @property
    def per(self) -> str:
        """Frame or subject: what a unit is."""
        return "frame" if (self.frame >= 0).any() else "subject"

    @property
    def subjects(self) -> list[str]:
        """Names, sorted, each once."""
        return sorted(set(self.subject.tolist()))

    def take(self, rows: np.ndarray) -> Predictions:
        """The rows at these places, or where a mask is true."""
        return Predictions(
            self.kind,
            self.classes,
            self.subject[rows],
            self.scan[rows],
            self.frame[rows],
            self.target[rows],
            self.scores[rows],
            self.name,
        )

    # ---------------------------------------------------------------------------------------------------- from clips
    @classmethod
    def from_clips(
        cls,
        kind: str,
        classes: Sequence[str],
        subject: Sequence[str] | np.ndarray,
        scan: Sequence[str] | np.ndarray,
        start: Sequence[int] | np.ndarray,
        target: Sequence[float] | np.ndarray,
        scores: Sequence[Any] | np.ndarray,
        frame: Sequence[int] | np.ndarray | None = None,
    ) -> Predictions:
        """Average what the clips of a unit say: once, in float64, in an order that does not depend on the ranks.

        Rows are sorted by subject, scan, frame and first frame of the clip before they are added, so that the same rows
        gathered from any number of ranks give the same result to the last bit. A row that is there twice (samplers pad
        the last batch with repeats) counts once.

        Args:
            kind: binary | multiclass | regression.
            classes: Names; empty for regression.
            subject: (R,) of each row.
            scan: (R,) of each row.
            start: (R,) first frame of the row's clip.
            target: (R,) label of the row's unit.
            scores: (R, K) probabilities (after one softmax), or values.
            frame: (R,) frame of the scan that the row is about; None: a unit is a subject.

        Raises:
            UserError: Rows of one unit with different targets.
        """
        subject, scan = np.asarray(subject, np.str_), np.asarray(scan, np.str_)
        start, target = np.asarray(start, np.int64), np.asarray(target, np.float64)
        values = np.asarray(scores, np.float64)
        values = values[:, None] if values.ndim == 1 else values
        places = np.full(len(start), -1, np.int64) if frame is None else np.asarray(frame, np.int64)
        if not len(target):
            raise UserError("no clips to average: the part of the split holds no labelled scan")
        # the scores come last: they order repeats, which may differ in their last digit
        order = np.lexsort((*values.T[::-1], start, places, scan, subject))
        rows = [array[order] for array in (subject, scan, places, start)]
        kept = np.ones(len(order), bool)
        kept[1:] = np.any([row[1:] != row[:-1] for row in rows], axis=0)
        order = order[kept]
        subject, scan, places = subject[order], scan[order], places[order]
        target, values = target[order], values[order]
        same = subject[1:] == subject[:-1]
        if frame is not None:
            same = same & (scan[1:] == scan[:-1]) & (places[1:] == places[:-1])
        first = np.flatnonzero(np.concatenate([[True], ~same]))
        counts = np.diff(np.append(first, len(target)))
        different = np.flatnonzero(np.repeat(target[first], counts) != target)
        if len(different):
            raise UserError(f"subject {subject[different[0]]}: rows of one unit have different targets")
        mean = np.add.reduceat(values, first, axis=0) / counts[:, None]
        names = scan[first] if frame is not None else np.full(len(first), "", np.str_)
        return cls(kind, list(classes), subject[first], names, places[first], target[first], mean)

    # ---------------------------------------------------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a CSV that `load` reads back to the last bit: subject, scan, frame, target, p_CLASS... or prediction.

        Raises:
            UserError: It cannot be written.
        """
        path = Path(path)
        mark = OWN_SCORE if self.kind == "map" else MARK
        columns = [VALUE] if self.kind == "regression" else [mark + name for name in self.classes]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*HEAD, *columns])
        for row in range(len(self)):
            target = float(self.target[row])
            writer.writerow(
                [
                    self.subject[row],
                    self.scan[row],
                    "" if self.frame[row] < 0 else int(self.frame[row]),
                    repr(target) if self.kind in ("regression", "map") else self.classes[int(target)],
                    *(repr(float(value)) for value in self.scores[row]),
                ]
            )
        temp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temp.write_text(text.getvalue(), encoding="utf-8")
            os.replace(temp, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read and check a file of `save`.

        Raises:
            UserError: No such file, other columns, or rows that are no predictions; names the line.
        """
        path = Path(path)
        try:
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(csv.reader(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        head = lines[0] if lines else []
        columns = head[len(HEAD) :]
        regression = columns == [VALUE]
        maps = bool(columns) and all(c.startswith(OWN_SCORE) for c in columns)
        if tuple(head[: len(HEAD)]) != HEAD or not (regression or maps or all(c.startswith(MARK) for c in columns)):
            raise UserError(
                f"{path}: not predictions; the columns must be {', '.join(HEAD)}, then {MARK}CLASS or {VALUE}"
            )
        classes = [] if regression else [column[len(MARK) :] for column in columns]
        kind = "map" if maps else "regression" if regression else "binary" if len(classes) == 2 else "multiclass"
        rows = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                target = float(line[3]) if regression or maps else classes.index(line[3])
                rows.append((line[0], line[1], int(line[2] or -1), target, [float(x) for x in line[4:]]))
                if len(line) != len(head):
                    raise ValueError(f"{len(line)} fields instead of {len(head)}")
            except (ValueError, IndexError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
        if not rows:
            raise UserError(f"{path}: no rows")
        subject, scan, frame, target_, scores = zip(*rows, strict=True)
        return cls(kind, classes, subject, scan, frame, target_, np.array(scores), str(path))  # type: ignore[arg-type]


def prevalence(predictions: Predictions) -> dict[str, int]:
    """Units of each class; {} for regression and maps."""
    if predictions.kind == "map":
        return {}
    return {name: int((predictions.target == place).sum()) for place, name in enumerate(predictions.classes)}


def finite(value: float) -> float | None:
    """`value` for JSON: None where it is not a number."""
    return float(value) if math.isfinite(value) else None

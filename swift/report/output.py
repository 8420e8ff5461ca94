"""How findings are written: aligned text, CSV files, notes on standard error."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def aligned(lines: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Cells as lines of text with columns of one width; the first `left` columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return ["  ".join(line).rstrip() for line in cells]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], form: str = "") -> None:
    """Rows of one kind as a CSV file with a head; None is empty, floats are written by `form`."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: format(v, form) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def say(lines: Iterable[str]) -> None:
    """Notes about runs, on standard error."""
    for line in lines:
        print(line, file=sys.stderr)

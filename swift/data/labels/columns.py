"""Texts of a column as labels: places of classes, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from swift.config.schema import TargetConfig
from swift.utils.errors import UserError

NOT_KNOWN = ("", "n/a", "N/A", "nan", "NaN")
"""How tables write that a value is not known."""


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def number(text: str) -> float | None:
    """The finite number that a text is; None where it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


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
    numbers = {value: place for text, place in places.items() if (value := number(text)) is not None}
    wrong = []
    for row, raw in enumerate(texts):
        text = raw.strip()
        if text in NOT_KNOWN:
            continue
        read = number(text)
        value = (
            read if target.kind == "regression" else places.get(text, numbers.get(read) if read is not None else None)
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
        raise UserError(f"task.target.column={target.column}: {what} in {len(wrong)} rows ({listed(wrong)}){hint}")
    return found

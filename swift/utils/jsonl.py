"""Lines of JSON, one object each: what metrics.jsonl is made of.

JSON has no NaN and no infinities, and Python's own spelling of them (bare `NaN`) is refused by other readers. They are
written as the strings "NaN", "Infinity" and "-Infinity", and read back as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift.utils.errors import UserError
from swift.utils.files import replace_text

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """`value` as something strict JSON can hold.

    Args:
        value: A scalar, a string, any object with `item()` (a one-element tensor or NumPy scalar), or these nested in
            mappings, lists and tuples.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to `path`. It has left the process when this returns, so a killed run keeps it."""
    line = json.dumps(plain(record), allow_nan=False) + "\n"
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)


def read(path: Path) -> list[dict[str, Any]]:
    """All records of `path` in the order of the file.

    A last line without its newline was cut off by a killed process and is left out.

    Raises:
        UserError: A whole line is not a JSON object; the message names file and line.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: each line must be a JSON object, got {line[:60]!r}")
        records.append({k: _SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records


def rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace `path` by `records`: readers see the old file or the new one, never a part."""
    replace_text(path, "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records), sync=True)

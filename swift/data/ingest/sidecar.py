"""JSON sidecars: every key from the nearest file that has it (BIDS inheritance), and what they say of time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from swift.utils.errors import BadScan

REGULAR = 0.01
"""Largest difference between two steps of VolumeTiming that still counts as one TR, as a part of it."""


@dataclass(frozen=True)
class Timing:
    """When frames were taken, as sidecars tell it; None: they do not."""

    tr: float | None = None
    """Seconds."""
    start_time: float | None = None
    """Seconds from the start of the run to the time that frame 0 stands for."""
    notes: list[str] = field(default_factory=list)


def read_sidecars(files: Sequence[Path], name: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """All keys of several JSON files, and the file that each is of.

    Args:
        files: The nearest last: its keys win.
        name: The scan, for messages.

    Raises:
        BadScan: a file cannot be read.
    """
    found: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise BadScan(f"{name}: JSON sidecar {path.name} not readable ({error})") from error
        if isinstance(content, dict):
            found |= content
            origin |= dict.fromkeys(content, path)
    return found, origin


def read_timing(files: Sequence[Path], name: str, told: bool = False) -> Timing:
    """RepetitionTime, StartTime and VolumeTiming of a scan's sidecars.

    Args:
        files: As for `read_sidecars`.
        name: The scan, for messages.
        told: The user gives the TR: frames that are not evenly spaced are then taken, and it is said.

    Raises:
        BadScan: a file cannot be read; a value is no number of seconds; frames are not evenly spaced.
    """
    content, origin = read_sidecars(files, name)
    tr = _seconds("RepetitionTime", content, origin, name)
    start = _seconds("StartTime", content, origin, name)
    notes: list[str] = []
    if "VolumeTiming" in content:
        onsets = _onsets(content["VolumeTiming"], origin["VolumeTiming"], name)
        steps = [later - one for one, later in pairwise(onsets)]
        if max(steps) - min(steps) <= REGULAR * min(steps):
            tr = round(sum(steps) / len(steps), 6) if tr is None else tr
        elif not told:
            raise BadScan(
                f"{name}: frames are {min(steps):g} to {max(steps):g} s apart (VolumeTiming in "
                f"{origin['VolumeTiming'].name}); swift needs one TR: give --tr to take them as evenly spaced"
            )
        else:
            notes.append(f"frames are {min(steps):g} to {max(steps):g} s apart (VolumeTiming): taken as evenly spaced")
        start = onsets[0] if start is None else start
    return Timing(tr, start, notes)


def _seconds(key: str, content: dict[str, Any], origin: dict[str, Path], name: str) -> float | None:
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadScan(f"{name}: {key} {value!r} in {origin[key].name} is not a number of seconds")
    return float(value)


def _onsets(value: Any, path: Path, name: str) -> list[float]:
    """The time of each frame, s."""
    well = isinstance(value, list) and len(value) > 1
    well = well and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
    if not well or any(later <= one for one, later in pairwise(value)):
        raise BadScan(f"{name}: VolumeTiming in {path.name} is not a list of growing times in seconds")
    return [float(one) for one in value]

"""Which scans of a store are used: all but those that are excluded by name, or too short for a clip."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from swift.data.clips.index import ClipSpec, check_length
from swift.data.store.format import ScanInfo
from swift.utils.errors import UserError

log = logging.getLogger("swift.data")
MEANT = "data.exclude"
"""Why a scan is left out that the settings name."""


def choose(scans: Sequence[ScanInfo], spec: ClipSpec, exclude: Sequence[str]) -> tuple[list[int], dict[str, str]]:
    """Places of the scans that are used, and why others are not; says so.

    Args:
        scans: Of the store.
        spec: The clip.
        exclude: data.exclude, names of scans or subjects.

    Returns:
        Places, and scan_id -> reason.

    Raises:
        UserError: an excluded name that is no scan and no subject (with the nearest that are); nothing is left.
    """
    out = {scan.scan_id: MEANT for scan in _excluded(scans, exclude)}
    if out:
        log.info("data.exclude: %d of %d scans are left out", len(out), len(scans))
    if len(out) == len(scans):
        raise UserError(f"data.exclude={list(exclude)}: leaves no scan")
    left = [place for place, scan in enumerate(scans) if scan.scan_id not in out]
    short = [place for place in left if scans[place].frames < spec.span]
    if len(short) == len(left):
        check_length([scans[i].frames for i in left], [scans[i].scan_id for i in left], spec)
    if short:
        told = [f"{scans[place].scan_id} ({scans[place].frames} frames)" for place in short]
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        log.warning(
            "%d of %d scans are shorter than a clip, which spans %d frames, and left out: %s%s",
            len(short), len(scans), spec.span, ", ".join(told[:5]), more,
        )  # fmt: skip
        out |= {scans[place].scan_id: f"{scans[place].frames} frames, a clip spans {spec.span}" for place in short}
    gone = set(short)
    return [place for place in left if place not in gone], out


def told(left_out: dict[str, str]) -> dict[str, Any]:
    """What the summary of a run says of the scans that were left out, scan_id -> why; {} where there are none."""
    return {"scans_left_out": len(left_out), "left_out": left_out} if left_out else {}


def say_unmeant(summary: dict[str, Any], where: object) -> int:
    """Say how many scans a run has left out that nobody named, and where they are named.

    Returns:
        The exit status of a command: 1 if there are any.
    """
    names = [name for name, why in summary.get("left_out", {}).items() if why != MEANT]
    if not names:
        return 0
    log.warning(
        "%d scans were left out: %s names them and says why; data.exclude=[...] says of scans that it is meant",
        *(len(names), where),
    )
    return 1


def _excluded(scans: Sequence[ScanInfo], exclude: Sequence[str]) -> list[ScanInfo]:
    names = {scan.scan_id for scan in scans} | {scan.subject for scan in scans}
    for name in exclude:
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), 3, 0.5)
            raise UserError(
                f"data.exclude: {name!r} is neither a scan nor a subject of the store; "
                + (f"the nearest are {', '.join(near)}" if near else f"such as {', '.join(sorted(names)[:3])}")
            )
    wanted = set(exclude)
    return [scan for scan in scans if scan.scan_id in wanted or scan.subject in wanted]

"""The options that say which scans are meant, and `ingest --list`: what was found and what it was taken for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from swift.data.ingest.sources import OPTIONS, Choice, Found, duplicates, parse_choice, why_twice
from swift.utils.errors import UserError

HELP = {
    "space": "only this space, such as MNI152NLin2009cAsym or MNI152NLin6Asym:res-2; names that of files without one",
    "task": "only this task",
    "res": "only this resolution",
    "desc": "only this form of the series, such as preproc or denoised",
    "echo": "only this echo",
}


def add_places(parser: argparse.ArgumentParser) -> None:
    """Options by which scans are chosen; every one may be given several times."""
    parser.add_argument("--layout", default="auto", help="auto | bids | folder | table | frames (SwiFT v1)")
    group = parser.add_argument_group("which scans (BIDS entities; each may be repeated)")
    for key in OPTIONS:
        text = HELP.get(key, f"only this label of {key}-")
        group.add_argument(f"--{key}", action="append", default=[], metavar="LABEL", dest=f"entity_{key}", help=text)
    parser.add_argument("--prefix", default="", help="put before subjects and scans: sub-01 of two data sets are two")
    group.add_argument(
        "--entity",
        action="append",
        default=[],
        metavar="KEY=LABEL",
        help="any other entity; KEY= takes those without it",
    )


def choice_of(options: argparse.Namespace) -> Choice:
    """What the options say.

    Raises:
        UserError: --entity that is not KEY=LABEL.
    """
    pairs: dict[str, list[str]] = {key: list(getattr(options, f"entity_{key}")) for key in OPTIONS}
    for text in options.entity:
        key, mark, label = text.partition("=")
        if not mark or not key:
            raise UserError(f"--entity {text!r}: write it as KEY=LABEL, such as reg=36Parameter")
        pairs.setdefault(key, []).append(label)
    chosen = parse_choice({key: labels for key, labels in pairs.items() if labels})
    participants: Path | None = getattr(options, "participants", None)
    return Choice(options.layout, chosen, participants, options.prefix)


def listing(found: Found) -> tuple[dict[str, Any], list[str]]:
    """What `--list` shows: figures, and lines."""
    good = [source for source in found.sources if not source.problem]
    twice = duplicates(good)
    left = {str(source.path): source.problem for source in found.sources if source.problem}
    left |= {str(source.path): why_twice(same) for same in twice.values() for source in same}
    scans = [
        {
            "scan_id": source.scan_id,
            "subject": source.subject,
            "session": source.session,
            "task": source.task,
            "run": source.run,
            "space": source.space or "",
            "path": str(source.path),
            "mask": str(source.mask or ""),
            "notes": list(source.notes),
        }
        for source in good
        if str(source.path) not in left
    ]
    figures = {
        "taken_for": found.kinds,
        "subjects": len({scan["subject"] for scan in scans}),
        "runs": len(scans),
        "masks": sum(bool(scan["mask"]) for scan in scans),
        "scans": scans,
        "left_out": left,
        "not_taken": {reason: [str(path) for path in paths] for reason, paths in sorted(found.passed.items())},
        "notes": found.notes,
    }
    lines = list(found.kinds)
    lines.append(f"{figures['subjects']} subjects, {figures['runs']} runs, {figures['masks']} brain masks")
    for scan in scans:
        lines.append(
            f"{scan['scan_id']}  subject {scan['subject']}  {scan['path']}  mask: {scan['mask'] or 'to be computed'}"
        )
    lines += [f"LEFT OUT: {problem}" for problem in dict.fromkeys(left.values())]
    lines += found.told()
    lines += [f"note: {note}" for note in found.notes]
    return figures, lines

"""A CSV or TSV file of scans: one line a scan, with a column `path`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from swift.data.ingest.folder import guesses, one_file
from swift.data.ingest.names import is_nifti, parse_name
from swift.data.ingest.participants import read_table
from swift.data.ingest.sources import FIELDS, Found, Source, phenotypes, scan_name
from swift.data.ingest.tree import Tree
from swift.utils.errors import UserError

FILES = ("mask", "confounds", "sidecar", "events")
NUMBERS = ("tr", "start_time")
OTHER_NAMES = {"participant_id": "subject", "session_id": "session", "site_id": "site"}
"""Columns as BIDS calls them."""
KNOWN = ("path", *FIELDS, *FILES, *NUMBERS, "space")


def find_table(path: Path, found: Found) -> list[Source]:
    """Scans of a table.

    Known columns: scan_id, subject (or participant_id), session (session_id), task, run, site (site_id), mask,
    confounds, sidecar, events, tr, start_time, space. Every other one is kept as a phenotype. Relative paths count from
    the table's folder.

    Raises:
        UserError: no such column, two columns for one thing, or a line without a path or with a TR that is no number.
    """
    header, rows = read_table(path)
    for theirs, ours in OTHER_NAMES.items():
        if theirs in header and ours in header:
            raise UserError(f"{path}: columns {ours} and {theirs} say the same thing; keep one")
    names = [OTHER_NAMES.get(name, name) for name in header]
    if not rows or "path" not in names:
        raise UserError(f"{path}: a table of scans has a header line with a column `path` and a line for each scan")
    sources = []
    cache = Tree(path.parent)  # each folder is listed once
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{path}, line {number}: has not as many fields as the header")
        texts = {OTHER_NAMES.get(name, name): text.strip() for name, text in row.items()}
        sources.append(_row(path, number, texts, cache))
    found.notes += guesses(sources)
    return sources


def _row(table: Path, number: int, row: dict[str, str], cache: Tree) -> Source:
    if not row["path"]:
        raise UserError(f"{table}, line {number}: no path")
    scan = table.parent / row["path"]
    files = {name: table.parent / row[name] for name in FILES if row.get(name)}
    times: dict[str, float | None] = {}
    for name in NUMBERS:
        text = row.get(name, "")
        try:
            times[name] = float(text) if text else None
        except ValueError as error:
            raise UserError(f"{table}, line {number}: {name} {text!r} is not a number of seconds") from error
    guess = one_file(scan, None, cache) if is_nifti(scan) else Source(scan_name(scan.name), scan, scan_name(scan.name))
    known = {name: row.get(name, "") for name in FIELDS}
    missing = [file for file in files.values() if not file.exists()]
    problem = "" if row.get("subject") else guess.problem
    if missing:
        problem = f"{scan.name}: {missing[0]} of {table.name}, line {number}, is not there"
    elif not scan.exists():
        link = " (a link that leads nowhere)" if scan.is_symlink() else ""
        problem = f"{scan}: no such file{link}"
    space = row.get("space") or guess.space
    entities = dict(parse_name(scan).entities) if is_nifti(scan) else {}
    told = {"ses": known["session"], "task": known["task"], "run": known["run"], "space": space or ""}
    entities |= {key: value for key, value in told.items() if value}
    return replace(
        guess,
        scan_id=scan_name(known["scan_id"] or _joined(known) or guess.scan_id),
        path=scan,
        subject=known["subject"] or guess.subject,
        session=known["session"],
        task=known["task"],
        run=known["run"],
        site=known["site"],
        mask=files.get("mask", guess.mask),
        sidecars=(files["sidecar"],) if "sidecar" in files else guess.sidecars,
        confounds=files.get("confounds"),
        events=files.get("events"),
        tr=times["tr"],
        start_time=times["start_time"],
        space=space,
        entities=entities,
        dataset=table,
        notes=() if known["subject"] else guess.notes,
        problem=problem,
        phenotypes=phenotypes({name: text for name, text in row.items() if name not in KNOWN}),
    )


def _joined(known: dict[str, str]) -> str:
    """subject_session_task_run, when a table gives more than a subject."""
    parts = [known[name] for name in ("subject", "session", "task", "run") if known[name]]
    return "_".join(parts) if len(parts) > 1 else ""

"""Labels of scans that a store has already: taken anew when the source's were corrected; and people in doubt.

The manifest is what counts for labels (subject, session, task, run, site, phenotypes). A column that the user added
stays. A value that the user changed there stays too, unless the source's own has changed since it was last taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift.data.ingest.sources import Source
from swift.data.labels.subjects import two_spellings
from swift.data.store.format import ScanInfo
from swift.data.store.reader import Store
from swift.data.store.writer import StoreWriter

LABELS = ("subject", "session", "task", "run", "site")


def labels_of(source: Source) -> dict[str, str]:
    """All labels that a source has."""
    return {**{name: getattr(source, name) for name in LABELS}, **source.phenotypes}


def relabel(
    writer: StoreWriter, sources: Iterable[Source], earlier: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Bring corrected and new labels into the manifest.

    Args:
        writer: Of the store, closed: all its scans are packed.
        sources: Of scans that the store had before.
        earlier: Rows of the last report by scan_id; `labels` are those that were last taken.

    Returns:
        scan_id -> what was changed, or kept although the source differs: one sentence each.
    """
    lines = {scan.scan_id: scan for scan in writer.packed()}
    said: dict[str, list[str]] = {}
    new: dict[str, ScanInfo] = {}
    store: Store | None = None
    for source in sources:
        info = lines.get(source.scan_id)
        if info is None:
            continue
        have = {**{name: getattr(info, name) for name in LABELS}, **info.phenotypes}
        given = labels_of(source)
        if all(have.get(name) == value for name, value in given.items()):
            continue
        last = earlier.get(source.scan_id, {}).get("labels")
        if last is None:
            store = store or Store(writer.path)
            last = labels_in_header(store, source.scan_id)
        words = []
        for name, value in given.items():
            old = have.get(name, "")
            if old == value and name in have:
                continue
            if name in last and last[name] == value and name in have:
                words.append(
                    f"{name} {old} in manifest.csv kept, though {value or 'nothing'} is given: changed there by hand"
                )
                continue
            have[name] = value
            words.append(f"{name} {old or 'new'} -> {value or 'nothing'}")
        said[source.scan_id] = words
        fixed = {name: have.pop(name) for name in LABELS}
        new[source.scan_id] = replace(info, **fixed, phenotypes=have)
    if store is not None:
        store.close()
    if any(new[name] != lines[name] for name in new):
        writer.replace_lines(new)
    return said


def labels_in_header(store: Store, scan_id: str) -> dict[str, str]:
    """Labels as they were when a scan was ingested."""
    attributes = store.attributes(store.find(scan_id))
    return {**{name: str(attributes[name]) for name in LABELS}, **json.loads(attributes["phenotypes"])}


def doubts(rows: Iterable[Mapping[str, Any]], found: Iterable[str] = ()) -> list[str]:
    """What has to be said of the people in a store: one sentence for each kind of doubt.

    Args:
        rows: Of the report, all scans of the store: scan_id, subject, dataset, source_sha256.
        found: What was said already.
    """
    rows = [row for row in rows if row.get("status") != "failed"]
    notes = []
    by_bytes: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("source_sha256"):
            by_bytes.setdefault(str(row["source_sha256"]), []).append(row)
    same = [group for group in by_bytes.values() if len(group) > 1]
    if same:
        shown = "; ".join(" and ".join(str(row["scan_id"]) for row in group[:3]) for group in same[:3])
        notes.append(
            f"{len(same)} scans are in the store twice, byte for byte the same file under two names ({shown}): "
            "`split` keeps their subjects together"
        )
    homes: dict[str, set[str]] = {}
    for row in rows:
        if row.get("subject") and row.get("dataset"):
            homes.setdefault(str(row["subject"]), set()).add(str(row["dataset"]))
    shared = {name: sorted(where) for name, where in sorted(homes.items()) if len(where) > 1}
    if shared and not any("in several data sets" in note for note in found):
        name, where = next(iter(shared.items()))
        notes.append(
            f"{len(shared)} subjects are in several data sets ({name} in {' and '.join(where[:3])}): taken for one "
            "person each; if they are not, ingest each data set with its own --prefix"
        )
    twins = two_spellings(str(row["subject"]) for row in rows if row.get("subject"))
    if twins and not any("differ in spelling only" in note for note in found):
        shown = "; ".join(" and ".join(sorted(names)) for names in twins[:3])
        notes.append(
            f"{len(twins)} pairs of subjects differ in spelling only ({shown}): `split` keeps them together; if they "
            "are one person, rename them"
        )
    return notes


def write_path(source: Path | None) -> str:
    """A data set as the report names it; "" where it is not known."""
    return "" if source is None else str(source.absolute())

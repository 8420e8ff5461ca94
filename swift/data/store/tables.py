"""store.json and manifest.csv, which say what the shards hold: is one damaged, does a replica mend it; the report."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

from swift.data.store import format as fmt
from swift.data.store.format import ScanInfo
from swift.data.store.writer import tool_version
from swift.utils.errors import UserError

log = logging.getLogger("swift.data")
REPORT = "ingest_report"
"""Name of the two files that tell what became of every source, without their endings."""
EXPORTED = "exported.csv"
"""Table beside files that `export` wrote; `ingest` of their folder reads it."""
_FIELDS = ("scan_id", "status", "reason", "source", "frames", "voxels", "tr", "seconds", "notes")
NAMES = ("store.json", "manifest.csv")


def line_differs(info: ScanInfo, attributes: dict[str, Any], taken: dict[str, str]) -> tuple[bool, str]:
    """Whether a line of the manifest says something else than the scan's own header. It may have more columns.

    Args:
        info: The line.
        attributes: The header.
        taken: Labels that an ingest took anew since, of the report: they are right too.

    Returns:
        Whether it differs, and, where nothing but phenotypes do, which ones: someone changed them.
    """
    numbers = info.frames == attributes["frames"] and info.voxels == attributes["voxels"]
    names = all(getattr(info, name) in (attributes[name], taken.get(name)) for name in fmt.COLUMNS[:6])
    if not (numbers and names and info.tr == float(attributes["tr"])):
        return True, ""
    told: dict[str, str] = {**json.loads(attributes["phenotypes"]), **taken}
    words = [
        f"{name} {info.phenotypes.get(name, 'missing')}, ingested {value or 'empty'}"
        for name, value in told.items()
        if name not in fmt.COLUMNS and info.phenotypes.get(name) != value
    ]
    return bool(words), "; ".join(words)


def mend_lists(path: Path, replica: Path, lines_differ: bool) -> list[str]:
    """Take the two files from a replica, where ours cannot be right and the replica's shards are ours.

    Args:
        path: The store.
        replica: Another copy.
        lines_differ: Lines of our manifest differ from the scans' headers.

    Returns:
        Names of the files that were replaced.
    """
    try:
        theirs = fmt.read_json(replica / "store.json")["shards"]
        fmt.decode_manifest(replica / "manifest.csv")
    except (UserError, OSError, KeyError):
        return []
    broken = [name for name in NAMES if _cannot_be_read(path / name) or (lines_differ and name == "manifest.csv")]
    if not broken or not _same_shards(path, theirs):
        return []
    changed = [name for name in broken if _read(path / name) != (replica / name).read_bytes()]
    for name in changed:
        fmt.write_bytes(path / name, (replica / name).read_bytes())
    return changed


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def _cannot_be_read(file: Path) -> bool:
    try:
        if file.name == "store.json":
            fmt.read_json(file)
        else:
            shards = {scan.shard for scan in fmt.decode_manifest(file)}
            return not all((file.parent / "shards" / shard).is_file() for shard in shards)
    except (UserError, OSError):
        return True
    return False


def _same_shards(path: Path, theirs: dict[str, Any]) -> bool:
    """Whether our shards have the names and sizes that the replica lists, and one of them its very bytes."""
    ours = {file.name: file.stat().st_size for file in (path / "shards").glob("*.h5")}
    if ours != {name: entry["bytes"] for name, entry in theirs.items()}:
        return False
    return any(fmt.file_hash(path / "shards" / name) == theirs[name]["xxh3_64"] for name in sorted(ours))


def read_report(store: Path) -> dict[str, Any]:
    """ingest_report.json of a store, or an empty dict."""
    path = store / f"{REPORT}.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        log.warning("%s is not readable and will be written anew", path)
        return {}


def write_report(store: Path, content: dict[str, Any]) -> None:
    """Both forms of the report; `scans` holds a row a source."""
    told = {"tool_version": tool_version(), **content}
    fmt.write_bytes(store / f"{REPORT}.json", (json.dumps(told, indent=1) + "\n").encode())
    text = io.StringIO()
    table = csv.DictWriter(text, _FIELDS, lineterminator="\n", restval="", extrasaction="ignore")
    table.writeheader()
    table.writerows({**row, "notes": " | ".join(row.get("notes", []))} for row in content.get("scans", []))
    fmt.write_bytes(store / f"{REPORT}.csv", text.getvalue().encode("utf-8", "backslashreplace"))

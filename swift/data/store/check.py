"""Look after a store: verify every checksum, copy it somewhere else and be sure of the copy.

Repair is in `swift.data.ingest.repair`, as it may prepare a scan anew from its source. A shard's hash in store.json
covers every byte of it. Where it differs, the checksums inside say which scan and frame; what lies outside of them
(HDF5's own structures) is named as the part "file".
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from swift.data.store import format as fmt
from swift.data.store.reader import Damage, Store
from swift.data.store.tables import REPORT, line_differs, read_report
from swift.utils.errors import UserError

BLOCK = 1 << 20
Progress = Callable[[str], None]
"""Told the name of every shard that is done."""


def describe(damage: Damage) -> str:
    """One line that names the place."""
    if not damage.shard:
        return damage.part
    if damage.changed:
        return f"scan {damage.scan} in manifest.csv: {damage.changed}"
    if damage.part == "bold":
        return f"shard {damage.shard}, scan {damage.scan}, frame {damage.frame}"
    where = f"shard {damage.shard}" + (f", scan {damage.scan}" if damage.scan else "")
    words = {
        "missing": "not there",
        "size": "cut short or too long",
        "file": "bytes outside of the scans' data",
        "manifest": "its line in manifest.csv differs from the scan's own header",
    }
    return f"{where}, {words.get(damage.part, damage.part)}"


# --------------------------------------------------------------------------------------------------------- verify
def verify(path: str | Path, workers: int = 1, progress: Progress | None = None) -> list[Damage]:
    """Compare every byte of every shard with its checksum.

    Args:
        path: The store.
        workers: Threads that read shards (hashing releases the interpreter's lock).
        progress: Called after each shard.

    Returns:
        What is damaged, in order of shard, scan and frame; empty when all is well. When a shard is missing or of the
        wrong size, damage in others is named by shard only: the store cannot be opened as a whole.

    Raises:
        UserError: not a store.
    """
    path = Path(path)
    shards: dict[str, Any] = fmt.read_json(path / "store.json").get("shards", {})

    def whole(name: str) -> list[Damage]:
        found = check_shard(path, name, shards[name])
        if progress is not None:
            progress(name)
        return found

    with ThreadPoolExecutor(max(1, workers)) as pool:
        files = [damage for found in pool.map(whole, sorted(shards)) for damage in found]
    if any(damage.part in ("missing", "size") for damage in files):
        return files
    store = Store(path)
    bad = {damage.shard for damage in files}
    found: list[Damage] = []
    taken = {row["scan_id"]: row.get("labels", {}) for row in read_report(path).get("scans", [])}
    for place, info in enumerate(store.scans):
        inside = store.check(place) if info.shard in bad else []
        if not any(damage.part == "header" for damage in inside):
            differs, changed = _differs(store, place, taken.get(info.scan_id, {}))
            inside += [Damage(info.shard, info.scan_id, "manifest", changed=changed)] if differs else []
        found += inside
    located = {damage.shard for damage in found if damage.part != "manifest"}
    store.close()
    return sorted(
        [*found, *(damage for damage in files if damage.shard not in located)],
        key=lambda damage: (damage.shard, damage.scan, damage.part, damage.frame or 0),
    )


def check_shard(path: Path, name: str, listed: dict[str, Any]) -> list[Damage]:
    """Compare one shard with its size and hash in store.json."""
    file = path / "shards" / name
    if not file.is_file():
        return [Damage(name, "", "missing")]
    if file.stat().st_size != listed["bytes"]:
        return [Damage(name, "", "size")]
    return [] if fmt.file_hash(file) == listed["xxh3_64"] else [Damage(name, "", "file")]


def _differs(store: Store, place: int, taken: dict[str, str]) -> tuple[bool, str]:
    try:
        return line_differs(store.scans[place], store.attributes(place), taken)
    except UserError:  # no such scan in that shard
        return True, ""


# ----------------------------------------------------------------------------------------------------------- copy
def copy(path: str | Path, target: str | Path, workers: int = 1, progress: Progress | None = None) -> dict[str, int]:
    """Copy a store, each shard verified while it is written; what is there and right already is kept.

    The manifest comes last, so a copy that was stopped is not taken for a store: run it again to go on.

    Args:
        path: The store.
        target: Folder of the copy.
        workers: Shards copied at the same time.
        progress: Called after each shard.

    Returns:
        Counts: copied, kept, bytes (of the copied).

    Raises:
        UserError: the source is damaged (names the shard), the target is another store, full or unwritable.
    """
    path, target = Path(path), Path(target)
    Store(path).close()  # whole, of our version
    shards: dict[str, Any] = fmt.read_json(path / "store.json")["shards"]
    if target.resolve() == path.resolve():
        raise UserError(f"{target}: is the store itself; name another folder")
    if (target / "store.json").is_file():
        theirs = fmt.read_json(target / "store.json").get("shards", {})
        other = sorted(name for name in theirs if shards.get(name, {}).get("xxh3_64") != theirs[name]["xxh3_64"])
        if other:
            raise UserError(f"{target}: holds another store (shard {other[0]} differs); name another folder")
    try:
        (target / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror})") from error

    def one(name: str) -> bool:
        there = not check_shard(target, name, shards[name])
        if not there:
            copy_file(path / "shards" / name, target / "shards" / name, shards[name]["xxh3_64"])
        if progress is not None:
            progress(name)
        return not there

    with ThreadPoolExecutor(max(1, workers)) as pool:
        copied = dict(zip(sorted(shards), pool.map(one, sorted(shards)), strict=True))
    for name in (f"{REPORT}.json", f"{REPORT}.csv", "store.json", "manifest.csv"):
        if (path / name).is_file():
            fmt.write_bytes(target / name, (path / name).read_bytes())
    done = [name for name, new in copied.items() if new]
    return {"copied": len(done), "kept": len(copied) - len(done), "bytes": sum(shards[name]["bytes"] for name in done)}


def copy_file(source: Path, target: Path, digest: str) -> None:
    """Copy a file under a temporary name, compare what was read with its hash, then rename.

    Raises:
        UserError: the source differs from its hash, or the target cannot be written.
    """
    with fmt.atomic(target) as temp:
        running = xxhash.xxh3_64()
        with source.open("rb") as right, temp.open("wb") as sink:
            while block := right.read(4 * BLOCK):
                running.update(block)
                sink.write(block)
        if running.hexdigest() != digest:
            raise UserError(f"{source}: differs from its checksum; run `python -m swift.data repair` on it first")
        if fmt.file_hash(temp) != digest:
            raise UserError(f"{target}: what was written reads back differently; is the disk failing?")

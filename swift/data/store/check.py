"""Look after a store: verify every checksum, repair what is damaged, copy it somewhere else and be sure of the copy.

A shard's hash in store.json covers every byte of it. Where it differs, the checksums inside say which scan and frame;
what lies outside of them (HDF5's own structures) is named as the part "file".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from swift.data.ingest.nifti import sha256_file
from swift.data.ingest.pipeline import REPORT, read_report
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.ingest.sources import Source
from swift.data.store import format as fmt
from swift.data.store.reader import Damage, Store
from swift.data.store.stats import quantize, summarize
from swift.data.store.tables import agrees, mend_lists
from swift.utils.errors import UserError

BLOCK = 1 << 20
Progress = Callable[[str], None]
"""Told the name of every shard that is done."""


def describe(damage: Damage) -> str:
    """One line that names the place."""
    if not damage.shard:
        return damage.part
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
        found = _check_shard(path, name, shards[name])
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
    for place, info in enumerate(store.scans):
        inside = store.check(place) if info.shard in bad else []
        if not any(damage.part == "header" for damage in inside) and not _agrees(store, place):
            inside.append(Damage(info.shard, info.scan_id, "manifest"))
        found += inside
    located = {damage.shard for damage in found if damage.part != "manifest"}
    store.close()
    return sorted(
        [*found, *(damage for damage in files if damage.shard not in located)],
        key=lambda damage: (damage.shard, damage.scan, damage.part, damage.frame or 0),
    )


def _check_shard(path: Path, name: str, listed: dict[str, Any]) -> list[Damage]:
    file = path / "shards" / name
    if not file.is_file():
        return [Damage(name, "", "missing")]
    if file.stat().st_size != listed["bytes"]:
        return [Damage(name, "", "size")]
    return [] if fmt.file_hash(file) == listed["xxh3_64"] else [Damage(name, "", "file")]


def _agrees(store: Store, place: int) -> bool:
    try:
        return agrees(store.scans[place], store.attributes(place))
    except UserError:  # no such scan in that shard
        return False


# --------------------------------------------------------------------------------------------------------- repair
@dataclass
class Repair:
    """What a repair did: (damage, where the bytes came from), and (damage, why not)."""

    fixed: list[tuple[Damage, str]] = field(default_factory=list)
    left: list[tuple[Damage, str]] = field(default_factory=list)


def repair(path: str | Path, replica: str | Path | None = None, sources: Iterable[Source] = ()) -> Repair:
    """Put the right bytes back; nothing is written that does not fit its checksum.

    Args:
        path: The store.
        replica: Another copy. The same scans in other shards serve too, for frames and arrays; the same shards also
            for store.json and manifest.csv.
        sources: Where the scans came from, for frames and arrays; each is prepared again with the recipe of the last
            ingest.

    Raises:
        UserError: neither replica nor source, not a store, unwritable.
    """
    path, sources = Path(path), list(sources)
    if replica is None and not sources:
        raise UserError("repair needs the right bytes from somewhere: --replica STORE or --source PATH")
    outcome = Repair()
    if replica is not None:
        outcome.fixed += [(Damage("", "", name), "replica") for name in mend_lists(path, Path(replica), False)]
    broken = verify(path)
    lines = [damage for damage in broken if damage.part == "manifest"]
    if replica is not None and lines and mend_lists(path, Path(replica), True):
        still = verify(path)
        outcome.fixed += [(damage, "replica") for damage in lines if damage not in still]
        broken = still
    if replica is not None:
        for name in sorted({damage.shard for damage in broken if damage.part != "manifest"}):
            if _mend_shard(path, Path(replica), name):
                outcome.fixed += [(damage, "replica") for damage in broken if damage.shard == name]
        broken = [damage for damage in broken if damage not in [done for done, _ in outcome.fixed]]
    lost = [damage for damage in broken if damage.part in ("missing", "size")]
    if lost:
        reason = "needs a replica that has this shard"
        outcome.left += [(damage, reason) for damage in broken]
        return outcome
    by_name = {source.scan_id: source for source in sources}
    for scan in sorted({damage.scan for damage in broken if damage.scan}):
        _repair_scan(path, scan, None if replica is None else Path(replica), by_name.get(scan), outcome)
    for damage in broken:
        if not damage.scan:
            outcome.left.append((damage, "needs a replica with the same shards"))
        elif damage.part == "manifest":
            outcome.left.append((damage, "correct the line in manifest.csv by hand"))
    return outcome


def _mend_shard(path: Path, replica: Path, name: str) -> bool:
    """Make a shard equal to the replica's, if that one has the hash that ours should have."""
    listed = fmt.read_json(path / "store.json")["shards"][name]
    good, bad = replica / "shards" / name, path / "shards" / name
    if not good.is_file() or good.stat().st_size != listed["bytes"] or fmt.file_hash(good) != listed["xxh3_64"]:
        return False
    try:
        if not bad.is_file() or bad.stat().st_size != listed["bytes"]:
            copy_file(good, bad, listed["xxh3_64"])
            return True
        with good.open("rb") as right, bad.open("r+b") as wrong:
            place = 0
            while block := right.read(BLOCK):
                if wrong.read(len(block)) != block:
                    wrong.seek(place)
                    wrong.write(block)
                    wrong.flush()
                place += len(block)
                wrong.seek(place)
            os.fsync(wrong.fileno())
    except OSError as error:
        raise UserError(f"{bad}: cannot be written ({error.strerror or error})") from error
    return fmt.file_hash(bad) == listed["xxh3_64"]


def _repair_scan(path: Path, scan: str, replica: Path | None, source: Source | None, outcome: Repair) -> None:
    """Arrays first (the frames' checksums are one of them), then frames."""
    givers: list[tuple[str, Callable[[], dict[str, np.ndarray]]]] = []
    if replica is not None:
        givers.append(("replica", lambda: _from_replica(replica, scan)))
    if source is not None:
        givers.append(("source", lambda: _from_source(path, scan, source)))
    reasons: list[str] = []
    for label, give in givers:
        damage = _damage(path, scan)
        if not damage:
            break
        try:
            right = give()
        except UserError as error:
            reasons.append(f"{label}: {error}")
            continue
        arrays = [one for one in damage if one.part in right and one.part != "bold"]
        outcome.fixed += [(one, label) for one in arrays if _write_array(path, one, right[one.part])]
        frames = [one for one in _damage(path, scan) if one.part == "bold"] if "bold" in right else []
        outcome.fixed += [(one, label) for one in frames if _write_frame(path, one, right["bold"])]
    for one in _damage(path, scan):
        why = "needs a replica with the same shards" if one.part == "header" else "no right bytes among those given"
        outcome.left.append((one, "; ".join([*reasons, why])))


def _damage(path: Path, scan: str) -> list[Damage]:
    store = Store(path)
    try:
        return store.check(store.find(scan))
    finally:
        store.close()


def _from_replica(replica: Path, scan: str) -> dict[str, np.ndarray]:
    """Arrays of a scan as another store has them; each is compared with our checksum before it is used."""
    store = Store(replica)
    info = store.scans[store.find(scan)]
    where = replica / "shards" / info.shard
    store.close()
    try:
        with h5py.File(where, "r", locking=False) as file:
            group = fmt.safe_group(file, scan, str(where))
            names = ["mask", "checksum", "bold", *fmt.VECTORS, *(["confounds"] if "confounds" in group else [])]
            return {name: fmt.safe_dataset(group, name, str(where))[...] for name in names}
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{where}: scan {scan} is not readable ({error})") from error


def _from_source(path: Path, scan: str, source: Source) -> dict[str, np.ndarray]:
    """Make a scan's arrays once more, as ingest did."""
    store = Store(path)
    told = store.attributes(store.find(scan)).get("source_sha256")
    if not source.is_frames and told and sha256_file(source.path) != told:
        raise UserError(f"{source.path.name} is not the file that was ingested (SHA-256 differs)")
    known = {key: value for key, value in read_report(path).get("recipe", {}).items() if key in Recipe.__annotations__}
    recipe = Recipe(**{**known, "grid": store.grid, "spacing": store.spacing})
    store.close()
    ready = prepare(source, recipe)
    summary = summarize(ready.bold)
    codes = quantize(ready.bold, summary.scale, summary.offset)
    arrays = {"mask": ready.mask.astype(np.uint8), "scale": summary.scale, "offset": summary.offset, "bold": codes}
    arrays |= {f"stats/{name}": array for name, array in summary.voxel.items()}
    arrays["checksum"] = fmt.row_hashes(codes)
    if ready.header.confounds is not None:
        arrays["confounds"] = ready.header.confounds
    return arrays


def _write_array(path: Path, damage: Damage, right: np.ndarray) -> bool:
    """Write a small dataset in place if it fits the checksum that is stored with it."""
    file = path / "shards" / damage.shard
    with h5py.File(file, "r", locking=False) as opened:
        dataset = fmt.safe_dataset(fmt.safe_group(opened, damage.scan, str(file)), damage.part, str(file))
        offset, want = dataset.id.get_offset(), dataset.attrs.get("xxh3_64")
        fits = dataset.shape == right.shape and fmt.array_hash(right) == want and offset is not None
        data = np.ascontiguousarray(right, dtype=dataset.dtype).tobytes()
    return fits and _write_at(file, offset, data)


def _write_frame(path: Path, damage: Damage, bold: np.ndarray) -> bool:
    """Write one frame in place if it fits its checksum."""
    file = path / "shards" / damage.shard
    assert damage.frame is not None
    with h5py.File(file, "r", locking=False) as opened:
        group = fmt.safe_group(opened, damage.scan, str(file))
        dataset = fmt.safe_dataset(group, "bold", str(file))
        shape, offset = dataset.shape, dataset.id.get_offset()
        want = fmt.safe_dataset(group, "checksum", str(file))[damage.frame]
    if bold.shape != shape or fmt.row_hashes(bold[damage.frame : damage.frame + 1])[0] != want:
        return False
    row = np.ascontiguousarray(bold[damage.frame], dtype="<i2").tobytes()
    return _write_at(file, offset + damage.frame * len(row), row)


def _write_at(file: Path, offset: int, data: bytes) -> bool:
    try:
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error
    return True


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
        there = not _check_shard(target, name, shards[name])
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

"""Put the right bytes back into a damaged store: from a replica, or by preparing a scan once more from its source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from swift.data.ingest.nifti import sha256_file
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.ingest.sources import Source
from swift.data.store import format as fmt
from swift.data.store.check import BLOCK, copy_file, verify
from swift.data.store.reader import Damage, Store
from swift.data.store.stats import quantize, summarize
from swift.data.store.tables import mend_lists, read_report
from swift.utils.errors import UserError


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
        elif damage.part == "manifest" and not damage.changed:
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
        with fmt.open_hdf5(where) as file:
            group = fmt.safe_group(file, scan, str(where))
            names = ["mask", "checksum", "bold", *fmt.VECTORS]
            names += [extra for extra in ("confounds", "confound_names") if extra in group]
            return {name: fmt.safe_dataset(group, name, str(where))[...] for name in names}
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{where}: scan {scan} is not readable ({error})") from error


def _from_source(path: Path, scan: str, source: Source) -> dict[str, np.ndarray]:
    """Make a scan's arrays once more, as ingest did."""
    store = Store(path)
    told = store.attributes(store.find(scan)).get("source_sha256")
    if not source.is_frames and told and _hash(source) != told:
        raise UserError(f"{source.path.name} is not the file that was ingested (SHA-256 differs)")
    known = {key: value for key, value in read_report(path).get("recipe", {}).items() if key in Recipe.__annotations__}
    known |= {"grid": store.grid, "spacing": store.spacing, "any_size": True, "cropped": True}
    recipe = Recipe(**{**known, "as_version_1": store.version == 1})
    store.close()
    ready = prepare(source, recipe)
    summary = summarize(ready.bold)
    codes = quantize(ready.bold, summary.scale, summary.offset)
    arrays = {"mask": ready.mask.astype(np.uint8), "scale": summary.scale, "offset": summary.offset, "bold": codes}
    arrays |= {f"stats/{name}": array for name, array in summary.voxel.items()}
    arrays["checksum"] = fmt.row_hashes(codes)
    if ready.header.confounds is not None:
        arrays["confounds"] = ready.header.confounds
        arrays["confound_names"] = fmt.encode_names(ready.header.confound_names)
    return arrays


def _hash(source: Source) -> str:
    try:
        return sha256_file(source.path)
    except OSError as error:
        raise UserError(f"{source.path}: cannot be read ({error.strerror or error})") from error


def _write_array(path: Path, damage: Damage, right: np.ndarray) -> bool:
    """Write a small dataset in place if it fits the checksum that is stored with it."""
    file = path / "shards" / damage.shard
    with fmt.open_hdf5(file) as opened:
        dataset = fmt.safe_dataset(fmt.safe_group(opened, damage.scan, str(file)), damage.part, str(file))
        offset, want = dataset.id.get_offset(), dataset.attrs.get("xxh3_64")
        fits = dataset.shape == right.shape and fmt.array_hash(right) == want and offset is not None
        data = np.ascontiguousarray(right, dtype=dataset.dtype).tobytes()
    return fits and _write_at(file, offset, data)


def _write_frame(path: Path, damage: Damage, bold: np.ndarray) -> bool:
    """Write one frame in place if it fits its checksum."""
    file = path / "shards" / damage.shard
    assert damage.frame is not None
    with fmt.open_hdf5(file) as opened:
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

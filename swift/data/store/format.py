"""The bytes of a store, format version 2, and how version 1 is read: names, limits, safe access to files of others.

A store is a folder: `store.json` (version, grid, spacing, where the grid lies, the shards with size and hash),
`manifest.csv` (one line a scan) and `shards/NNNNN.h5`. Docs: the group layout of a shard is in `put_scan`. Every byte
of a shard follows from the scans in it: no time stamps, no host names, a fixed HDF5 version, so that an ingest that was
killed and continued gives the same files as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from swift.data.store.spaces import OWN
from swift.utils.errors import BadScan, UserError

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
SCAN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
SHARD_NAME = re.compile(r"\d{5,9}\.h5")
COLUMNS = ("scan_id", "subject", "session", "task", "run", "site", "shard", "frames", "voxels", "tr")
STATS = ("mean", "std", "min", "max", "median", "iqr")
VECTORS = ("scale", "offset", *(f"stats/{name}" for name in STATS))
DESCRIPTION = {
    1: {"format_version", "grid", "spacing", "tool", "tool_version", "shards", "xxh3_64"},
    2: {"format_version", "grid", "spacing", "placement", "spaces", "tool", "tool_version", "shards", "xxh3_64"},
}
"""Keys of store.json by format version."""
HDF5_OPTIONS: dict[str, Any] = {
    "libver": ("earliest", "v110"),
    "alignment_threshold": 1 << 16,
    "alignment_interval": 4096,  # clips start on pages
}
MAX_ATTRIBUTE = 60_000  # HDF5 keeps attributes below 64 KiB in an object header


class CorruptData(UserError):
    """Stored bytes differ from their checksum.

    `shard`, `scan` (scan_id) and `frame` (None: not a frame) say where; they are empty if the error comes out of a
    DataLoader worker, which keeps the message only.
    """

    def __init__(self, message: str, shard: str = "", scan: str = "", frame: int | None = None) -> None:
        # A DataLoader makes the error again from the worker's whole traceback; its last line is our message.
        super().__init__(message.rstrip().rpartition("CorruptData: ")[2])
        self.shard, self.scan, self.frame = shard, scan, frame

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.shard, self.scan, self.frame)


@dataclass(frozen=True)
class ScanInfo:
    """One line of the manifest.

    `shard` is empty for a scan that is staged and not yet packed; `tr` is in seconds; `phenotypes` holds every further
    column as the text it was.
    """

    scan_id: str
    subject: str
    session: str
    task: str
    run: str
    site: str
    shard: str
    frames: int
    voxels: int
    tr: float
    phenotypes: dict[str, str] = field(default_factory=dict)


@dataclass
class ScanHeader:
    """What is known of a scan besides its voxels.

    Attributes:
        scan_id: Unique in the store; letters, digits, `_ . + -`.
        tr: Seconds.
        affine: (4, 4) from voxel indices of the stored grid to mm, RAS+.
        orientation: Axis codes of the stored grid.
        source: Name of the file that it came from (not a path of the machine); `source_sha256` its hash.
        nan_voxels, flat_voxels: Voxels that ingestion took out of the mask for that reason.
        clipped: Values that ingestion limited.
        notes: Sentences that were said about this scan (assumptions, corrections).
        phenotypes: Further columns of the manifest.
        confounds: (T, K) float32 with K `confound_names`, or None.
        events: The scan's events.tsv as text, "" where there is none: tab-separated, onset and duration in seconds.
        space: Space that the scan was given in (BIDS names; `MNI`: which one is not said); "": not known.
        placement: Where the grid lies: the name of a template's box, or `spaces.OWN`. One for all scans of a store.
        start_time: Seconds from the start of the run (the zero of its events) to the time of the first kept frame.
        dropped: Frames at the start of the series that were left out before the first kept one.
    """

    scan_id: str
    subject: str
    tr: float
    affine: np.ndarray
    session: str = ""
    task: str = ""
    run: str = ""
    site: str = ""
    orientation: str = "RAS"
    source: str = ""
    source_sha256: str = ""
    nan_voxels: int = 0
    flat_voxels: int = 0
    clipped: int = 0
    notes: list[str] = field(default_factory=list)
    phenotypes: dict[str, str] = field(default_factory=dict)
    confounds: np.ndarray | None = None
    confound_names: list[str] = field(default_factory=list)
    events: str = ""
    space: str = ""
    placement: str = OWN
    start_time: float = 0.0
    dropped: int = 0


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """xxh3_64 of every row's bytes. rows (n, V) C-contiguous -> (n,) uint64."""
    return np.fromiter((xxhash.xxh3_64_intdigest(row.data) for row in rows), np.uint64, len(rows))


def array_hash(array: np.ndarray) -> np.uint64:
    """xxh3_64 of an array's bytes in C order."""
    return np.uint64(xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).data))


def header_hash(attributes: dict[str, Any]) -> np.uint64:
    """xxh3_64 over the attributes of a scan, in the order of their names (header_xxh3_64 itself left out)."""
    digest = xxhash.xxh3_64()
    for name in sorted(attributes):
        if name != "header_xxh3_64":
            value = attributes[name]
            raw = value.encode() if isinstance(value, str) else np.asarray(value).tobytes()
            digest.update(f"{name}\0{len(raw)}\0".encode() + raw)
    return np.uint64(digest.intdigest())


def file_hash(path: Path) -> str:
    """xxh3_64 of a file's bytes, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ writing a shard
def _attribute(group: h5py.Group, name: str, value: Any) -> None:
    if isinstance(value, str):
        raw = value.encode()
        if len(raw) > MAX_ATTRIBUTE:
            raise BadScan(f"scan {group.name}: {name} has {len(raw)} bytes; at most {MAX_ATTRIBUTE} can be kept")
        # Fixed length: a variable one would go to HDF5's global heap.
        kind = h5py.string_dtype("utf-8", max(1, len(raw)))
        group.attrs.create(name, np.array(raw, dtype=kind), dtype=kind)
    else:
        group.attrs.create(name, value)


def reserve_bold(group: h5py.Group, frames: int, voxels: int) -> None:
    """An empty contiguous (T, V) int16 dataset whose place in the file is fixed; its bytes are written past HDF5."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_layout(h5py.h5d.CONTIGUOUS)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    options.set_obj_track_times(False)
    space = h5py.h5s.create_simple((frames, voxels))
    h5py.h5d.create(group.id, b"bold", h5py.h5t.STD_I16LE, space, dcpl=options)


def put_scan(
    root: h5py.Group, attributes: dict[str, Any], arrays: dict[str, np.ndarray], frames: int, voxels: int
) -> None:
    """Lay out `/scans/<scan_id>`: attributes, small datasets (each with its xxh3_64), and room for `bold`.

    Args:
        root: The shard.
        attributes: `scan_id` and everything of ScanHeader that is not an array, plus `affine` and `grid`.
        arrays: mask (X, Y, Z) uint8; scale, offset and stats/* (V,) float32; checksum (T,) uint64; confounds, and
            confound_names as bytes.
        frames: T.
        voxels: V.
    """
    group = root.require_group("scans").create_group(attributes["scan_id"])
    for name in sorted(attributes):  # not in the order of the caller, who may have read them from another shard
        _attribute(group, name, attributes[name])
    group.attrs.create("header_xxh3_64", header_hash(attributes))
    for name, array in arrays.items():
        dataset = group.create_dataset(name, data=array, track_times=False)
        dataset.attrs.create("xxh3_64", array_hash(array))
    reserve_bold(group, frames, voxels)


def encode_names(names: list[str]) -> np.ndarray:
    """Names of confounds as a dataset, (n,) uint8 of JSON text: an attribute would end at 64 KiB."""
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def printable(text: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are no UTF-8 become their escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def open_hdf5(path: Path) -> h5py.File:
    """Open a shard for reading, without a lock; or as plain h5py has it open in this process already.

    Raises:
        OSError: it is no HDF5 file, or cannot be read.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")


def bold_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Place of every scan's bold in a shard that we wrote: scan_id -> (offset, bytes)."""
    with open_hdf5(path) as file:
        return {
            name: (group["bold"].id.get_offset(), group["bold"].id.get_storage_size())
            for name, group in file["scans"].items()
        }


# ----------------------------------------------------------------------------------------------- reading a shard
def safe_dataset(group: h5py.Group, name: str, where: str) -> h5py.Dataset:
    """A plain dataset of a file that may be foreign.

    Refuses what could read other files or needs code that we do not have: soft and external links, external storage,
    virtual datasets, filters, chunks.

    Raises:
        UserError: naming the file, the dataset and the reason.
    """
    parent, here = group, where
    for part in name.split("/"):
        link = parent.get(part, getlink=True)
        if link is None:
            raise UserError(f"{here}: no dataset {name}; is this a shard of a swift store?")
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{here}: {name} is a {type(link).__name__}; only data inside the file itself is read")
        parent = parent[part]
    dataset = parent
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{here}: {name} is not a dataset")
    options = dataset.id.get_create_plist()
    if dataset.is_virtual:
        raise UserError(f"{here}: {name} is a virtual dataset; only data inside the file itself is read")
    if options.get_external_count():
        raise UserError(f"{here}: {name} keeps its bytes in another file; only data inside the file itself is read")
    if count := options.get_nfilters():
        names = ", ".join(str(options.get_filter(i)[0]) for i in range(count))
        raise UserError(f"{here}: {name} has HDF5 filters (numbers {names}); format {FORMAT_VERSION} has none")
    if dataset.chunks is not None:
        raise UserError(f"{here}: {name} is chunked; format {FORMAT_VERSION} is contiguous")
    return dataset


def safe_group(file: h5py.File, scan_id: str, where: str) -> h5py.Group:
    """`/scans/<scan_id>`, reached by hard links only."""
    parent: h5py.Group = file
    for part in ("scans", scan_id):
        link = parent.get(part, getlink=True)
        if link is None:
            raise UserError(f"{where}: scan {scan_id} is not in it")
        if not isinstance(link, h5py.HardLink) or not isinstance(parent[part], h5py.Group):
            raise UserError(f"{where}: {part} is a {type(link).__name__}, not a group of the file itself")
        parent = parent[part]
    return parent


def attributes_of(group: h5py.Group, where: str) -> dict[str, Any]:
    """All attributes of a scan: text as str, numbers as NumPy values."""
    found: dict[str, Any] = {}
    for name in group.attrs:
        try:
            value = group.attrs[name]
            found[name] = value.decode() if isinstance(value, bytes) else value
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{where}: attribute {name} of {group.name} cannot be read ({error})") from error
    return found


# ------------------------------------------------------------------------------------------------- small files
def encode_manifest(scans: list[ScanInfo]) -> bytes:
    """manifest.csv: the fixed columns, then phenotypes in the order in which scans bring them."""
    extra = list(dict.fromkeys(name for scan in scans for name in scan.phenotypes))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *extra])
    for scan in scans:
        fixed = [getattr(scan, name) for name in COLUMNS]
        writer.writerow([*fixed[:-1], repr(float(scan.tr)), *(scan.phenotypes.get(name, "") for name in extra)])
    return text.getvalue().encode()


def decode_manifest(path: Path) -> list[ScanInfo]:
    """Read manifest.csv; UserError names the line that cannot be."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; a manifest has {', '.join(COLUMNS)}")
    scans: list[ScanInfo] = []
    seen: set[str] = set()
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{where}: has not {len(rows.fieldnames or [])} fields")
        if not SHARD_NAME.fullmatch(row["shard"]) or not SCAN_ID.fullmatch(row["scan_id"]):
            raise UserError(f"{where}: scan {row['scan_id']!r} in shard {row['shard']!r} are not legal names")
        if row["scan_id"] in seen:
            raise UserError(f"{where}: a second scan {row['scan_id']}")
        seen.add(row["scan_id"])
        try:
            numbers = int(row["frames"]), int(row["voxels"]), float(row["tr"])
        except ValueError as error:
            raise UserError(f"{where}: frames, voxels and tr must be numbers ({error})") from error
        rest = {name: value for name, value in row.items() if name not in COLUMNS}
        texts = {name: row[name] for name in COLUMNS[:7]}
        scans.append(ScanInfo(**texts, frames=numbers[0], voxels=numbers[1], tr=numbers[2], phenotypes=rest))
    return scans


def encode_json(content: dict[str, Any]) -> bytes:
    """store.json: the description, and the xxh3_64 of its compact JSON with sorted keys."""
    told = {name: value for name, value in content.items() if name != "xxh3_64"}
    digest = xxhash.xxh3_64_hexdigest(json.dumps(told, sort_keys=True).encode())
    return (json.dumps({**told, "xxh3_64": digest}, indent=1) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """store.json, with its version and its checksum checked."""
    try:
        raw = path.read_bytes()
        content = json.loads(raw.decode("utf-8"))
        version = content["format_version"]
        grid, spacing = content["grid"], content["spacing"]
        well = len(grid) == 3 and all(isinstance(n, int) and n > 0 for n in grid) and float(spacing) > 0
    except (FileNotFoundError, NotADirectoryError) as error:
        kind = "a file, not the folder of" if path.parent.is_file() else f"no {path.name}; not"
        raise UserError(f"{path.parent}: {kind} a swift store") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the description of a swift store ({error!r})") from error
    if version not in READ_VERSIONS:
        hint = "update swift" if isinstance(version, int) and version > FORMAT_VERSION else "ingest again"
        raise UserError(f"{path}: format version {version!r}; this swift reads versions 1 and 2: {hint}")
    # An unknown key may be a damaged "xxh3_64"; a store without it is an early one.
    unknown = set(content) - DESCRIPTION[version]
    if unknown or ("xxh3_64" in content and raw != encode_json(content)):
        raise UserError(f"{path}: differs from its own checksum; run `python -m swift.data repair` with a replica")
    if not well:
        raise UserError(f"{path}: grid {grid!r} and spacing {spacing!r} must be three voxel counts and mm above 0")
    if version > 1 and not (isinstance(content.get("placement"), str) and content["placement"]):
        raise UserError(f"{path}: does not say where its grid lies (placement)")
    return content


# ------------------------------------------------------------------------------------------------------ on disk
def sync_folder(path: Path) -> None:
    """Make renames in a folder last."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """A name beside `path` that no other writer uses."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{threading.get_ident()}")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name; on success fsync it and rename it to `path`, on failure remove it.

    Raises:
        UserError: the file system is full (or over quota), read-only or not ours to write.
    """
    temp = temporary(path)
    try:
        yield temp
        handle = os.open(temp, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temp, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # HDF5 reports a failed write as either
        raise explain(error, path) from error
    finally:
        temp.unlink(missing_ok=True)


def explain(error: OSError | RuntimeError, path: Path) -> Exception:
    """A UserError for what a user can mend, else the error itself."""
    number = getattr(error, "errno", None)
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
        if number == code or os.strerror(code) in text:
            return UserError(f"{path}: cannot be written: {os.strerror(code)}. Nothing of it was kept; run again.")
    return error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with atomic(path) as temp:
        temp.write_bytes(content)

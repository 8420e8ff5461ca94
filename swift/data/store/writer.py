"""Writing a store so that a kill at any moment loses at most the scan in hand.

Each scan is first written, whole, to `staging/<scan_id>.h5` (a shard of one scan) under a temporary name and renamed.
`close` packs the staged scans, ordered by scan_id, into shards; a shard is committed by its lines in the manifest, and
only then its staged files go. Whatever is there at a restart, the same scans end in the same shards, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from swift.data.store import format as fmt
from swift.data.store.format import COLUMNS, ScanHeader, ScanInfo
from swift.data.store.spaces import OWN
from swift.data.store.stats import quantize, summarize
from swift.utils.errors import BadScan, UserError

if TYPE_CHECKING:
    from typing import Self

BLOCK = 1 << 24
HEADER_TEXTS = (
    *("scan_id", "subject", "session", "task", "run", "site", "orientation", "source", "source_sha256"),
    *("space", "placement"),
)
HEADER_COUNTS = ("nan_voxels", "flat_voxels", "clipped", "dropped")


def tool_version() -> str:
    """Version of the installed swift-fmri."""
    try:
        return metadata.version("swift-fmri")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


class StoreWriter:
    """Makes a store, or adds scans to one.

    Picklable; the state is in the folder: worker processes may each `add` scans through a copy, and one process
    calls `close` at the end. As a context manager it closes only if the block ended well.

    Args:
        path: Folder of the store; made if it does not exist.
        grid: Voxels (X, Y, Z).
        spacing: Isotropic voxel size, mm.
        shard_bytes: A shard is full when one more scan would bring its voxels above this; 1 gives one-scan shards.
        placement: Where the grid of all scans lies: the name of a template's box, or `spaces.OWN`.

    Raises:
        UserError: the folder is a store of another grid, placement or version, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        grid: Sequence[int],
        spacing: float,
        shard_bytes: int = 4 << 30,
        placement: str = OWN,
    ) -> None:
        self.path = Path(path)
        self.placement = placement
        self.grid = tuple(int(n) for n in grid)
        self.spacing = float(spacing)
        self.shard_bytes = int(shard_bytes)
        if len(self.grid) != 3 or min(self.grid) < 1 or not self.spacing > 0 or self.shard_bytes < 1:
            raise UserError(
                f"grid {list(grid)}, spacing {spacing} mm, shard_bytes {shard_bytes}: three voxel counts, a size in mm "
                "and a number of bytes, all above 0"
            )
        try:
            (self.path / "shards").mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made a store: {error.strerror}") from error
        description = self.path / "store.json"
        if description.exists():
            have = fmt.read_json(description)
            if have["format_version"] != fmt.FORMAT_VERSION:
                raise UserError(
                    f"{self.path}: is of format version {have['format_version']}; new scans go into another folder, or "
                    "move it first: python -m swift.data place"
                )
            if tuple(have["grid"]) != self.grid or float(have["spacing"]) != self.spacing:
                raise UserError(
                    f"{self.path}: holds scans of grid {have['grid']} at {have['spacing']} mm, not {list(self.grid)} "
                    f"at {self.spacing} mm; use another folder"
                )
            if have["placement"] != self.placement:
                raise UserError(
                    f"{self.path}: holds scans with their grid in {have['placement']!r}, not {self.placement!r}: scans "
                    "of two kinds of space do not go into one store; use another folder"
                )
        else:
            self._write_description({}, [])
        self._names = frozenset(scan.scan_id for scan in self.packed())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    @property
    def _staging(self) -> Path:
        return self.path / "staging"

    def packed(self) -> list[ScanInfo]:
        """Scans that are in the manifest."""
        manifest = self.path / "manifest.csv"
        return fmt.decode_manifest(manifest) if manifest.exists() else []

    def done(self) -> set[str]:
        """Names of all scans that need not be added again: packed or staged whole."""
        staged = {file.name[: -len(".h5")] for file in self._staging.glob("[!.]*.h5")}
        return staged | self._names

    def add(self, header: ScanHeader, mask: np.ndarray, bold: np.ndarray) -> ScanInfo:
        """Write one scan.

        Args:
            header: Names, TR, affine, provenance.
            mask: (X, Y, Z) bool, V of them True.
            bold: (T, V) float32 values of the True voxels in C order, finite. May be a memory map.

        Returns:
            The scan as it will be in the manifest; its shard is known after `close`.

        Raises:
            BadScan: this scan cannot be stored (shapes, values, TR, affine).
            UserError: the name is taken or not legal; the disk is full.
        """
        self._check(header, mask, bold)
        path = self._staging / f"{header.scan_id}.h5"
        if path.exists() or header.scan_id in self._names:
            raise UserError(f"{self.path}: there is already a scan {header.scan_id}; two scans cannot have one name")
        frames, voxels = bold.shape
        summary = summarize(bold)
        arrays = {"mask": mask.astype(np.uint8), "scale": summary.scale, "offset": summary.offset}
        arrays |= {f"stats/{name}": array for name, array in summary.voxel.items()}
        if header.confounds is not None:
            arrays["confounds"] = np.asarray(header.confounds, np.float32)
            arrays["confound_names"] = fmt.encode_names(header.confound_names)
        attributes = _attributes(header, self.grid, self.spacing, frames, voxels)
        attributes |= {name: np.float64(value) for name, value in summary.brain.items()}
        attributes["constant_voxels"] = np.int64(summary.constant)
        if header.events:  # only where there are some: other scans keep the bytes they had before events were known
            attributes["events"] = header.events

        def blocks() -> Iterator[np.ndarray]:
            step = max(1, BLOCK // (8 * voxels))
            for start in range(0, frames, step):
                yield quantize(bold[start : start + step], summary.scale, summary.offset)

        self._staging.mkdir(exist_ok=True)
        with fmt.atomic(path) as temp:
            _write_scans(temp, [(attributes, arrays, (frames, voxels), blocks)])
        return _info(attributes, "")

    def _check(self, header: ScanHeader, mask: np.ndarray, bold: np.ndarray) -> None:
        name = header.scan_id
        if not fmt.SCAN_ID.fullmatch(name):
            raise BadScan(f"scan name {name!r}: at most 200 letters, digits, _ . + - and not beginning with . + or -")
        if tuple(mask.shape) != self.grid or mask.dtype != np.bool_:
            raise BadScan(f"{name}: mask {mask.dtype} {mask.shape}; the store wants bool {self.grid}")
        if bold.ndim != 2 or bold.shape[1] != int(mask.sum()):
            raise BadScan(f"{name}: values {bold.shape}; the mask wants (frames, {int(mask.sum())})")
        affine = np.asarray(header.affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise BadScan(f"{name}: affine must be 4 x 4 finite numbers, got {affine.tolist()}")
        if not (np.isfinite(header.tr) and header.tr > 0):
            raise BadScan(f"{name}: TR {header.tr} s; it must be above 0")
        if not header.subject:
            raise BadScan(f"{name}: no subject; splits need one")
        taken = set(header.phenotypes) & set(COLUMNS)
        if taken:
            raise BadScan(f"{name}: phenotype columns {sorted(taken)} have names that the manifest itself uses")
        if header.placement != self.placement:
            raise BadScan(
                f"{name}: its grid lies in {header.placement!r}, the store's in {self.placement!r}: scans of two kinds "
                "of space do not go into one store"
            )
        if not np.isfinite(header.start_time) or header.dropped < 0:
            raise BadScan(f"{name}: start_time {header.start_time} s, {header.dropped} frames dropped")
        if header.confounds is not None:
            want = (bold.shape[0], len(header.confound_names))
            if np.shape(header.confounds) != want:
                raise BadScan(f"{name}: confounds {np.shape(header.confounds)}; frames and names want {want}")

    def close(self) -> None:
        """Pack the staged scans into shards and write manifest and description. May be called again."""
        with self._lock():
            staged = sorted(self._staging.glob("[!.]*.h5"), key=lambda file: file.name[: -len(".h5")])
            scans = self.packed()
            have = {scan.scan_id for scan in scans}
            for file in staged:
                if file.name[: -len(".h5")] in have:  # committed by a run that ended before it could tidy up
                    file.unlink()
            todo = [Packable(_bold_bytes(file), partial(read_staged, file), file) for file in staged if file.exists()]
            self._pack(scans, todo)

    def take(self, found: Sequence[tuple[ScanInfo, Callable[[], Staged]]]) -> None:
        """Pack scans that lie elsewhere, in this order; those that are here already are left out.

        Called again with the same scans after a kill, it gives the same shards.

        Args:
            found: The line of each scan in the manifest, and what reads its content.
        """
        with self._lock():
            scans = self.packed()
            have = {scan.scan_id for scan in scans}
            todo = [
                Packable(2 * info.frames * info.voxels, read, None, info)
                for info, read in found
                if info.scan_id not in have
            ]
            self._pack(scans, todo)

    def _pack(self, scans: list[ScanInfo], todo: list[Packable]) -> None:
        """Write scans into new shards behind those that hold `scans`."""
        description = fmt.read_json(self.path / "store.json")
        spaces = set(description["spaces"])
        used = {scan.shard for scan in scans}
        shards = {name: entry for name, entry in description.get("shards", {}).items() if name in used}
        number = 1 + max((int(name.split(".")[0]) for name in used), default=-1)
        for group in _fill(todo, self.shard_bytes):
            scans = scans + self._commit(f"{number:05d}.h5", group, scans, shards, spaces)
            number += 1
        if not (self.path / "manifest.csv").exists():  # nothing could be added: a store without scans
            fmt.write_bytes(self.path / "manifest.csv", fmt.encode_manifest([]))
        self._tidy({scan.shard for scan in scans})
        self._names = frozenset(scan.scan_id for scan in scans)

    def replace_lines(self, lines: dict[str, ScanInfo]) -> None:
        """Write lines of the manifest anew, such as those of scans whose labels were corrected; by scan_id."""
        with self._lock():
            scans = [lines.get(scan.scan_id, scan) for scan in self.packed()]
            fmt.write_bytes(self.path / "manifest.csv", fmt.encode_manifest(scans))

    def _commit(
        self,
        name: str,
        group: list[Packable],
        before: list[ScanInfo],
        shards: dict[str, dict[str, Any]],
        spaces: set[str],
    ) -> list[ScanInfo]:
        """Write a shard and its lines; `shards` and `spaces` are brought up to date."""
        target = self.path / "shards" / name
        scans = [one.read() for one in group]
        with fmt.atomic(target) as temp:
            if len(group) == 1 and group[0].file is not None:
                try:
                    os.link(group[0].file, temp)  # the staged file is a whole shard already
                except OSError:
                    shutil.copyfile(group[0].file, temp)
            else:
                _write_scans(temp, scans)
        shards[name] = {"bytes": target.stat().st_size, "xxh3_64": fmt.file_hash(target)}
        spaces |= {attributes["space"] for attributes, *_ in scans} - {""}
        self._write_description(shards, sorted(spaces))
        new = [
            replace(one.info, shard=name) if one.info is not None else _info(attributes, name)
            for one, (attributes, *_) in zip(group, scans, strict=True)
        ]
        fmt.write_bytes(self.path / "manifest.csv", fmt.encode_manifest(before + new))
        for one in group:
            if one.file is not None:
                one.file.unlink()
        return new

    def _write_description(self, shards: dict[str, dict[str, Any]], spaces: list[str]) -> None:
        content = {
            "format_version": fmt.FORMAT_VERSION,
            "grid": list(self.grid),
            "spacing": self.spacing,
            "placement": self.placement,
            "spaces": spaces,
            "tool": "swift-fmri",
            "tool_version": tool_version(),
            "shards": shards,
        }
        fmt.write_bytes(self.path / "store.json", fmt.encode_json(content))

    def _tidy(self, used: set[str]) -> None:
        """Remove what killed runs left: temporary files and a shard that was never committed."""
        for folder in (self.path, self.path / "shards", self._staging):
            for file in folder.glob(".tmp-*"):
                file.unlink(missing_ok=True)
        for file in (self.path / "shards").glob("*.h5"):
            if file.name not in used:
                file.unlink()
        with contextlib.suppress(OSError):  # not empty: another process has begun to add
            self._staging.rmdir()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise UserError(f"{self.path}: another process is packing this store; wait for it") from error
            # Some network file systems have no locks: go on, as one `close` at a time is the rule anyway.
        try:
            yield
        finally:
            os.close(handle)


Staged = tuple[dict[str, Any], dict[str, np.ndarray], tuple[int, int], Callable[[], Iterator[np.ndarray]]]


def _attributes(header: ScanHeader, grid: tuple[int, ...], spacing: float, frames: int, voxels: int) -> dict[str, Any]:
    return {
        **{name: str(getattr(header, name)) for name in HEADER_TEXTS},
        **{name: np.int64(getattr(header, name)) for name in HEADER_COUNTS},
        "tr": np.float64(header.tr),
        "start_time": np.float64(header.start_time),
        "affine": np.asarray(header.affine, np.float64),
        "grid": np.asarray(grid, np.int64),
        "spacing": np.float64(spacing),
        "frames": np.int64(frames),
        "voxels": np.int64(voxels),
        "notes": json.dumps(header.notes),
        "phenotypes": json.dumps({name: str(value) for name, value in header.phenotypes.items()}),
        "tool_version": tool_version(),
    }


def _info(attributes: dict[str, Any], shard: str) -> ScanInfo:
    texts = {name: attributes[name] for name in ("scan_id", "subject", "session", "task", "run", "site")}
    frames, voxels = int(attributes["frames"]), int(attributes["voxels"])
    phenotypes = json.loads(attributes["phenotypes"])
    return ScanInfo(
        **texts, shard=shard, frames=frames, voxels=voxels, tr=float(attributes["tr"]), phenotypes=phenotypes
    )


@dataclass(frozen=True)
class Packable:
    """A scan that is to go into a shard: bytes of its voxels, what reads it, its staged file and line if it has one."""

    size: int
    read: Callable[[], Staged]
    file: Path | None = None
    info: ScanInfo | None = None


def _bold_bytes(file: Path) -> int:
    return sum(size for _, size in fmt.bold_offsets(file).values())


def _fill(found: list[Packable], shard_bytes: int) -> Iterator[list[Packable]]:
    """Scans in order, cut where the next would bring the voxels of a shard above the limit."""
    group: list[Packable] = []
    total = 0
    for one in found:
        if group and total + one.size > shard_bytes:
            yield group
            group, total = [], 0
        group.append(one)
        total += one.size
    if group:
        yield group


def read_staged(path: Path) -> Staged:
    """Everything of a one-scan shard that we wrote; its voxels as a function that gives blocks of bytes in order."""
    with fmt.open_hdf5(path) as file:
        (group,) = file["scans"].values()
        attributes = fmt.attributes_of(group, str(path))
        attributes.pop("header_xxh3_64")
        names = ["mask", "scale", "offset", *(f"stats/{name}" for name in fmt.STATS)]
        names += [name for name in ("confounds", "confound_names") if name in group]
        arrays = {name: group[name][...] for name in names}
        frames, voxels = group["bold"].shape
        offset = group["bold"].id.get_offset()

    def blocks() -> Iterator[np.ndarray]:
        step = max(1, BLOCK // (2 * voxels))
        with path.open("rb", buffering=0) as raw:
            raw.seek(offset)
            for start in range(0, frames, step):
                block = np.empty((min(step, frames - start), voxels), "<i2")
                assert raw.readinto(block.data.cast("B")) == block.nbytes, path
                yield block

    return attributes, arrays, (frames, voxels), blocks


def _room(scans: list[Staged]) -> int:
    """Bytes that a shard of these scans takes at most."""
    total = 1 << 16
    for attributes, arrays, (frames, voxels), _ in scans:
        texts = sum(len(value.encode()) for value in attributes.values() if isinstance(value, str))
        small = sum(array.nbytes for array in arrays.values()) + 8 * frames
        total += 2 * frames * voxels + small + texts + (len(arrays) + 3) * 4096 + (1 << 15)
    return total


def _write_scans(temp: Path, scans: list[Staged]) -> None:
    """Write a shard. The voxels go past HDF5, row by row, with their checksums.

    All room is reserved first, without HDF5: it does not survive a disk that fills up under it (it crashes in close).
    HDF5 gives back what was too much.
    """
    room = _room(scans)
    with temp.open("wb") as trial:
        _reserve(trial.fileno(), room)
    file = h5py.File(temp, "w", locking=False, **fmt.HDF5_OPTIONS)
    handle = os.open(temp, os.O_RDWR)
    try:
        _reserve(handle, room)  # opening gave the room back
        for attributes, arrays, shape, blocks in scans:
            fmt.put_scan(file, attributes, arrays, *shape)
            group = file["scans"][attributes["scan_id"]]
            offset = group["bold"].id.get_offset()
            hashes = []
            for block in blocks():
                hashes.append(fmt.row_hashes(block))
                offset = _put(handle, block, offset)
            checksum = np.concatenate(hashes)
            assert len(checksum) == shape[0]
            dataset = group.create_dataset("checksum", data=checksum, track_times=False)
            dataset.attrs.create("xxh3_64", fmt.array_hash(checksum))
    finally:
        os.close(handle)
        file.close()
    assert temp.stat().st_size <= room, (temp, room)


def _reserve(handle: int, size: int) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # file systems without it
            raise


def _put(handle: int, block: np.ndarray, offset: int) -> int:
    """Write all bytes of a block; returns the offset behind it."""
    view = block.data.cast("B")
    while len(view):
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
    return offset

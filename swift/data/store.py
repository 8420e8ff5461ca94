"""Reading a store: a clip is one `preadv` from the shard into the caller's buffer.

The format is in `swift.data.format`, writing in `swift.data.writer`; what others need is imported here:
`Store`, `StoreWriter`, `ScanHeader`, `ScanInfo`, `CorruptData`.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from swift.data import format as fmt
from swift.data.format import CorruptData, ScanHeader, ScanInfo
from swift.data.stats import KINDS, fold
from swift.data.writer import StoreWriter
from swift.utils.errors import UserError

__all__ = ["KINDS", "CorruptData", "Damage", "ScanHeader", "ScanInfo", "Store", "StoreWriter"]

OPEN_SHARDS = 64
CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Damage:
    """A place whose bytes differ from their checksum. `part` is the dataset, "header" or "file"; `frame` for bold."""

    shard: str
    scan: str
    part: str
    frame: int | None = None


@dataclass
class _Shard:
    file: h5py.File
    handle: int

    def close(self) -> None:
        os.close(self.handle)
        self.file.close()


@dataclass
class _Scan:
    """What is kept in memory of a scan that was read lately."""

    handle_of: str
    offset: int
    frames: int
    voxels: int
    checksum: np.ndarray
    mask: np.ndarray
    indices: np.ndarray
    normalizers: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


class Store:
    """A store opened for reading.

    Handles are opened when first needed, in the process that needs them: a Store can be pickled, and used after a
    fork. Not for several threads at once.

    Args:
        path: Folder with store.json, manifest.csv and shards/.

    Attributes:
        scans: The manifest, in its order; methods take a scan as its place in this list.
        grid: Voxels (X, Y, Z).
        spacing: mm.

    Raises:
        UserError: no store, no scans yet, another version, a shard missing or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        description = fmt.read_json(self.path / "store.json")
        self.grid: tuple[int, int, int] = tuple(description["grid"])
        self.spacing = float(description["spacing"])
        manifest = self.path / "manifest.csv"
        self.scans: list[ScanInfo] = fmt.decode_manifest(manifest) if manifest.exists() else []
        if not self.scans:
            raise UserError(f"{self.path}: holds no scans; if an ingest was interrupted, run it again to finish it")
        self._check_shards(description.get("shards", {}))
        self._by_name = {scan.scan_id: place for place, scan in enumerate(self.scans)}
        cells = self.grid[0] * self.grid[1] * self.grid[2]
        self._room = max(8, CACHE_BYTES // (cells * 8))  # a third of the cells in the brain: mask, indices, a, b
        self._fresh()

    def _fresh(self) -> None:
        self._process = os.getpid()
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._cache: OrderedDict[int, _Scan] = OrderedDict()

    def _check_shards(self, listed: dict[str, Any]) -> None:
        for name in sorted({scan.shard for scan in self.scans}):
            file = self.path / "shards" / name
            try:
                size = file.stat().st_size
            except OSError as error:
                raise UserError(
                    f"{file}: this shard is missing from the set ({error.strerror}); copy it again"
                ) from error
            if name not in listed:
                raise UserError(f"{self.path / 'store.json'}: does not list shard {name}, which the manifest names")
            if size != listed[name]["bytes"]:
                raise UserError(f"{file}: has {size} bytes instead of {listed[name]['bytes']}; copy it again")
        self.shards: dict[str, dict[str, Any]] = listed

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": OrderedDict(), "_cache": OrderedDict(), "_process": -1}

    def close(self) -> None:
        """Close all handles; they open again when needed."""
        if self._process == os.getpid():
            for shard in self._shards.values():
                shard.close()
        self._fresh()

    def find(self, scan_id: str) -> int:
        """Place of a scan by name."""
        if scan_id not in self._by_name:
            raise UserError(
                f"{self.path}: no scan {scan_id!r}; there are {len(self.scans)}: {self.scans[0].scan_id}, ..."
            )
        return self._by_name[scan_id]

    # ------------------------------------------------------------------------------------------------- handles
    def _shard(self, name: str) -> _Shard:
        if self._process != os.getpid():
            self._fresh()  # handles of the parent process stay the parent's
        if name in self._shards:
            self._shards.move_to_end(name)
            return self._shards[name]
        path = self.path / "shards" / name
        try:
            file = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened as HDF5 ({error}); copy or repair it") from error
        self._shards[name] = _Shard(file, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        return self._shards[name]

    def _group(self, scan: int) -> tuple[h5py.Group, str]:
        info = self.scans[scan]
        where = str(self.path / "shards" / info.shard)
        try:
            return fmt.safe_group(self._shard(info.shard).file, info.scan_id, where), where
        except (OSError, RuntimeError, KeyError) as error:
            raise CorruptData(f"{where}: scan {info.scan_id}: {error}", info.shard, info.scan_id) from error

    def _array(self, scan: int, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
        group, where = self._group(scan)
        try:
            dataset = fmt.safe_dataset(group, name, where)
            if dataset.shape != shape or dataset.dtype != np.dtype(kind):
                raise UserError(
                    f"{where}: {group.name}/{name} is {dataset.dtype} {dataset.shape}; should be {kind} {shape}"
                )
            return dataset[...]
        except (OSError, RuntimeError) as error:
            info = self.scans[scan]
            raise CorruptData(f"{where}: {group.name}/{name}: {error}", info.shard, info.scan_id) from error

    def _scan(self, scan: int) -> _Scan:
        if self._process == os.getpid() and scan in self._cache:
            self._cache.move_to_end(scan)
            return self._cache[scan]
        info = self.scans[scan]
        group, where = self._group(scan)
        bold = fmt.safe_dataset(group, "bold", where)
        if bold.shape != (info.frames, info.voxels) or bold.dtype != np.dtype("<i2"):
            raise UserError(
                f"{where}: {group.name}/bold is {bold.dtype} {bold.shape}; the manifest says int16 "
                f"({info.frames}, {info.voxels})"
            )
        offset, size = bold.id.get_offset(), 2 * info.frames * info.voxels
        if offset is None or offset + size > self.shards[info.shard]["bytes"]:
            raise UserError(f"{where}: {group.name}/bold reaches beyond the end of the file")
        mask = self._array(scan, "mask", self.grid, "u1").astype(bool)
        indices = np.flatnonzero(mask).astype(np.int32)
        if len(indices) != info.voxels:
            raise CorruptData(
                f"{where}: {group.name}/mask has {len(indices)} voxels, bold {info.voxels}", info.shard, info.scan_id
            )
        checksum = self._array(scan, "checksum", (info.frames,), "<u8")
        self._cache[scan] = _Scan(info.shard, offset, info.frames, info.voxels, checksum, mask, indices)
        if len(self._cache) > self._room:
            self._cache.popitem(last=False)
        return self._cache[scan]

    # ------------------------------------------------------------------------------------------------- reading
    def read(
        self, scan: int, start: int, stop: int, step: int = 1, out: np.ndarray | None = None, verify: bool = False
    ) -> np.ndarray:
        """Codes of frames start, start + step, ... below stop.

        Args:
            scan: Place in `scans`.
            start, stop, step: Frames as in range(start, stop, step), inside the scan.
            out: (n, V) int16, C-contiguous, to read into; None: a new array.
            verify: Compare every frame with its checksum.

        Returns:
            (n, V) int16; the value is q * scale + offset (see `normalizer`).

        Raises:
            UserError: frames outside the scan.
            CorruptData: a frame differs from its checksum, or the file ends early.
        """
        known = self._scan(scan)
        info = self.scans[scan]
        if not 0 <= start < stop <= known.frames or step < 1:
            raise UserError(f"scan {info.scan_id}: frames {start}:{stop}:{step}; it has frames 0:{known.frames}")
        frames = range(start, stop, step)
        if out is None:
            out = np.empty((len(frames), known.voxels), np.int16)
        assert out.shape == (len(frames), known.voxels)
        assert out.dtype == np.int16
        assert out.flags.c_contiguous
        handle = self._shard(known.handle_of).handle
        row = 2 * known.voxels
        if step == 1:
            self._fill(handle, out, known.offset + start * row, info)
        else:
            for place, frame in enumerate(frames):
                self._fill(handle, out[place], known.offset + frame * row, info)
        if verify:
            wrong = np.flatnonzero(fmt.row_hashes(out) != known.checksum[start:stop:step])
            if len(wrong):
                frame = frames[int(wrong[0])]
                raise CorruptData(
                    f"{self.path / 'shards' / info.shard}: scan {info.scan_id}, frame {frame}: bytes differ from their "
                    f"checksum ({len(wrong)} of {len(frames)} frames read); run `python -m swift.data repair`",
                    info.shard,
                    info.scan_id,
                    frame,
                )
        return out

    def _fill(self, handle: int, out: np.ndarray, offset: int, info: ScanInfo) -> None:
        view = out.data.cast("B")
        while len(view):
            count = os.preadv(handle, [view], offset)
            if count == 0:
                where = self.path / "shards" / info.shard
                raise CorruptData(f"{where}: ends inside scan {info.scan_id}", info.shard, info.scan_id)
            view, offset = view[count:], offset + count

    def mask(self, scan: int) -> np.ndarray:
        """(X, Y, Z) bool. Shared: do not write to it."""
        return self._scan(scan).mask

    def indices(self, scan: int) -> np.ndarray:
        """(V,) int32 flat positions (C order) of the brain voxels. Shared: do not write to it."""
        return self._scan(scan).indices

    def normalizer(self, scan: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """a, b (V,) float32 with normalized value = q * a + b; see `swift.data.stats.fold` for the kinds.

        Raises:
            UserError: unknown kind, or one that this scan's values do not allow; names the scan.
        """
        known = self._scan(scan)
        if kind not in known.normalizers:
            shape = (known.voxels,)
            vector = {name: self._array(scan, name, shape, "<f4") for name in fmt.VECTORS}
            voxel = {name: vector[f"stats/{name}"] for name in fmt.STATS}
            attributes = self.attributes(scan)
            brain = {name: float(value) for name, value in attributes.items() if name.startswith("global_")}
            try:
                known.normalizers[kind] = fold(kind, vector["scale"], vector["offset"], voxel, brain)
            except UserError as error:
                raise UserError(f"scan {self.scans[scan].scan_id}: {error}") from error
        return known.normalizers[kind]

    def attributes(self, scan: int) -> dict[str, Any]:
        """All attributes of a scan: affine, tr, source, notes (JSON text), global statistics, ..."""
        group, where = self._group(scan)
        return fmt.attributes_of(group, where)

    def affine(self, scan: int) -> np.ndarray:
        """(4, 4) float64 from voxel indices of the grid to mm, RAS+."""
        return np.asarray(self.attributes(scan)["affine"], np.float64)

    def array(self, scan: int, name: str) -> np.ndarray:
        """A per-voxel vector (V,) float32: scale, offset or stats/mean, std, min, max, median, iqr."""
        if name not in fmt.VECTORS:
            raise UserError(f"no vector {name!r}; there are {', '.join(fmt.VECTORS)}")
        return self._array(scan, name, (self.scans[scan].voxels,), "<f4")

    def values(self, scan: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Dequantized values (n, V) float32, in the scan's own units."""
        codes = self.read(scan, start, self.scans[scan].frames if stop is None else stop)
        a, b = self.normalizer(scan, "none")
        return codes * a + b

    def check(self, scan: int) -> list[Damage]:
        """Compare everything that is stored of a scan with its checksums, a frame at a time."""
        info = self.scans[scan]
        found: list[Damage] = []
        try:
            group, where = self._group(scan)
            attributes = fmt.attributes_of(group, where)
            if fmt.header_hash(attributes) != attributes.get("header_xxh3_64"):
                found.append(Damage(info.shard, info.scan_id, "header"))
            for name in ["mask", "checksum", *fmt.VECTORS, *(["confounds"] if "confounds" in group else [])]:
                dataset = fmt.safe_dataset(group, name, where)
                if fmt.array_hash(dataset[...]) != dataset.attrs.get("xxh3_64"):
                    found.append(Damage(info.shard, info.scan_id, name))
            known = self._scan(scan)
        except (UserError, OSError, RuntimeError, KeyError, ValueError, TypeError):
            return [*found, Damage(info.shard, info.scan_id, "header")]
        row = np.empty((1, known.voxels), np.int16)
        for frame in range(known.frames):
            self.read(scan, frame, frame + 1, out=row)
            if fmt.row_hashes(row)[0] != known.checksum[frame]:
                found.append(Damage(info.shard, info.scan_id, "bold", frame))
        return found

    def check_file(self, shard: str) -> list[Damage]:
        """Compare a whole shard with the hash in store.json: finds what no scan's checksum covers."""
        same = fmt.file_hash(self.path / "shards" / shard) == self.shards[shard]["xxh3_64"]
        return [] if same else [Damage(shard, "", "file")]

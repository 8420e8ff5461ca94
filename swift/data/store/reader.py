"""Reading a store: a clip is one `preadv` from the shard into the caller's buffer.

The format is in `swift.data.store.format`, writing in `swift.data.store.writer`; what others need is imported here:
`Store`, `StoreWriter`, `ScanHeader`, `ScanInfo`, `CorruptData`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from swift.data.store import format as fmt
from swift.data.store.format import CorruptData, ScanHeader, ScanInfo
from swift.data.store.shards import OpenShards, Shard
from swift.data.store.spaces import OWN
from swift.data.store.stats import KINDS, NEEDS, fold
from swift.data.store.writer import StoreWriter
from swift.utils.errors import UserError

__all__ = ["KINDS", "CorruptData", "Damage", "ScanHeader", "ScanInfo", "Store", "StoreWriter"]


@dataclass(frozen=True)
class Damage:
    """A place whose bytes differ from their checksum. `part` is the dataset, "header" or "file"; `frame` for bold."""

    shard: str
    scan: str
    part: str
    frame: int | None = None
    changed: str = field(default="", compare=False)
    """Phenotypes of its line in the manifest that are not those that were ingested: no damage, someone changed them."""


ARRAYS = ("mask", "checksum", *fmt.VECTORS)
_OF_A_PROCESS = ("_layouts", "_spare", "_cells", "_shards")


@dataclass
class _Layout:
    """Where a scan's arrays lie in its shard: found through HDF5 once, then read without it. Small: kept for all scans.

    offset and digest (xxh3_64) are those of ARRAYS; brain: global statistics, in the order of STATS.
    """

    bold: int
    offset: np.ndarray
    digest: np.ndarray
    brain: np.ndarray


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
        version: Of the format.
        placement: Where the grid lies: the name of a template's box, or `spaces.OWN` (also in version 1).
        spaces: Names of the spaces that its scans were given in, as far as known.
        local: Copies of shards on this node's own disk, to be read instead; see `swift.data.store.staging`.

    Raises:
        UserError: no store, no scans yet, another version, a shard missing or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        description = fmt.read_json(self.path / "store.json")
        self.grid: tuple[int, int, int] = tuple(description["grid"])
        self.spacing = float(description["spacing"])
        self.version = int(description["format_version"])
        self.placement = str(description.get("placement", OWN))
        self.spaces: tuple[str, ...] = tuple(description.get("spaces", ()))
        manifest = self.path / "manifest.csv"
        self.scans: list[ScanInfo] = fmt.decode_manifest(manifest) if manifest.exists() else []
        if not self.scans:
            raise UserError(f"{self.path}: holds no scans; if an ingest was interrupted, run it again to finish it")
        self.local: dict[str, Path] = {}
        self._check_shards(description.get("shards", {}))
        self._by_name = {scan.scan_id: place for place, scan in enumerate(self.scans)}
        self._empty()

    def _empty(self) -> None:
        self._layouts: dict[int, _Layout] = {}
        self._spare: dict[str, np.ndarray] = {}
        self._cells: np.ndarray | None = None
        self._shards = OpenShards()

    def _check_shards(self, listed: dict[str, Any]) -> None:
        for name in sorted({scan.shard for scan in self.scans}):
            file = self.path / "shards" / name
            try:
                size = file.stat().st_size
            except OSError as error:
                raise UserError(
                    f"{file}: this shard is missing from the set that manifest.csv names ({error.strerror}); copy it "
                    "again"
                ) from error
            if name not in listed:
                raise UserError(f"{self.path / 'store.json'}: does not list shard {name}, which the manifest names")
            if size != listed[name]["bytes"]:
                raise UserError(f"{file}: has {size} bytes instead of {listed[name]['bytes']}; copy it again")
        self.shards: dict[str, dict[str, Any]] = listed

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._empty()

    def close(self) -> None:
        """Close all handles; they open again when needed."""
        self._shards.close()
        self._empty()

    def file(self, shard: str) -> Path:
        """Where a shard is read: its copy on this node, if there is one."""
        local = self.local.get(shard)
        return local if local is not None and local.exists() else self.path / "shards" / shard

    def find(self, scan_id: str) -> int:
        """Place of a scan by name."""
        if scan_id not in self._by_name:
            raise UserError(
                f"{self.path}: no scan {scan_id!r}; there are {len(self.scans)}: {self.scans[0].scan_id}, ..."
            )
        return self._by_name[scan_id]

    # ------------------------------------------------------------------------------------------------- handles
    def _shard(self, name: str) -> Shard:
        return self._shards.get(name) or self._shards.open(name, self.file(name))

    def _group(self, scan: int) -> tuple[h5py.Group, str]:
        info = self.scans[scan]
        where = str(self.file(info.shard))
        try:
            return fmt.safe_group(self._shard(info.shard).file, info.scan_id, where), where
        except (OSError, RuntimeError, KeyError) as error:
            raise self._corrupt(scan, str(error)) from error

    def _layout(self, scan: int) -> _Layout:
        if scan in self._layouts:
            return self._layouts[scan]
        info = self.scans[scan]
        group, where = self._group(scan)
        shapes = {"bold": (info.frames, info.voxels), "mask": self.grid, "checksum": (info.frames,)}
        kinds = {"bold": "<i2", "mask": "u1", "checksum": "<u8"}
        places = {}
        try:
            for name in ("bold", *ARRAYS):
                dataset = fmt.safe_dataset(group, name, where)
                shape, kind = shapes.get(name, (info.voxels,)), np.dtype(kinds.get(name, "<f4"))
                if dataset.shape != shape or dataset.dtype != kind:
                    raise UserError(
                        f"{where}: {group.name}/{name} is {dataset.dtype} {dataset.shape}; should be {kind} {shape} by "
                        "the manifest"
                    )
                offset = dataset.id.get_offset()
                if offset is None or offset + dataset.nbytes > self.shards[info.shard]["bytes"]:
                    raise UserError(f"{where}: {group.name}/{name} reaches beyond the end of the file")
                places[name] = offset, 0 if name == "bold" else int(dataset.attrs.get("xxh3_64", 0))
        except (OSError, RuntimeError, KeyError) as error:
            raise self._corrupt(scan, str(error)) from error
        attributes = self.attributes(scan)
        if fmt.header_hash(attributes) != attributes.get("header_xxh3_64"):
            raise self._corrupt(scan, "its header differs from its checksum")
        found = np.array([places[name] for name in ARRAYS], np.uint64)
        brain = np.array([attributes[f"global_{name}"] for name in fmt.STATS], np.float64)
        self._layouts[scan] = _Layout(places["bold"][0], found[:, 0], found[:, 1], brain)
        return self._layouts[scan]

    def _array(self, scan: int, name: str, out: np.ndarray) -> np.ndarray:
        """Fill `out` with a small array; always compared with its checksum, as it decides over all frames."""
        layout, place = self._layout(scan), ARRAYS.index(name)
        self._fill(self._shard(self.scans[scan].shard).handle, out, int(layout.offset[place]), scan)
        if fmt.array_hash(out) != layout.digest[place]:
            raise self._corrupt(scan, f"{name} differs from its checksum")
        return out

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
        info, begin = self.scans[scan], self._layout(scan).bold
        if not 0 <= start < stop <= info.frames or step < 1:
            raise UserError(f"scan {info.scan_id}: frames {start}:{stop}:{step}; it has frames 0:{info.frames}")
        frames = range(start, stop, step)
        if out is None:
            out = np.empty((len(frames), info.voxels), np.int16)
        assert out.shape == (len(frames), info.voxels)
        assert out.dtype == np.int16
        assert out.flags.c_contiguous
        handle, row = self._shard(info.shard).handle, 2 * info.voxels
        if step == 1 and not verify:
            self._fill(handle, out, begin + start * row, scan)
            return out
        checksum = self._array(scan, "checksum", np.empty(info.frames, "<u8"))
        for place, frame in enumerate(frames):  # a frame is hashed while it is still in the processor's cache
            self._fill(handle, out[place], begin + frame * row, scan)
            if verify and xxhash.xxh3_64_intdigest(out[place].data) != checksum[frame]:
                raise self._corrupt(scan, "bytes differ from their checksum", frame)
        return out

    def _fill(self, handle: int, out: np.ndarray, offset: int, scan: int) -> None:
        view = out.data.cast("B")
        while len(view):
            count = os.preadv(handle, [view], offset)
            if count == 0:
                raise self._corrupt(scan, "the file ends inside it")
            view, offset = view[count:], offset + count

    def _corrupt(self, scan: int, what: str, frame: int | None = None) -> CorruptData:
        info = self.scans[scan]
        place = f"scan {info.scan_id}" + ("" if frame is None else f", frame {frame}")
        message = f"{self.file(info.shard)}: {place}: {what}; run `python -m swift.data repair`"
        return CorruptData(message, info.shard, info.scan_id, frame)

    def mask(self, scan: int) -> np.ndarray:
        """(X, Y, Z) bool."""
        return self._array(scan, "mask", np.empty(self.grid, np.uint8)).view(bool)

    def mask_alone(self, scan: int) -> np.ndarray:
        """As `mask`, for a pass over all scans: of a scan nothing else is looked up, and nothing of it is kept.

        Raises:
            CorruptData: it differs from its checksum, or cannot be read.
        """
        group, where = self._group(scan)
        try:
            dataset = fmt.safe_dataset(group, "mask", where)
            found: np.ndarray = dataset[...]
            digest = int(dataset.attrs.get("xxh3_64", 0))
        except (OSError, RuntimeError, KeyError) as error:
            raise self._corrupt(scan, str(error)) from error
        if fmt.array_hash(found) != digest:
            raise self._corrupt(scan, "mask differs from its checksum")
        if found.shape != self.grid:
            raise self._corrupt(scan, f"mask has the grid {found.shape}, the store {self.grid}")
        return found.view(bool)

    def indices(self, scan: int) -> np.ndarray:
        """(V,) int32 flat positions (C order) of the brain voxels."""
        index = np.empty(self.scans[scan].voxels, np.int32)
        self._put_indices(scan, index)
        return index

    def normalizer(self, scan: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """a, b (V,) float32 with normalized value = q * a + b; see `swift.data.store.stats.fold` for the kinds.

        Raises:
            UserError: unknown kind, or one that this scan's values do not allow; names the scan.
        """
        a, b = np.empty((2, self.scans[scan].voxels), np.float32)
        self._put_normalizer(scan, kind, a, b)
        return a, b

    def table(self, scan: int, kind: str, out: np.ndarray | None = None) -> np.ndarray:
        """`indices` and `normalizer` in one: (3, V) int32, positions, then the bits of a and of b (float32).

        Args:
            scan, kind: See there.
            out: To be filled; None: a new array.
        """
        if out is None:
            out = np.empty((3, self.scans[scan].voxels), np.int32)
        self._put_indices(scan, out[0])
        a, b = out[1:].view(np.float32)
        self._put_normalizer(scan, kind, a, b)
        return out

    def _put_indices(self, scan: int, index: np.ndarray) -> None:
        if self._cells is None:
            self._cells = np.arange(int(np.prod(self.grid)), dtype=np.int32)
        mask = self._array(scan, "mask", self._scratch("mask", len(self._cells), np.uint8)).view(bool)
        found = self._cells[mask]  # twice as fast as flatnonzero
        if len(found) != len(index):
            raise self._corrupt(scan, f"mask has {len(found)} voxels, bold {len(index)}")
        index[:] = found

    def _put_normalizer(self, scan: int, kind: str, a: np.ndarray, b: np.ndarray) -> None:
        names = ["scale", "offset", *(f"stats/{name}" for name in NEEDS.get(kind, ()))]
        vector = {name: self._array(scan, name, self._scratch(name, len(a), np.float32)) for name in names}
        voxel = {name: vector[f"stats/{name}"] for name in NEEDS.get(kind, ())}
        brain = dict(zip((f"global_{name}" for name in fmt.STATS), self._layout(scan).brain.tolist(), strict=True))
        try:
            fold(kind, vector["scale"], vector["offset"], voxel, brain, (a, b))
        except UserError as error:
            raise UserError(f"scan {self.scans[scan].scan_id}: {error}") from error

    def _scratch(self, name: str, size: int, kind: type[np.generic]) -> np.ndarray:
        """Memory that is used again and again: fresh memory costs more than the read."""
        if name not in self._spare or len(self._spare[name]) < size:
            self._spare[name] = np.empty(size, kind)
        return self._spare[name][:size]

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
        return self._array(scan, name, np.empty(self.scans[scan].voxels, "<f4"))

    def confounds(self, scan: int) -> dict[str, np.ndarray]:
        """Per-frame columns that were kept with a scan: name -> (T,) float32, NaN for n/a; {} where there are none.

        Raises:
            CorruptData: they differ from their checksum.
        """
        group, where = self._group(scan)
        if "confounds" not in group:
            return {}
        dataset = fmt.safe_dataset(group, "confounds", where)
        table = dataset[...]
        if fmt.array_hash(table) != dataset.attrs.get("xxh3_64"):
            raise self._corrupt(scan, "confounds differ from their checksum")
        if self.version == 1:
            names = json.loads(self.attributes(scan)["confound_names"])
        else:
            listed = fmt.safe_dataset(group, "confound_names", where)
            raw = listed[...]
            if fmt.array_hash(raw) != listed.attrs.get("xxh3_64"):
                raise self._corrupt(scan, "the names of the confounds differ from their checksum")
            names = json.loads(raw.tobytes())
        return {name: table[:, place] for place, name in enumerate(names)}

    def events(self, scan: int) -> str:
        """The scan's events.tsv as text; "" where none was kept."""
        return str(self.attributes(scan).get("events", ""))

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
            for name in [*ARRAYS, *(extra for extra in ("confounds", "confound_names") if extra in group)]:
                dataset = fmt.safe_dataset(group, name, where)
                if fmt.array_hash(dataset[...]) != dataset.attrs.get("xxh3_64"):
                    found.append(Damage(info.shard, info.scan_id, name))
            checksum, bold = group["checksum"][...], fmt.safe_dataset(group, "bold", where)
            if bold.shape != (len(checksum), info.voxels) or info.frames != len(checksum):
                raise UserError(f"{where}: {group.name}/bold is {bold.shape}")
            row = np.empty((1, info.voxels), np.int16)
            for frame in range(info.frames):
                self._fill(self._shard(info.shard).handle, row, bold.id.get_offset() + frame * row.nbytes, scan)
                if fmt.row_hashes(row)[0] != checksum[frame]:
                    found.append(Damage(info.shard, info.scan_id, "bold", frame))
        except (UserError, OSError, RuntimeError, KeyError, ValueError, TypeError):
            return [*found, Damage(info.shard, info.scan_id, "header")]
        return found

    def check_file(self, shard: str) -> list[Damage]:
        """Compare a whole shard with the hash in store.json: finds what no scan's checksum covers."""
        same = fmt.file_hash(self.path / "shards" / shard) == self.shards[shard]["xxh3_64"]
        return [] if same else [Damage(shard, "", "file")]

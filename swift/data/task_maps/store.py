"""Maps of all subjects on the grid of a store, kept in one HDF5 file of swift's cache, every array with its xxh3_64.

The file's name follows from the store's grid, the settings and the files (path, size, time of change): other files or
another grid make another one. `/00000`, `/00001`, ...: one group a subject, see `_write`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from swift.config.schema import TargetConfig
from swift.data.clips.mixture import Stores
from swift.data.ingest.nifti import Volumes, sha256_file
from swift.data.labels.columns import listed
from swift.data.store import format as fmt
from swift.data.store.spaces import OWN
from swift.data.task_maps.files import Files, contrasts_of, find_maps, in_folder
from swift.data.task_maps.place import Key, PlacedMap, grid_key, place_map, plan_maps, usual_grid
from swift.utils.cache import cache_dir, only_here
from swift.utils.errors import BadScan, UserError

log = logging.getLogger("swift.data")

VERSION = 2
ARRAYS = ("values", "index", "affine", "shape", "ornt")


class MapStore:
    """The maps of a file that `open_maps` has made.

    Args:
        path: Of the file.

    Attributes:
        contrasts: Names of the K channels.
        subjects: Those that have a map -> their group.
        failed: Subject -> why its map cannot be used.

    Raises:
        CorruptData: the head of the file differs from its checksum.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with fmt.open_hdf5(path) as file:
            text = bytes(file["head"][...])
            self._check(text, int(file["head"].attrs["xxh3_64"]), "its head")
        head = json.loads(text)
        self.contrasts: list[str] = head["contrasts"]
        self.subjects: dict[str, str] = head["subjects"]
        self.failed: dict[str, str] = head["failed"]
        self.hash = hashlib.sha256(text).hexdigest()[:16]
        """Of the sources of all maps, of grid and contrasts."""

    def _check(self, data: Any, wanted: int, what: str) -> None:
        found = int(fmt.array_hash(np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data))
        if found != wanted:
            raise fmt.CorruptData(f"{self.path}: {what} differs from its checksum: delete the file, it is made again")

    def read(self, subject: str) -> PlacedMap:
        """A subject's maps.

        Raises:
            CorruptData: an array differs from its checksum.
        """
        with fmt.open_hdf5(self.path) as file:
            group = file[self.subjects[subject]]
            arrays: dict[str, Any] = {}
            for name in ARRAYS:
                arrays[name] = fmt.safe_dataset(group, name, str(self.path))[...]
                self._check(arrays[name], int(group[name].attrs["xxh3_64"]), f"{name} of subject {subject}")
        arrays["shape"] = tuple(arrays["shape"].tolist())
        return PlacedMap(**arrays)


def open_maps(store: Stores, target: TargetConfig) -> tuple[MapStore, MapStore | None]:
    """The maps of a task on the store's grid, and those of a second measurement if there is one; made where needed.

    Raises:
        UserError: scans that are not in one template's space; files that cannot be found or told apart; no usable map.
    """
    if len(store.placements) != 1 or store.placements[0] == OWN:
        raise UserError(
            f"task.target.kind=map: the scans lie in {', '.join(store.placements)}, where a voxel is not the same "
            "place in all of them; ingest scans in a template space, such as --space MNI152NLin2009cAsym"
        )
    first = _opened(store, target, find_maps(store.scans, target))
    if target.retest is None:
        return first, None
    again = in_folder("task.target.retest", target.retest, {scan.subject for scan in store.scans}, target)
    if not again:
        raise UserError(f"task.target.retest={target.retest}: no file there fits a subject of the store")
    return first, _opened(store, target, again)


def _opened(store: Stores, target: TargetConfig, files: Files) -> MapStore:
    told = [VERSION, store.grid, store.spacing, store.placements, contrasts_of(target), target.space]
    told += [[str(one.path.resolve()), fmt.file_hash(one.path / "manifest.csv")] for one in store.stores]
    told += [[subject, contrast, *_state(file)] for subject, own in files.items() for contrast, file in own.items()]
    folder = cache_dir() / "maps"
    path = folder / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.h5"
    with only_here(folder):  # ranks of one job come here together
        if not path.exists():
            log.info("bringing the maps of %d subjects to the grid of the store, once: %s", len(files), path)
            _write(path, store, target, files)
    return MapStore(path)


def _state(file: Path) -> list[Any]:
    """Path, size and time of change; of a file that is not there the path."""
    try:
        found = file.stat()
    except OSError:
        return [str(file)]
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]


def _brains(store: Stores, subjects: Iterable[str]) -> dict[str, np.ndarray]:
    """Subject -> (X, Y, Z) bool: brain of any of its scans."""
    wanted = set(subjects)
    found: dict[str, np.ndarray] = {}
    for place, scan in enumerate(store.scans):
        if scan.subject in wanted:
            mask = store.mask(place).astype(bool)
            found[scan.subject] = mask | found.get(scan.subject, False)
    return found


def _write(path: Path, store: Stores, target: TargetConfig, files: Files) -> None:
    """Each subject's group holds values (K, V) float32, index (V,) int32; affine (4, 4), shape (3,) and ornt (3, 2) of
    its files.

    Raises:
        BadScan: no map can be used: what is wrong with the first.
    """
    contrasts, placement = contrasts_of(target), store.placements[0]
    plans: dict[str, list[Volumes]] = {}
    failed: dict[str, str] = {}
    for subject, own in files.items():
        missing = [contrast for contrast in contrasts if contrast not in own]
        try:
            if missing:
                raise BadScan(f"subject {subject} has no map of {listed(missing)}")
            plans[subject] = plan_maps({contrast: own[contrast] for contrast in contrasts}, target.space, placement)
        except BadScan as error:
            failed[subject] = str(error)
    usual = usual_grid([own[0] for own in plans.values()]) if plans else None
    brains = _brains(store, plans)
    x, y, z = store.grid
    with fmt.atomic(path) as temp, h5py.File(temp, "w", locking=False, **fmt.HDF5_OPTIONS) as file:
        groups: dict[str, str] = {}
        sources = []
        for subject, volumes in plans.items():
            try:
                if grid_key(volumes[0]) != usual:
                    shape = f"{volumes[0].path.name}: shape {tuple(volumes[0].shape)}"
                    raise BadScan(f"{shape} or affine differ from those of most maps ({_shape(usual)})")
                placed = place_map(volumes, brains[subject], (x, y, z), store.spacing, placement)
            except BadScan as error:
                failed[subject] = str(error)
                continue
            groups[subject] = f"{len(groups):05d}"
            sources += [sha256_file(plan.path) for plan in volumes]
            _put(file, groups[subject], placed)
        if not groups:
            raise BadScan(f"no map can be used: {next(iter(failed.values()))}")
        head = {"contrasts": contrasts, "subjects": groups, "failed": failed, "sources": sources}
        text = json.dumps(head | {"grid": list(store.grid), "spacing": store.spacing}).encode()
        _dataset(file, "head", np.frombuffer(text, np.uint8))


def _shape(usual: Key | None) -> str:
    return "none" if usual is None else str(usual[0])


def _put(file: h5py.File, name: str, placed: PlacedMap) -> None:
    group = file.create_group(name)
    arrays: Mapping[str, np.ndarray] = {
        "values": placed.values,
        "index": placed.index,
        "affine": placed.affine,
        "shape": np.asarray(placed.shape),
        "ornt": placed.ornt,
    }
    for key, array in arrays.items():
        _dataset(group, key, array)


def _dataset(group: h5py.Group, name: str, array: np.ndarray) -> None:
    dataset = group.create_dataset(name, data=array, track_times=False)
    dataset.attrs.create("xxh3_64", fmt.array_hash(array))

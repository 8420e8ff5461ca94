"""Several stores of one grid and spacing as one: their scans are numbered one store after the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from swift.data.store.format import ScanInfo
from swift.data.store.reader import Store
from swift.data.store.spaces import OWN
from swift.utils.errors import UserError

log = logging.getLogger("swift.data")


class Stores:
    """Reads like one `Store`; every method takes a scan as its place in `scans`.

    Args:
        paths: Folders of the stores, at least one.

    Attributes:
        stores: The stores.
        scans: All scans, store by store.
        cohort: (S,) int64, the store of each scan.
        grid, spacing: Those of all stores.
        placements: Where the grids of the stores lie, each once; more than one: the same voxel is another place.

    Raises:
        UserError: a store that cannot be opened, another grid or spacing than the first one's.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        assert paths
        self.stores = [Store(path) for path in paths]
        first = self.stores[0]
        self.grid, self.spacing = first.grid, first.spacing
        for store in self.stores[1:]:
            if store.grid != first.grid or store.spacing != first.spacing:
                raise UserError(
                    f"{store.path} has grid {list(store.grid)} at {store.spacing} mm, {first.path} has "
                    f"grid {list(first.grid)} at {first.spacing} mm: only stores of one grid and spacing can be mixed"
                )
        self.placements = sorted({store.placement for store in self.stores})
        if len(self.placements) > 1:
            log.warning(
                "stores of several spaces are mixed (%s): a voxel is not the same place in all of them",
                "; ".join(f"{store.path}: {store.placement}" for store in self.stores),
            )
        self.scans: list[ScanInfo] = [scan for store in self.stores for scan in store.scans]
        sizes = [len(store.scans) for store in self.stores]
        self.cohort = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        self._first = np.cumsum([0, *sizes]).tolist()

    def at(self, scan: int) -> tuple[Store, int]:
        """The store of a scan, and its place there."""
        cohort = int(self.cohort[scan])
        return self.stores[cohort], scan - self._first[cohort]

    def check_one_space(self, scans: Iterable[int], what: str) -> None:
        """Refuse what compares scans voxel by voxel where voxels of two scans are not the same place.

        Stores of format version 1 do not say where their grids lie: they are taken, with a warning unless all affines
        are equal.

        Args:
            scans: Places of the scans that are compared.
            what: Is to be done with them, for messages.

        Raises:
            UserError: the scans are centred each on its own mask, or lie in boxes of several templates.
        """
        places = sorted(set(scans))
        stores = {id(store): store for store, _ in map(self.at, places)}.values()
        where = sorted({store.placement for store in stores})
        if len(places) < 2 or (len(where) == 1 and where[0] != OWN):
            return
        early = [store for store in stores if store.version == 1]
        if len(where) == 1 and len(early) == len(stores):
            affines = [self.affine(scan) for scan in places]
            if not all(np.array_equal(affine, affines[0]) for affine in affines):
                log.warning(
                    "%s: made by format version 1, which centred every scan on its own brain mask: voxels of two scans "
                    "may lie 10 mm apart, and %s compares them voxel by voxel; python -m swift.data place STORE --out "
                    "NEW moves it, or ingest again",
                    *(early[0].path, what),
                )
            return
        paths = ", ".join(f"{store.path} ({store.placement})" for store in stores)
        raise UserError(
            f"{what} compares scans voxel by voxel, but they are not in one space: {paths}; ingest scans in a template "
            "space, such as --space MNI152NLin2009cAsym"
        )

    def close(self) -> None:
        """Close all handles; they open again when needed."""
        for store in self.stores:
            store.close()

    def read(
        self, scan: int, start: int, stop: int, step: int = 1, out: np.ndarray | None = None, verify: bool = False
    ) -> np.ndarray:
        """See `Store.read`."""
        store, place = self.at(scan)
        return store.read(place, start, stop, step, out, verify)

    def table(self, scan: int, kind: str, out: np.ndarray | None = None) -> np.ndarray:
        """See `Store.table`."""
        store, place = self.at(scan)
        return store.table(place, kind, out)

    def normalizer(self, scan: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """See `Store.normalizer`."""
        store, place = self.at(scan)
        return store.normalizer(place, kind)

    def indices(self, scan: int) -> np.ndarray:
        """See `Store.indices`."""
        store, place = self.at(scan)
        return store.indices(place)

    def mask(self, scan: int) -> np.ndarray:
        """See `Store.mask`."""
        store, place = self.at(scan)
        return store.mask(place)

    def affine(self, scan: int) -> np.ndarray:
        """See `Store.affine`."""
        store, place = self.at(scan)
        return store.affine(place)

    def confounds(self, scan: int) -> dict[str, np.ndarray]:
        """See `Store.confounds`."""
        store, place = self.at(scan)
        return store.confounds(place)

    def events(self, scan: int) -> str:
        """See `Store.events`."""
        store, place = self.at(scan)
        return store.events(place)

    def attributes(self, scan: int) -> dict[str, Any]:
        """See `Store.attributes`."""
        store, place = self.at(scan)
        return store.attributes(place)

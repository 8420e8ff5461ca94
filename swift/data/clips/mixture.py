"""Several stores of one grid and spacing as one: their scans are numbered one store after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from swift.data.store.format import ScanInfo
from swift.data.store.reader import Store
from swift.utils.errors import UserError


class Stores:
    """Reads like one `Store`; every method takes a scan as its place in `scans`.

    Args:
        paths: Folders of the stores, at least one.

    Attributes:
        stores: The stores.
        scans: All scans, store by store.
        cohort: (S,) int64, the store of each scan.
        grid, spacing: Those of all stores.

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
        self.scans: list[ScanInfo] = [scan for store in self.stores for scan in store.scans]
        sizes = [len(store.scans) for store in self.stores]
        self.cohort = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        self._first = np.cumsum([0, *sizes]).tolist()

    def at(self, scan: int) -> tuple[Store, int]:
        """The store of a scan, and its place there."""
        cohort = int(self.cohort[scan])
        return self.stores[cohort], scan - self._first[cohort]

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

    def tables(self, scan: int, kind: str, index: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """See `Store.tables`."""
        store, place = self.at(scan)
        store.tables(place, kind, index, a, b)

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

"""Looks at the scans of a store one by one, in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from swift.data.quality.measures import Measures, courses, measure
from swift.data.quality.pictures import brain, carpet
from swift.data.store.reader import CorruptData, Store

WORTH_A_PROCESS = 4
"""Scans for which a process is started: it takes longer to start than to look at one."""

_store: Store | None = None


def look(store: Store, scan: int) -> tuple[Measures, str]:
    """The line of a scan and the markup of its pictures; of a damaged scan the line says so, without pictures."""
    info = store.scans[scan]
    try:
        course = courses(store, scan)
        return measure(store, scan, course), brain(store, scan) + carpet(course, info.tr)
    except CorruptData as error:
        line = Measures(info.scan_id, info.subject, info.frames, info.voxels, info.tr, problem=str(error))
        return line, ""


def looked(store: Store, scans: Sequence[int], workers: int) -> Iterator[tuple[Measures, str]]:
    """What `look` gives of every scan, in order.

    Args:
        store: An open store.
        scans: Places in store.scans.
        workers: Processes; 1: this one.
    """
    workers = max(1, min(workers, len(scans) // WORTH_A_PROCESS))
    if workers == 1:
        for scan in scans:
            yield look(store, scan)
        return
    # Not fork: HDF5 and thread pools of the parent do not survive it.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _open, (store,)) as pool:
        try:
            yield from pool.map(_look, scans)
        finally:
            pool.shutdown(cancel_futures=True)


def _open(store: Store) -> None:
    global _store
    _store = store


def _look(scan: int) -> tuple[Measures, str]:
    assert _store is not None
    return look(_store, scan)

"""Batch buffers in memory that a DataLoader's workers and its main process share.

Sending a tensor from a worker to the main process costs a socket, a mapping and a page fault for every 4 KiB, which is
several times what the read costs. Here one mapping is made before the workers start and is used all the time; what a
worker sends is a `Ticket`: which buffer, and a few integers.

A scan's table (where its voxels lie, their scales and offsets) is as large as six frames. It too lies in the mapping:
a worker makes it once, and batches refer to it. Such a table never changes, so a batch may look into it for ever.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from swift.utils import device as layer

PREFETCH = 2
"""Batches that a DataLoader keeps under way for each worker."""
SLOTS = PREFETCH + 3
"""Buffers of a worker: those under way, one that was handed over, one in use, one to spare."""
PAGE = 4096
TABLE_BYTES = 256 << 20
"""Tables that a worker keeps, at most. None is ever given up for another: where scans come in random order, no choice
would be better, and putting them away has its cost. Those of further scans are made anew for every batch."""
_RINGS: WeakValueDictionary[int, Ring] = WeakValueDictionary()
_NUMBERS = itertools.count()


class StaleBatch(RuntimeError):
    """A packed batch was used after its buffer had been given to a later one."""


@dataclass
class Ticket:
    """A batch that lies in a buffer of a ring: all that has to go from a worker to the main process.

    Attributes:
        ring, slot, stamp: Which ring, which of its buffers, and the number that the buffer had then.
        codes: How many there are in the batch, sum T V.
        voxels: V of every row of the batch, 0 for padding.
        tables: Where the table of every row lies in the mapping; any number for padding.
        meta: (B, 4) int64: sample_id, scan, start, valid.
        train: Whether it is for training.
    """

    ring: int
    slot: int
    stamp: int
    codes: int
    voxels: list[int]
    tables: list[int]
    meta: np.ndarray
    train: bool

    def pin_memory(self, device: str | None = None) -> dict[str, Any]:
        """A copy in page-locked memory; called by the DataLoader's thread where there is a GPU."""
        batch = _RINGS[self.ring].batch(self)
        batch = {name: layer.each(one, layer.pinned) for name, one in batch.items()}
        check_fresh({"stamp": _RINGS[self.ring].stamps[self.slot], "ticket": self.stamp})
        return batch


class Ring:
    """Buffers for packed batches, SLOTS of them a worker, each used in turn; and the tables of scans.

    Made in the main process; workers get it by fork or, where they are spawned, with their start arguments.

    Args:
        workers: Worker processes; 0: the main process fills the buffers itself.
        batch_size: B.
        frames: T of a clip.
        voxels: The largest V of a scan.
        scans: How many there are.
    """

    def __init__(self, workers: int, batch_size: int, frames: int, voxels: int, scans: int) -> None:
        self.shape = (workers, batch_size, frames, voxels, scans)
        self.number = next(_NUMBERS)
        self.kept_bytes = _whole(min(TABLE_BYTES, scans * _table_bytes(voxels)), PAGE)
        self.handle = _shared_file(self._layout())
        self._map()

    def _layout(self) -> int:
        """Places of all parts, in bytes: numbers, then buffers, then tables that are kept; returns the size of all."""
        workers, batch_size, frames, voxels, scans = self.shape
        workers = max(workers, 1)
        self._codes_bytes = _whole(2 * batch_size * frames * voxels, PAGE)
        self._slot_bytes = self._codes_bytes + _whole(batch_size * _table_bytes(voxels), PAGE)
        self._slots = _whole(8 * (workers * SLOTS + workers + workers * scans), PAGE)
        self._tables = self._slots + workers * SLOTS * self._slot_bytes
        return self._tables + workers * self.kept_bytes

    def _map(self) -> None:
        workers, scans = max(self.shape[0], 1), self.shape[-1]
        self._memory = mmap.mmap(self.handle, os.fstat(self.handle).st_size)
        numbers = np.frombuffer(self._memory, np.int64, workers * (SLOTS + 1 + scans))
        self.stamps = numbers[: workers * SLOTS]
        # Of every worker: bytes of its kept tables, and where that of each scan lies (0: nowhere). In the mapping, so
        # that a worker that is started anew finds what the one before it has made.
        self._used = numbers[workers * SLOTS :][:workers]
        self._places = numbers[workers * (SLOTS + 1) :].reshape(workers, scans)
        self._seen: dict[int, torch.Tensor] = {}
        self._turn = 0
        _RINGS[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {
            **{"shape": self.shape, "number": self.number, "kept_bytes": self.kept_bytes},
            "handle": reduction.DupFd(self.handle),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape, self.number, self.kept_bytes = state["shape"], state["number"], state["kept_bytes"]
        self.handle = state["handle"].detach()
        self._layout()
        self._map()

    def __del__(self) -> None:
        if hasattr(self, "handle"):  # the mapping itself goes with the last array that looks into it
            os.close(self.handle)

    def next(self, worker: int) -> tuple[int, int, np.ndarray]:
        """The buffer of a worker's turn: its slot, its new stamp and its codes (flat int16)."""
        slot = worker * SLOTS + self._turn % SLOTS
        self._turn += 1
        self.stamps[slot] += 1
        return slot, int(self.stamps[slot]), self._codes(slot)

    def _codes(self, slot: int) -> np.ndarray:
        _, batch_size, frames, voxels, _ = self.shape
        return np.frombuffer(
            self._memory, np.int16, batch_size * frames * voxels, self._slots + slot * self._slot_bytes
        )

    def _table(self, place: int, voxels: int) -> np.ndarray:
        return np.frombuffer(self._memory, np.int32, 3 * voxels, place).reshape(3, voxels)

    def table(self, worker: int, slot: int, row: int, scan: int, voxels: int, make: Callable[[np.ndarray], Any]) -> int:
        """Where the table of a scan lies; it is made if this worker does not keep it.

        Args:
            worker, slot, row: Who asks, for which row of which buffer: it has room for tables that cannot be kept.
            scan: Its number.
            voxels: V.
            make: Fills a table (3, V) int32, see `swift.data.clips.scatter`.
        """
        if place := int(self._places[worker, scan]):
            return place
        size, used = _table_bytes(voxels), int(self._used[worker])
        keep = used + size <= self.kept_bytes
        if keep:
            place = self._tables + worker * self.kept_bytes + used
        else:
            place = self._slots + slot * self._slot_bytes + self._codes_bytes + row * _table_bytes(self.shape[3])
        make(self._table(place, voxels))
        if keep:  # only now: a scan whose table is damaged has none
            self._used[worker] = used + size
            self._places[worker, scan] = place
        return place

    def batch(self, ticket: Ticket) -> dict[str, Any]:
        """The packed batch of a ticket (`swift.data.clips.dataset`); its tensors are views of the buffer."""
        return {
            "codes": torch.from_numpy(self._codes(ticket.slot)[: ticket.codes]),
            "tables": [self._view(place, voxels) for place, voxels in zip(ticket.tables, ticket.voxels, strict=True)],
            "meta": torch.from_numpy(ticket.meta),
            "voxels": ticket.voxels,
            "train": ticket.train,
            "stamp": torch.from_numpy(self.stamps[ticket.slot : ticket.slot + 1]),
            "ticket": ticket.stamp,
        }

    def _view(self, place: int, voxels: int) -> torch.Tensor:
        """A row's table as a tensor; one that is kept, and so never changes, is always the same."""
        if place < self._tables or not voxels:
            return torch.from_numpy(self._table(place, voxels))
        if place not in self._seen:
            self._seen[place] = torch.from_numpy(self._table(place, voxels))
        return self._seen[place]


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _table_bytes(voxels: int) -> int:
    return _whole(12 * voxels, 64)


def _shared_file(size: int) -> int:
    """Descriptor of a nameless file in memory. Not under /dev/shm, which containers often limit to 64 MB."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("swift-batches", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.truncate(handle, size)
    return handle


def check_fresh(packed: dict[str, Any]) -> None:
    """Raise StaleBatch if the buffer of a packed batch (on the CPU) has been used again."""
    if int(packed["stamp"]) != packed["ticket"]:
        raise StaleBatch(
            "a packed batch was overwritten by a later one: use a batch before taking two more from its DataLoader, or "
            "clone its tensors"
        )

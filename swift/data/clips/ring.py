"""Batch buffers in memory that a DataLoader's workers and its main process share.

Sending a tensor from a worker to the main process costs a socket, a mapping and a page fault for every 4 KiB, which is
several times what the read costs. Here one mapping is made before the workers start and is used all the time; what a
worker sends is a `Ticket`: which buffer, and a few integers.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
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
FIELDS: dict[str, np.dtype[Any]] = {name: np.dtype(kind) for name, kind in zip(("codes", "index", "a", "b"), "hiff")}
_RINGS: WeakValueDictionary[int, Ring] = WeakValueDictionary()
_NUMBERS = itertools.count()


class StaleBatch(RuntimeError):
    """A packed batch was used after its buffer had been given to a later one."""


@dataclass
class Ticket:
    """A batch that lies in a buffer of a ring: all that has to go from a worker to the main process.

    Attributes:
        ring, slot, stamp: Which ring, which of its buffers, and the number that the buffer had then.
        rows: Codes in the batch, sum T V.
        cells: Brain voxels in the batch, sum V.
        voxels: V of every row of the batch, 0 for padding.
        meta: (B, 4) int64: sample_id, scan, start, valid.
        train: Whether it is for training.
    """

    ring: int
    slot: int
    stamp: int
    rows: int
    cells: int
    voxels: list[int]
    meta: np.ndarray
    train: bool

    def pin_memory(self, device: str | None = None) -> dict[str, Any]:
        """A copy in page-locked memory; called by the DataLoader's thread where there is a GPU."""
        batch = _RINGS[self.ring].batch(self)
        batch = {name: layer.pinned(one) if isinstance(one, torch.Tensor) else one for name, one in batch.items()}
        check_fresh({"stamp": _RINGS[self.ring].stamps[self.slot], "ticket": self.stamp})
        return batch


class Ring:
    """Buffers for packed batches, SLOTS of them a worker, each used in turn.

    Made in the main process; workers get it by fork or, where they are spawned, with their start arguments.

    Args:
        workers: Worker processes; 0: the main process fills the buffers itself.
        batch_size: B.
        frames: T of a clip.
        voxels: The largest V of a scan.
    """

    def __init__(self, workers: int, batch_size: int, frames: int, voxels: int) -> None:
        self.shape = (workers, batch_size, frames, voxels)
        self.number = next(_NUMBERS)
        self.handle = _shared_file(self._layout())
        self._map()

    def _layout(self) -> int:
        """Places of all fields in a slot, in bytes; returns the size of the whole."""
        workers, batch_size, frames, voxels = self.shape
        self._places: dict[str, tuple[int, int]] = {}
        at = 0
        for name, kind in FIELDS.items():
            count = batch_size * voxels * (frames if name == "codes" else 1)
            self._places[name] = at, count
            at += -(-count * kind.itemsize // PAGE) * PAGE
        self._slot_bytes = at
        return PAGE * -(-max(workers, 1) * SLOTS // (PAGE // 8)) + max(workers, 1) * SLOTS * at

    def _map(self) -> None:
        slots = max(self.shape[0], 1) * SLOTS
        self._memory = mmap.mmap(self.handle, os.fstat(self.handle).st_size)
        self.stamps = np.frombuffer(self._memory, np.int64, slots)
        self._first = PAGE * -(-slots // (PAGE // 8))
        self._turn = 0
        _RINGS[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "number": self.number, "handle": reduction.DupFd(self.handle)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape, self.number, self.handle = state["shape"], state["number"], state["handle"].detach()
        self._layout()
        self._map()

    def __del__(self) -> None:
        if hasattr(self, "handle"):  # the mapping itself goes with the last array that looks into it
            os.close(self.handle)

    def _array(self, slot: int, name: str) -> np.ndarray:
        at, count = self._places[name]
        return np.frombuffer(self._memory, FIELDS[name], count, self._first + slot * self._slot_bytes + at)

    def next(self, worker: int) -> tuple[int, int, dict[str, np.ndarray]]:
        """The buffer of a worker's turn: its slot, its new stamp and its arrays codes, index, a, b (flat)."""
        slot = worker * SLOTS + self._turn % SLOTS
        self._turn += 1
        self.stamps[slot] += 1
        return slot, int(self.stamps[slot]), {name: self._array(slot, name) for name in FIELDS}

    def batch(self, ticket: Ticket) -> dict[str, Any]:
        """The packed batch of a ticket (`swift.data.clips.dataset`); its tensors are views of the buffer."""
        size = {"codes": ticket.rows, "index": ticket.cells, "a": ticket.cells, "b": ticket.cells}
        tensors = {name: torch.from_numpy(self._array(ticket.slot, name)[: size[name]]) for name in FIELDS}
        return {
            **tensors,
            "meta": torch.from_numpy(ticket.meta),
            "voxels": ticket.voxels,
            "train": ticket.train,
            "stamp": torch.from_numpy(self.stamps[ticket.slot : ticket.slot + 1]),
            "ticket": ticket.stamp,
        }


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

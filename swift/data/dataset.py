"""Packed clips for a DataLoader: a worker reads straight into a batch buffer that the main process shares.

A batch is made by one call of `__getitems__`, without a collate step: codes of all clips one after the other in one
int16 buffer. The buffers are few and used in turn, because fresh memory costs more than the read itself.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from swift.data.clips import ClipIndex, ClipSpec
from swift.data.order import PADDING, Item
from swift.data.store import Store

PREFETCH = 2
"""Batches that a DataLoader keeps under way for each worker."""
SLOTS = PREFETCH + 3
"""Buffers of a worker: those under way, one that was handed over, one in use, one to spare."""


class StaleBatch(RuntimeError):
    """A packed batch was used after its buffer had been given to a later one."""


class _Ring:
    """Buffers of one process, used in turn."""

    def __init__(self, batch_size: int, frames: int, voxels: int, shared: bool) -> None:
        self.process = os.getpid()
        self.shape = (batch_size, frames, voxels)
        self.turn = 0
        kinds = {"codes": torch.int16, "index": torch.int32, "a": torch.float32, "b": torch.float32}
        self.slots: list[dict[str, torch.Tensor]] = []
        for _ in range(SLOTS):
            slot = {
                name: torch.empty(batch_size * voxels * (frames if name == "codes" else 1), dtype=kind)
                for name, kind in kinds.items()
            }
            slot["stamp"] = torch.zeros(1, dtype=torch.int64)
            if shared:
                for tensor in slot.values():
                    tensor.share_memory_()
            self.slots.append(slot)

    def next(self) -> tuple[dict[str, torch.Tensor], int]:
        self.turn += 1
        slot = self.slots[self.turn % SLOTS]
        slot["stamp"][0] = self.turn
        return slot, self.turn


class ClipDataset(Dataset[dict[str, Any]]):
    """Packed batches of clips of a store.

    `__getitems__` gives: codes (sum T V,) int16, index (sum V,) int32 flat positions in the grid, a and b (sum V,)
    float32 with normalized value = code * a + b, meta (B, 4) int64 (sample_id, scan, start, valid), voxels (B ints),
    train (bool), stamp and ticket (see `check_fresh`). Padding rows have no voxels.

    The tensors lie in buffers that are used again: a batch stays good while at most one later batch of the same
    DataLoader has been taken (Lightning takes one ahead). Clone it to keep it.

    Args:
        store: Scans.
        index: Clips.
        spec: Their frames.
        normalization: Kind, see `swift.data.stats`.
        verify: Check the checksum of every frame read.
        train: Handed on in each batch.
    """

    def __init__(
        self, store: Store, index: ClipIndex, spec: ClipSpec, normalization: str, verify: bool, train: bool
    ) -> None:
        self.store, self.index, self.spec = store, index, spec
        self.normalization, self.verify, self.train = normalization, verify, train
        self.voxels = max(scan.voxels for scan in store.scans)
        self._ring: _Ring | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ring": None}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: Item) -> dict[str, Any]:
        return self.__getitems__([item])

    def _buffers(self, batch_size: int) -> _Ring:
        ring, shape = self._ring, (batch_size, self.spec.frames, self.voxels)
        if ring is None or ring.process != os.getpid() or ring.shape != shape:
            self._ring = ring = _Ring(*shape, shared=get_worker_info() is not None)
        return ring

    def __getitems__(self, items: list[Item]) -> dict[str, Any]:
        """Read a batch: B items (sample_id, clip)."""
        slot, ticket = self._buffers(len(items)).next()
        codes, index, a, b = (slot[name].numpy() for name in ("codes", "index", "a", "b"))
        scans, starts = self.index.locate(np.array([max(clip, 0) for _, clip in items], np.int64))
        meta = np.empty((len(items), 4), np.int64)
        voxels: list[int] = []
        row = at = 0
        frames = self.spec.frames
        for place, (sample_id, clip) in enumerate(items):
            if clip == PADDING:
                meta[place] = sample_id, -1, -1, 0
                voxels.append(0)
                continue
            scan, start = int(scans[place]), int(starts[place])
            count = self.store.scans[scan].voxels
            out = codes[row : row + frames * count].reshape(frames, count)
            self.store.read(scan, start, start + self.spec.span, self.spec.frame_stride, out, self.verify)
            part = slice(at, at + count)
            index[part] = self.store.indices(scan)
            a[part], b[part] = self.store.normalizer(scan, self.normalization)
            meta[place] = sample_id, scan, start, 1
            voxels.append(count)
            row, at = row + frames * count, at + count
        return {
            "codes": slot["codes"][:row],
            "index": slot["index"][:at],
            "a": slot["a"][:at],
            "b": slot["b"][:at],
            "meta": torch.from_numpy(meta),
            "voxels": voxels,
            "train": self.train,
            "stamp": slot["stamp"],
            "ticket": ticket,
        }


def check_fresh(packed: dict[str, Any]) -> None:
    """Raise StaleBatch if the buffer of a packed batch (on the CPU) has been used again."""
    if int(packed["stamp"]) != packed["ticket"]:
        raise StaleBatch(
            f"packed batch {packed['ticket']} was overwritten by batch {int(packed['stamp'])}: use a batch before "
            "taking two more from its DataLoader, or clone its tensors"
        )


def identity(batch: Any) -> Any:
    """The collate function: batches come ready."""
    return batch

"""Packed clips for a DataLoader: a worker reads straight into a batch buffer that the main process shares.

A batch is made by one call of `__getitems__`, without a collate step: codes of all clips one after the other in one
int16 buffer, and for each clip the place of its scan's table. The buffers are few and used in turn
(`swift.data.clips.ring`): fresh memory costs more than the read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from swift.data.clips.index import ClipIndex, ClipSpec
from swift.data.clips.mixture import Stores
from swift.data.clips.order import PADDING, Item
from swift.data.clips.ring import Ring, Ticket
from swift.data.store.reader import Store
from swift.utils import device


class ClipDataset(Dataset[dict[str, Any]]):
    """Packed batches of clips of a store, to be used through a `ClipLoader`.

    Args:
        store: Scans.
        index: Clips.
        spec: Their frames.
        normalization: Kind, see `swift.data.store.stats`.
        verify: Check the checksum of every frame read.
        train: Handed on in each batch.
    """

    def __init__(
        self, store: Store | Stores, index: ClipIndex, spec: ClipSpec, normalization: str, verify: bool, train: bool
    ) -> None:
        self.store, self.index, self.spec = store, index, spec
        self.normalization, self.verify, self.train = normalization, verify, train
        self.voxels = max(scan.voxels for scan in store.scans)
        self.ring: Ring | None = None

    def __getstate__(self) -> dict[str, Any]:
        starting_a_worker = get_spawning_popen() is not None
        return self.__dict__ | ({} if starting_a_worker else {"ring": None})

    def __len__(self) -> int:
        return len(self.index)

    def make_ring(self, workers: int, batch_size: int) -> Ring:
        """The buffers, made when they are not there or are too small; before workers start."""
        shape = (workers, batch_size, self.spec.frames, self.voxels, len(self.store.scans))
        if self.ring is None or self.ring.shape != shape:
            self.ring = Ring(*shape)
        return self.ring

    def __getitem__(self, item: Item) -> dict[str, Any]:
        return self.make_ring(0, 1).batch(self.__getitems__([item]))

    def __getitems__(self, items: list[Item]) -> Ticket:
        """Read a batch, B items (sample_id, clip), into the next buffer."""
        info = get_worker_info()
        worker = info.id if info else 0
        assert self.ring is not None, "a ClipDataset is read through a ClipLoader"
        slot, stamp, codes = self.ring.next(worker)
        scans, starts = self.index.locate(np.array([max(clip, 0) for _, clip in items], np.int64))
        meta = np.empty((len(items), 4), np.int64)
        voxels, tables = [0] * len(items), [0] * len(items)
        at = 0
        frames = self.spec.frames
        for place, (sample_id, clip) in enumerate(items):
            if clip == PADDING:
                meta[place] = sample_id, -1, -1, 0
                continue
            scan, start = int(scans[place]), int(starts[place])
            count = self.store.scans[scan].voxels
            out = codes[at : at + frames * count].reshape(frames, count)
            self.store.read(scan, start, start + self.spec.span, self.spec.frame_stride, out, self.verify)
            make = partial(self.store.table, scan, self.normalization)
            tables[place] = self.ring.table(worker, slot, place, scan, count, make)
            meta[place] = sample_id, scan, start, 1
            voxels[place] = count
            at += frames * count
        return Ticket(self.ring.number, slot, stamp, at, voxels, tables, meta, self.train)


class ClipLoader(DataLoader[dict[str, Any]]):
    """A DataLoader over a ClipDataset, with `identity` as collate function and a batch_sampler that has a batch_size.

    Gives dictionaries: codes (sum T V,) int16, tables (B tensors (3, V) int32, see `swift.data.clips.scatter`), meta
    (B, 4) int64 (sample_id, scan, start, valid), voxels (B ints), train (bool), stamp and ticket (see
    `swift.data.clips.ring.check_fresh`). Padding rows have no voxels.

    The tensors lie in buffers that are used again: a batch stays good while at most one later batch has been taken
    (Lightning takes one ahead). Clone it to keep it. With pin_memory they are copies and stay good.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # not the iterator object itself
        assert isinstance(self.dataset, ClipDataset)
        assert self.batch_sampler is not None
        ring = self.dataset.make_ring(self.num_workers, self.batch_sampler.batch_size)  # type: ignore[attr-defined]
        for batch in super().__iter__():
            yield ring.batch(batch) if isinstance(batch, Ticket) else batch


class SameBatchLoader(ClipLoader):
    """A ClipLoader without input: the first batch again and again, under the sample numbers of those it stands for.

    For measuring what input costs; it is made with num_workers=0.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        assert isinstance(self.dataset, ClipDataset)
        assert self.batch_sampler is not None
        batches = iter(self.batch_sampler)
        items: list[Item] = next(batches)
        ring = self.dataset.make_ring(0, len(items))
        read = ring.batch(self.dataset.__getitems__(items))
        copy = device.pinned if self.pin_memory else torch.clone
        first = {name: device.each(one, copy) for name, one in read.items()}
        for named in itertools.chain([items], batches):
            meta = first["meta"].clone()
            meta[:, 0] = torch.tensor([sample for sample, _ in named])
            yield first | {"meta": meta}


def identity(batch: Any) -> Any:
    """The collate function: batches come ready."""
    return batch

"""The shared batch buffers: one mapping for all batches, workers that are spawned, pinned copies, stale batches."""

from __future__ import annotations

import gc
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from swift.data.clips import ring as rings
from swift.data.clips.dataset import ClipDataset, ClipLoader, identity
from swift.data.clips.index import ClipIndex, ClipSpec
from swift.data.clips.order import Order, TrainBatches
from swift.data.clips.ring import SLOTS, Ring, StaleBatch, Ticket, check_fresh
from swift.data.store.reader import Store
from tests.data.stores import build, scan

SPEC = ClipSpec(5, 1, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ring") / "store", [0, 1, 2])


def loader(made: Path, workers: int, start_method: str | None = None) -> ClipLoader:
    store = Store(made)
    index = ClipIndex(range(3), [0] * 3, [24] * 3, SPEC.span, SPEC.clip_stride)
    dataset = ClipDataset(store, index, SPEC, "zscore_voxel", True, True)
    batches = TrainBatches(Order(len(index), 0), 2, 0, 1)
    return ClipLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=identity,
        num_workers=workers,
        multiprocessing_context=start_method,
        persistent_workers=workers > 0,
    )


def values(batch: dict, place: int) -> np.ndarray:
    """(T, V) normalized values of one clip of a packed batch, by plain slicing."""
    rows = [5 * v for v in batch["voxels"]]
    row, at = sum(rows[:place]), sum(batch["voxels"][:place])
    count = batch["voxels"][place]
    codes = batch["codes"][row : row + 5 * count].reshape(5, count).numpy()
    return codes * batch["a"][at : at + count].numpy() + batch["b"][at : at + count].numpy()


def expected(batch: dict, place: int) -> np.ndarray:
    number, start = int(batch["meta"][place, 1]), int(batch["meta"][place, 2])
    x = scan(number)[2].astype(np.float64)
    deviation = x.std(0)
    deviation[1] = np.inf
    return ((x - x.mean(0)) / deviation)[start : start + 5]


@pytest.mark.parametrize(("workers", "start_method"), [(0, None), (2, "fork"), (1, "spawn")])
def test_batches_come_through_one_mapping(made: Path, workers: int, start_method: str | None) -> None:
    batches = loader(made, workers, start_method)
    places = set()
    for batch in islice(batches, 3 * SLOTS):
        check_fresh(batch)
        for place in range(2):
            np.testing.assert_allclose(values(batch, place), expected(batch, place), atol=5e-4)
        places.add(batch["codes"].data_ptr())
    assert len(places) == SLOTS * max(workers, 1)


def test_a_second_pass_uses_the_same_buffers(made: Path) -> None:
    batches = loader(made, 1)
    first = next(iter(batches))
    ring = batches.dataset.ring  # type: ignore[attr-defined]
    kept = first["codes"].clone()
    again = next(iter(batches))
    assert batches.dataset.ring is ring  # type: ignore[attr-defined]
    assert torch.equal(again["codes"], kept)


def test_pinned_batches_are_copies(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the DataLoader's pinning thread does where there is a GPU; pinning itself is replaced by a copy."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    batches = loader(made, 0)
    dataset = batches.dataset
    assert isinstance(dataset, ClipDataset)
    dataset.make_ring(0, 2)
    ticket = dataset.__getitems__([(0, 3), (1, 7)])
    assert isinstance(ticket, Ticket)
    pinned = ticket.pin_memory()
    for _ in range(2 * SLOTS):
        dataset.__getitems__([(2, 1), (3, 2)])
    check_fresh(pinned)  # its buffer was used again, it was not
    np.testing.assert_allclose(values(pinned, 1), expected(pinned, 1), atol=5e-4)
    with pytest.raises(StaleBatch):
        ticket.pin_memory()


def test_buffers_do_not_overlap_and_go_away() -> None:
    ring = Ring(2, 3, 5, 7)
    seen = []
    for worker in (0, 1, 0):
        slot, stamp, arrays = ring.next(worker)
        assert stamp == 1
        assert {name: array.size for name, array in arrays.items()} == {"codes": 105, "index": 21, "a": 21, "b": 21}
        for array in arrays.values():
            array[:] = len(seen) + 1
        seen.append((slot, arrays))
    assert [slot for slot, _ in seen] == [0, SLOTS + 1, 2]  # turns are those of the process
    for value, (_, arrays) in enumerate(seen, 1):
        assert all((array == value).all() for array in arrays.values())
    handle, number = ring.handle, ring.number
    os.fstat(handle)
    del ring, seen, arrays, array
    gc.collect()
    assert number not in rings._RINGS
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)

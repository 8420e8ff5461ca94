"""The shared batch buffers: one mapping for all batches, workers that are spawned, pinned copies, stale batches."""

from __future__ import annotations

import gc
import os
import pickle
from functools import partial
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
from swift.data.store.reader import CorruptData, Store
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
    row, count = 5 * sum(batch["voxels"][:place]), batch["voxels"][place]
    codes = batch["codes"][row : row + 5 * count].reshape(5, count).numpy()
    np.testing.assert_array_equal(batch["tables"][place][0], np.flatnonzero(scan(int(batch["meta"][place, 1]))[1]))
    a, b = batch["tables"][place][1:].numpy().view(np.float32)
    return codes * a + b


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


def test_a_table_is_made_once_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is made again for every batch; what could not be made is not kept; spawned or not."""
    monkeypatch.setattr(rings, "TABLE_BYTES", 2 * rings.PAGE)
    ring = Ring(1, 2, 1, 300, 9)  # 3,648 bytes a table: two fit
    made: list[int] = []

    def place(scan: int, row: int = 0, voxels: int = 300) -> int:
        def make(table: np.ndarray) -> None:
            made.append(scan)
            if scan == 8:
                raise CorruptData("damaged", "shard", "scan")
            table[:] = 1000 * len(made) + scan

        return ring.table(0, ring.next(0)[0], row, scan, voxels, make)

    with pytest.raises(CorruptData):
        place(8)
    places = [place(scan) for scan in (3, 0, 3, 0, 3)]
    assert made == [8, 3, 0]
    assert places == [places[0], places[1]] * 2 + [places[0]]
    spare = [place(scan, row) for scan, row in ((5, 0), (5, 1))]
    assert made == [8, 3, 0, 5, 5]
    assert [int(ring._view(at, 300)[2, 299]) for at in (*places[:2], *spare)] == [2003, 3000, 4005, 5005]
    assert ring._view(places[0], 300) is ring._view(places[0], 300)
    # A worker that begins anew knows no turn, but finds the tables.
    ring._turn, ring._seen = 0, {}
    assert place(0) == places[1]
    assert made == [8, 3, 0, 5, 5]
    assert place(1, voxels=20) == places[1] + 3648  # a small one still fits
    assert ring.kept_bytes == 2 * rings.PAGE


def test_batches_refer_to_tables_instead_of_sending_them(made: Path) -> None:
    """No table is made twice, and a ticket stays a few hundred bytes however large the brain."""
    batches = loader(made, 0)
    dataset = batches.dataset
    assert isinstance(dataset, ClipDataset)
    made_of: list[int] = []
    original = dataset.store.table
    dataset.store.table = lambda scan, kind, out=None: made_of.append(scan) or original(scan, kind, out)  # type: ignore
    seen: dict[int, set[int]] = {}
    for batch in islice(batches, 4 * SLOTS):
        for number, table in zip(batch["meta"][:, 1].tolist(), batch["tables"], strict=True):
            seen.setdefault(number, set()).add(table.data_ptr())
    assert sorted(made_of) == [0, 1, 2]
    assert all(len(places) == 1 for places in seen.values())
    assert len(pickle.dumps(dataset.__getitems__([(0, 3), (1, 7)]))) < 600


def test_buffers_do_not_overlap_and_go_away() -> None:
    ring = Ring(2, 3, 5, 7, 40)
    seen: list[tuple[int, np.ndarray]] = []
    for worker in (0, 1, 0):
        slot, stamp, codes = ring.next(worker)
        assert (stamp, codes.size) == (1, 105)
        codes[:] = len(seen) + 1
        for row in range(3):
            value = 100 + len(seen)
            place = ring.table(worker, slot, row, len(seen), 7, partial(np.copyto, src=np.int32(value)))
            seen.append((place, ring._table(place, 7)))
        seen.append((slot, codes))
    assert [slot for slot, codes in seen if codes.ndim == 1] == [0, SLOTS + 1, 2]  # turns are those of the process
    found = [set(array.ravel().tolist()) for _, array in seen]
    assert found == [{100}, {101}, {102}, {1}, {104}, {105}, {106}, {5}, {108}, {109}, {110}, {9}]
    handle, number = ring.handle, ring.number
    os.fstat(handle)
    del ring, seen, codes
    gc.collect()
    assert number not in rings._RINGS
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)

"""The order of samples: one stream, whatever the ranks, and exact continuation from one integer."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift.data.clips.order import PADDING, Order, TrainBatches, ValBatches, permutation
from swift.utils.errors import UserError


@given(st.integers(1, 500), st.integers(-(2**63), 2**63), st.integers(0, 1000))
def test_permutation(clips: int, seed: int, epoch: int) -> None:
    p = permutation(clips, seed, epoch)
    assert sorted(p.tolist()) == list(range(clips))
    assert (p == permutation(clips, seed, epoch)).all()


def test_permutation_is_fixed_for_ever() -> None:
    """A run must continue exactly with another version of NumPy."""
    assert permutation(8, 7, 0).tolist() == FIXED[0]
    assert permutation(8, 7, 1).tolist() == FIXED[1]
    assert permutation(8, 8, 0).tolist() == FIXED[2]


def test_permutations_are_even() -> None:
    """Every clip comes to every place about equally often."""
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), permutation(6, 1, epoch)] += 1
    assert np.abs(counts / 500 - 1).max() < 0.2


@given(st.integers(1, 40), st.integers(0, 5), st.data())
def test_an_epoch_holds_every_clip_once(clips: int, seed: int, data: st.DataObject) -> None:
    order = Order(clips, seed)
    epoch = data.draw(st.integers(0, 50))
    assert sorted(order(np.arange(epoch * clips, (epoch + 1) * clips))) == list(range(clips))
    counters = np.array(data.draw(st.lists(st.integers(0, 10**6), max_size=20)), np.int64)
    want = [permutation(clips, seed, g // clips)[g % clips] for g in counters.tolist()]
    assert order(counters).tolist() == want


def stream(order: Order, total: int, world: int, steps: int, start: int = 0) -> list[tuple[int, int]]:
    """What all ranks take together, global batch by global batch."""
    assert total % world == 0
    ranks = [iter(TrainBatches(order, total // world, rank, world, start)) for rank in range(world)]
    return [item for _ in range(steps) for rank in ranks for item in next(rank)]


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(0, 2**31), st.sampled_from([8, 16, 24]), st.integers(0, 500))
def test_order_is_equal_for_any_number_of_ranks(clips: int, seed: int, total: int, start: int) -> None:
    order = Order(clips, seed)
    one = stream(order, total, 1, 6, start)
    counters = np.arange(start, start + 6 * total)
    assert one == list(zip(counters.tolist(), order(counters).tolist()))
    for world in (2, 4, 8):
        assert stream(order, total, world, 6, start) == one
    # Accumulation: two micro-batches of half the size.
    assert stream(order, total // 2, 4, 12, start) == one


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9), st.integers(0, 300))
def test_continuing_in_mid_epoch(clips: int, batch: int, steps: int, start: int) -> None:
    order = Order(clips, 3)
    loader = TrainBatches(order, batch, 0, 1, start)
    items = list(islice(loader, steps + 4))
    consumed = {loader.consumed_after(sample) for sample, _ in items[steps - 1]}
    assert consumed == {start + steps * batch}
    again = TrainBatches(Order(clips, 3), batch, 0, 1, consumed.pop())
    assert list(islice(again, 4)) == items[steps:]


def test_going_on_with_another_number_of_ranks() -> None:
    order = Order(50, 1)
    whole = stream(order, 12, 4, 10)
    loader = TrainBatches(order, 3, 2, 4)
    consumed = loader.consumed_after(next(islice(loader, 4, None))[0][0])
    assert consumed == 60
    assert stream(order, 12, 3, 5, consumed) == whole[60:]
    assert TrainBatches(order, 4, 1, 3, consumed).consumed_after(60 + 12 + 4) == 84


@given(st.integers(1, 70), st.integers(1, 7), st.sampled_from([1, 2, 4, 8]))
def test_evaluation_takes_every_clip_once(clips: int, batch: int, world: int) -> None:
    ranks = [ValBatches(clips, batch, rank, world) for rank in range(world)]
    batches = [list(rank) for rank in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])} == {-(-clips // (batch * world))}
    assert all(len(rows) == batch for b in batches for rows in b)
    rows = [row for b in batches for rs in b for row in rs]
    assert sorted(clip for _, clip in rows if clip != PADDING) == list(range(clips))
    assert all(sample == clip if clip != PADDING else sample >= clips for sample, clip in rows)
    assert len({sample for sample, _ in rows}) == len(rows)
    assert sum(clip == PADDING for _, clip in rows) < batch * world
    # Global batch by global batch, the same for any number of ranks.
    one = list(ValBatches(clips, batch * world, 0, 1))
    assert [[row for rs in step for row in rs] for step in zip(*batches)] == one


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="no training clip"):
        Order(0, 1)
    with pytest.raises(UserError, match="batch_size=0"):
        TrainBatches(Order(3, 1), 0, 0, 1)


FIXED = [[4, 1, 6, 3, 2, 7, 5, 0], [3, 1, 6, 2, 5, 4, 0, 7], [4, 3, 1, 6, 7, 2, 5, 0]]

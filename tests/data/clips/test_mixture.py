"""Mixtures of cohorts: exact proportions, one stream for any ranks, exact continuation, the right scans."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swift.config.schema_data import CohortConfig
from swift.data.clips.mixture import Stores
from swift.data.clips.order import BLOCK, MixedOrder, TrainBatches, quotas
from swift.data.module import ClipDataModule
from swift.data.store.reader import Store, StoreWriter
from swift.utils.errors import UserError
from tests.data.stores import build, scan
from tests.data.test_module import SETTINGS, slow_clip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mixture")
    return [build(root / "a", [0, 1, 3], [24, 31, 40]), build(root / "b", [2], [24])]


def module(made: list[Path], weights: list[float | None], **changes: Any) -> ClipDataModule:
    mixture = [CohortConfig(str(path), weight) for path, weight in zip(made, weights)]
    rank, world = changes.pop("rank", None), changes.pop("world", None)
    return ClipDataModule(dataclasses.replace(SETTINGS, mixture=mixture, **changes), "unused", 7, rank, world)


def take(data: ClipDataModule, count: int) -> list[dict[str, torch.Tensor]]:
    return [data.dense(packed) for packed in islice(data.train_dataloader(), count)]


# ------------------------------------------------------------------------------------------------------- the order
def test_quotas() -> None:
    assert quotas([2, 1]) == [684, 342]
    assert quotas([0.6, 0.3, 0.1]) == [618, 309, 103]
    assert quotas([5]) == [1024]
    odd = quotas([1, np.sqrt(2), np.pi])
    assert sum(odd) == BLOCK[1]
    np.testing.assert_allclose(np.divide(odd, BLOCK[1]), np.divide([1, np.sqrt(2), np.pi], 2.4142136 + 3.1415927), 2e-5)
    with pytest.raises(UserError, match=r"none may be below 0\.1%"):
        quotas([1, 2000])
    with pytest.raises(UserError, match="must be numbers above 0"):
        quotas([1, 0])


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data(), st.integers(-(2**40), 2**40), st.integers(0, 5000)
)
def test_proportions_and_epochs(clips: list[int], data: st.DataObject, seed: int, start: int) -> None:
    weights = [data.draw(st.sampled_from([1, 2, 3, 0.5])) for _ in clips]
    order = MixedOrder(clips, weights, seed)
    block = sum(order.quota)
    ends = np.cumsum(clips)
    whole = order(np.arange(3 * block))
    cohort = np.searchsorted(ends, whole, side="right")
    for number in range(3):  # every block holds every cohort's part exactly
        counts = np.bincount(cohort[number * block : (number + 1) * block], minlength=len(clips))
        assert counts.tolist() == order.quota
    for number, own in enumerate(clips):  # every cohort goes through its own epochs, each clip once in each
        taken = whole[cohort == number] - (ends[number] - own)
        for epoch in range(len(taken) // own):
            assert sorted(taken[epoch * own : (epoch + 1) * own]) == list(range(own))
    some = np.arange(start, start + 50)  # a pure function of the counter: alone, backwards, from another object
    again = MixedOrder(clips, weights, seed)
    want = order(some)
    assert [int(again(np.array([g]))[0]) for g in reversed(some.tolist())] == want[::-1].tolist()


def test_short_windows_are_mixed_too() -> None:
    order = MixedOrder([1000, 1000], [1, 3], 0)
    share = (order(np.arange(64 * 200)).reshape(200, 64) < 1000).mean(1)
    assert share.min() > 0.05
    assert share.max() < 0.5  # 64 independent draws: 0.25 +- 0.054


def test_ranks_share_one_stream() -> None:
    order = MixedOrder([11, 30, 7], [3, 1, 1], 5)
    one = [item for step in islice(TrainBatches(order, 24, 0, 1, 120), 20) for item in step]
    for world in (2, 4, 8):
        ranks = [iter(TrainBatches(order, 24 // world, rank, world, 120)) for rank in range(world)]
        assert [item for _ in range(20) for rank in ranks for item in next(rank)] == one


# ------------------------------------------------------------------------------------------------------ the batches
def test_several_stores_read_like_one(made: list[Path]) -> None:
    both = Stores(made)
    assert [info.scan_id[:6] for info in both.scans] == ["sub-00", "sub-01", "sub-03", "sub-02"]
    assert both.cohort.tolist() == [0, 0, 0, 1]
    for place, number in enumerate([0, 1, 3, 2]):
        _, mask, _ = scan(number)
        alone = Store(made[both.cohort[place]])
        at = alone.find(both.scans[place].scan_id)
        np.testing.assert_array_equal(both.mask(place), mask)
        np.testing.assert_array_equal(both.indices(place), np.flatnonzero(mask))
        np.testing.assert_array_equal(both.read(place, 2, 9, 3, verify=True), alone.read(at, 2, 9, 3))
        np.testing.assert_array_equal(both.normalizer(place, "percent"), alone.normalizer(at, "percent"))
        np.testing.assert_array_equal(both.affine(place), alone.affine(at))
        assert both.attributes(place)["scan_id"] == both.scans[place].scan_id
    both.close()


def test_stores_of_two_grids_do_not_mix(made: list[Path], tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "c", (4, 4, 4), 2.0) as writer:
        writer.add(*scan(5, grid=(4, 4, 4)))
    with pytest.raises(UserError, match=r"c has grid \[4, 4, 4\] at 2.0 mm, .*a has grid \[5, 6, 7\]"):
        Stores([made[0], tmp_path / "c"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_mixture(made: list[Path], workers: int) -> None:
    data = module(made, [1, 1], workers=workers)
    seen: Counter[int] = Counter()
    numbers = [0, 1, 3, 2]
    for batch in take(data, 256):
        for place in range(4):
            seen[int(batch["scan"][place])] += 1
        number, start = numbers[int(batch["scan"][0])], int(batch["start"][0])
        np.testing.assert_allclose(batch["bold"][0, 0], slow_clip(number, start, 1), atol=5e-4)
    assert seen[3] == 512  # one block: half of it from the store with one scan
    assert sum(seen.values()) == 1024


def test_without_weights_every_clip_once_an_epoch(made: list[Path]) -> None:
    data = module(made, [None, None])
    clips = len(data.train_index)
    order = data.order(np.arange(clips))
    assert sorted(order.tolist()) == list(range(clips))
    assert data.state_dict()["mixture"] is None


def test_continuing_and_refusing(made: list[Path]) -> None:
    whole = take(module(made, [2, 1]), 9)
    first = module(made, [2, 1], workers=2)
    take(first, 4)
    state = first.state_dict()
    assert (state["consumed"], state["mixture"]) == (16, [684, 342])
    second = module(made, [4, 2])
    second.load_state_dict(state)
    for got, want in zip(take(second, 5), whole[4:]):
        assert all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(UserError, match="the run had mixture"):
        module(made, [1, 1]).load_state_dict(state)
    with pytest.raises(UserError, match="the run had training frames"):
        module(made[::-1], [1, 2]).load_state_dict(state)


def test_a_cohort_without_a_clip_is_named(made: list[Path], tmp_path: Path) -> None:
    from swift.data.labels.splits import Split, save_splits

    save_splits(tmp_path / "s.json", [Split({"train": ("00", "01"), "val": ("02",), "test": ()})])
    with pytest.raises(UserError, match="/b has no training clip"):
        module(made, [1, 1], split=str(tmp_path / "s.json"))


def test_a_budget_of_a_mixture(made: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "swift.data")
    data = module(made, [None, None], max_subjects=2, max_frames=20, budget_seed=1)
    kept = {data.store.scans[s].subject for s in data.train_index.scan}
    assert len(kept) == 2
    assert data.train_index.length.sum() <= 20
    assert f"training on 2 of 4 subjects, {data.train_index.length.sum()} of " in caplog.text
    assert len(data.val_index) == len(module(made, [None, None]).val_index)  # what is judged on stays the same

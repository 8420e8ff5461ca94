"""Budgets: nested subsets of subjects, frames dealt evenly, nothing above the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift.data.clips.index import ClipIndex
from swift.data.clips.subset import level, ranking, spend
from swift.utils.errors import UserError

SUBJECTS = [f"{n // 2:03d}" for n in range(200)]  # 100 subjects of two scans
LENGTHS = [30 + 7 * (n % 5) for n in range(200)]
INDEX = ClipIndex(range(200), [0] * 200, LENGTHS, 10, 5)


def frames_of(index: ClipIndex) -> set[tuple[int, int]]:
    """(scan, frame) of all that a budget leaves."""
    return {(s, t) for s, f, n in zip(index.scan, index.first, index.length) for t in range(f, f + n)}


def test_without_a_budget_nothing_changes() -> None:
    assert spend(INDEX, SUBJECTS, None, None, 0) is INDEX


def test_the_fifty_contain_the_twenty() -> None:
    taken = [{SUBJECTS[s] for s in spend(INDEX, SUBJECTS, n, None, 3).scan} for n in (1, 20, 50, 100)]
    assert [len(names) for names in taken] == [1, 20, 50, 100]
    assert taken[0] < taken[1] < taken[2] < taken[3]
    assert {SUBJECTS[s] for s in spend(INDEX, SUBJECTS, 20, None, 4).scan} != taken[1]
    fewer = ClipIndex(range(0, 150), [0] * 150, LENGTHS[:150], 10, 5)  # the store before it grew
    kept = {SUBJECTS[s] for s in spend(fewer, SUBJECTS, 20, None, 3).scan}
    assert taken[1] & set(SUBJECTS[:150]) <= kept


def test_ranking_is_fixed_for_ever() -> None:
    assert ranking(["a", "b", "c", "d", "b"], 0) == ["d", "c", "a", "b"]
    assert ranking(["a", "b", "c", "d"], 1) != ranking(["a", "b", "c", "d"], 0)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 400))
def test_level_against_a_search(frames: list[int], total: int) -> None:
    best = max(n for n in range(0, max(frames) + 1) if sum(min(f, n) for f in frames) <= total)
    assert level(frames, total) == best


@given(st.integers(1, 100), st.integers(0, 2))
def test_frames_are_nested_and_never_too_many(subjects: int, seed: int) -> None:
    whole = spend(INDEX, SUBJECTS, subjects, None, seed)
    there = int(whole.length.sum())
    before: set[tuple[int, int]] = set()
    for budget in sorted({max(10 * subjects, there // 3), max(10 * subjects, there // 2), there}):
        kept = spend(INDEX, SUBJECTS, subjects, budget, seed)
        frames = frames_of(kept)
        assert before <= frames <= frames_of(whole)
        assert len(frames) == kept.length.sum() <= budget
        assert kept.length.min() >= 10
        before = frames
    assert before == frames_of(whole)


def test_frames_are_dealt_evenly() -> None:
    kept = spend(INDEX, SUBJECTS, 10, 450, 0)  # 45 frames each: a whole first scan and the begin of the second
    own: dict[str, int] = {}
    for scan, length in zip(kept.scan, kept.length):
        own[SUBJECTS[scan]] = own.get(SUBJECTS[scan], 0) + int(length)
    assert len(own) == 10
    first = {SUBJECTS[scan]: int(length) for scan, length in reversed(list(zip(kept.scan, kept.length)))}
    for name, frames in own.items():
        rest = 45 - first[name]
        assert frames == (45 if rest >= 10 else first[name])


@pytest.mark.parametrize(
    ("subjects", "frames", "message"),
    [
        (101, None, "data.max_subjects=101: there are 1 to 100 subjects"),
        (0, None, "data.max_subjects=0"),
        (None, sum(LENGTHS) + 1, f"have 1 to {sum(LENGTHS)} frames"),
        (50, 499, "data.max_frames=499 are 9 for each of 50 subjects, and a clip spans 10"),
    ],
)
def test_budgets_that_cannot_be(subjects: int | None, frames: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spend(INDEX, SUBJECTS, subjects, frames, 0)

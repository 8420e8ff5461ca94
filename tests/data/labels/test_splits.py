"""Splits: nobody twice, families together, strata alike, leaks named."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift.data.labels.splits import (
    PARTS,
    Person,
    Split,
    audit,
    bin_labels,
    deal,
    k_fold,
    load_split,
    load_splits,
    make_split,
    part_sizes,
    save_splits,
    small_strata,
)
from swift.utils.errors import UserError


def cohort(n: int, seed: int = 0, families: bool = True) -> list[Person]:
    """A third with a label, sites of 3 : 2 : 1, families of one to four."""
    rng = np.random.default_rng(seed)
    return [
        Person(
            f"{i:04d}",
            f"f{i // 3}" if families and i % 5 else "",
            "case" if rng.random() < 1 / 3 else "control",
            "AAABBC"[rng.integers(6)],
        )
        for i in range(n)
    ]


@settings(max_examples=40)
@given(st.integers(12, 80), st.integers(0, 99), st.booleans())
def test_everyone_once_and_families_together(n: int, seed: int, families: bool) -> None:
    people = cohort(n, seed, families)
    split = make_split(people, 0.2, 0.2, seed)
    everyone = [s for part in PARTS for s in split.parts[part]]
    assert sorted(everyone) == [p.subject for p in people]
    assert audit(split, people) == []
    assert make_split(people[::-1], 0.2, 0.2, seed) == split  # the order of the table does not matter


def test_strata_are_alike() -> None:
    people = cohort(600, 1)
    split = make_split(people, 0.15, 0.25, 5)
    stratum = {p.subject: (p.label, p.site) for p in people}
    total = Counter(stratum.values())
    for part, share in zip(PARTS, (0.6, 0.15, 0.25)):
        assert abs(len(split.parts[part]) - 600 * share) <= 3
        counts = Counter(stratum[s] for s in split.parts[part])
        for key, number in total.items():
            assert abs(counts[key] - share * number) <= 3, (part, key)
    assert make_split(people, 0.15, 0.25, 6).parts != split.parts


def test_sizes_of_parts_by_largest_remainders() -> None:
    assert part_sizes(100, (0.7, 0.15, 0.15)) == [70, 15, 15]
    assert part_sizes(10, (0.7, 0.15, 0.15)) == [7, 2, 1]
    assert part_sizes(4, (0.9, 0.1, 0.0)) == [3, 1, 0]
    assert part_sizes(3, (1 / 3, 1 / 3, 1 / 3)) == [1, 1, 1]
    assert part_sizes(1, (0.5, 0.5)) == [1, 0]


@pytest.mark.parametrize("sites", [20, 100])
def test_shares_are_kept_where_strata_are_small(sites: int) -> None:
    people = [Person(f"{i:03d}", "", "ab"[i % 2], str(i * 7919 % sites)) for i in range(100)]
    assert len(small_strata(people, (0.7, 0.15, 0.15))) == sites
    for seed in range(5):
        split = make_split(people, 0.15, 0.15, seed)
        assert [len(split.parts[part]) for part in PARTS] == [70, 15, 15]
        labels = {p.subject: p.label for p in people}
        assert all(abs(Counter(labels[s] for s in split.parts[part])["a"] - n / 2) <= 1 for part, n in
                   zip(PARTS, (70, 15, 15)))  # fmt: skip
    for fold in k_fold(people[:12], 5, 0.1, 0):
        assert len(fold.parts["val"]) == 1
    with pytest.raises(UserError, match=r"part val .* is empty"):
        k_fold(people[:2], 2, 0.1, 0)


def test_which_strata_are_small() -> None:
    people = [Person(f"{i:03d}", "", "", "AAAAAAAB"[i % 8]) for i in range(40)]
    assert small_strata(people, (0.6, 0.2, 0.2)) == set()
    assert small_strata(people, (0.7, 0.15, 0.15)) == {("", "B")}
    assert small_strata(people[:7], (0.9, 0.1)) == set()  # one stratum alone is merged with none


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=15)
def test_folds(folds: int, repeats: int, seed: int) -> None:
    people = cohort(40, seed)
    splits = k_fold(people, folds, 0.2, seed, repeats)
    assert len(splits) == folds * repeats
    for repeat in range(repeats):
        tested = [s for split in splits[repeat * folds : (repeat + 1) * folds] for s in split.parts["test"]]
        assert sorted(tested) == [p.subject for p in people]
    for split in splits:
        assert audit(split, people) == []
        assert sum(len(split.parts[p]) for p in PARTS) == 40
    if repeats > 1:
        # A single fold may come again by chance, a whole repeat does not.
        first, second = ({split.parts["test"] for split in splits[start : start + folds]} for start in (0, folds))
        assert first != second


def test_bins_of_a_continuous_label() -> None:
    got = bin_labels([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, np.nan])
    assert got == ["0", "0", "1", "1", "2", "2", "3", "3", "4", "4", ""]
    assert bin_labels([np.nan, np.inf]) == ["", ""]


def test_files_keep_splits_and_find_edits(tmp_path: Path) -> None:
    splits = k_fold(cohort(30), 3, 0.1, 4)
    path = tmp_path / "split.json"
    hashes = save_splits(path, splits)
    assert len(set(hashes)) == 3
    assert load_splits(path) == splits
    assert load_split(str(path)) == splits[0]
    assert load_split(f"{path}:2") == splits[2]
    assert load_split(f"{path}:2").hash == hashes[2]
    with pytest.raises(UserError, match="it has 0 to 2"):
        load_split(f"{path}:3")
    edited = json.loads(path.read_text())
    edited["splits"][1]["train"].pop()
    path.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"split 1 has hash .* changed by hand"):
        load_splits(path)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="not a file of splits"):
        load_splits(path)
    path.write_bytes(bytes(range(256)) * 4000)
    with pytest.raises(UserError, match="not text") as caught:
        load_splits(path)
    assert len(str(caught.value)) < 300
    path.write_text(json.dumps({"version": 1, "splits": [{"a" * 9999: 1}]}))
    with pytest.raises(UserError, match="not a file of splits") as caught:
        load_splits(path)
    assert len(str(caught.value)) < 400
    with pytest.raises(UserError, match="No such file"):
        load_splits(tmp_path / "none.json")


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"x\.json: cannot be written: Read-only file system"):
        save_splits(tmp_path / "x.json", k_fold(cohort(30), 3, 0.1, 4))


def test_places_of_scans() -> None:
    split = Split({"train": ("a", "c"), "val": ("b",), "test": ()})
    assert split.places(["b", "a", "a", "x", "c"]) == {"train": [1, 2, 4], "val": [0], "test": []}


def test_leaks_are_refused_by_name() -> None:
    leaky = Split({"train": ("a", "b", "c"), "val": ("d",), "test": ("b", "e")})
    with pytest.raises(UserError, match=r"subject in more than one part: b \(train and test\)"):
        audit(leaky)
    clean = Split({"train": ("a", "b"), "val": ("d",), "test": ("e",)})
    family = [Person("a", "smith"), Person("e", "smith"), Person("b"), Person("d")]
    with pytest.raises(UserError, match=r"family in more than one part: smith \(train and test\)"):
        audit(clean, family)
    assert audit(clean, pretrained=["a", "b", "d"]) == []
    (warning,) = audit(clean, pretrained=["e", "a"])
    assert warning.startswith("1 test subjects were in pre-training: e;")


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="together below 1"):
        make_split(cohort(10), 0.5, 0.5, 0)
    with pytest.raises(UserError, match="2 subjects are too few: part"):
        make_split(cohort(2), 0.1, 0.1, 0)
    with pytest.raises(UserError, match="listed twice: a"):
        make_split([Person("a"), Person("a")], 0.1, 0.1, 0)
    with pytest.raises(UserError, match=r"folds=1 must be 2..3"):
        k_fold(cohort(3, families=False), 1, 0.1, 0)
    with pytest.raises(UserError, match="sum to 1"):
        deal(cohort(3), (0.5, 0.2), 0)

"""data.brain=cohort: the union of the masks of all scans, made once and frozen into the settings."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from swift.config.schema import Config
from swift.config.schema_data import CohortConfig
from swift.data import cohort_brain
from swift.data.cohort_brain import cells_of, with_cohort
from swift.data.store.reader import Store
from swift.utils.bits import from_text
from swift.utils.errors import UserError
from tests.data.stores import GRID, build, scan
from tests.small import settings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@lru_cache
def base() -> Config:
    """Settings of a run on a store of `tests.data.stores`."""
    words = ["model.tokens=brain", "data.brain=cohort", "model.patch_size=[2,2,4,1]", "data.grid=[5,6,7]"]
    return settings(*words)


def asking(*paths: Path, patch: tuple[int, ...] = (2, 2, 4, 1)) -> Config:
    """Settings of a run on these stores."""
    cfg = replace(base(), model=replace(base().model, patch_size=list(patch)))
    mixture = [CohortConfig(str(path)) for path in paths[1:] and paths]
    return replace(cfg, data=replace(cfg.data, path=None if mixture else str(paths[0]), mixture=mixture))


def expected(numbers: list[int]) -> np.ndarray:
    """Patches of 2 x 2 x 4 voxels with a voxel of some scan's mask, one by one."""
    found = np.zeros((3, 3, 2), bool)
    for number in numbers:
        for x, y, z in zip(*np.nonzero(scan(number)[1])):
            found[x // 2, y // 2, z // 4] = True
    return found


def test_the_cells_of_a_box() -> None:
    brain = np.zeros(GRID, bool)
    brain[4, 5, 6] = brain[0, 0, 3] = True
    assert np.argwhere(cells_of(brain, (2, 2, 4, 1))).tolist() == [[0, 0, 0], [2, 2, 1]]


def test_the_union_is_that_of_all_masks(tmp_path: Path) -> None:
    """Of a store, and of a mixture; masks of one voxel a patch, so that they differ."""
    one, two = build(tmp_path / "one", [1, 2]), build(tmp_path / "two", [3])
    for paths, numbers in (([one], [1, 2]), ([one, two], [1, 2, 3])):
        found = with_cohort(asking(*paths, patch=(1, 1, 1, 1)))
        masks = np.stack([scan(number)[1] for number in numbers])
        assert found.model.cohort is not None
        assert np.array_equal(from_text(found.model.cohort), masks.any(0))
        assert (masks.any(0) != masks).any((1, 2, 3)).all()
        coarse = with_cohort(asking(*paths)).model.cohort
        assert coarse is not None
        assert np.array_equal(from_text(coarse), expected(numbers))


def test_it_is_made_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run reads it, another store does not, and a file that was damaged is made anew."""
    store = build(tmp_path / "store", [1, 2])
    read: list[int] = []
    mask = Store.mask_alone
    monkeypatch.setattr(Store, "mask_alone", lambda self, place: (read.append(place), mask(self, place))[1])
    first = with_cohort(asking(store)).model.cohort
    assert with_cohort(asking(store)).model.cohort == first
    assert read == [0, 1]
    (kept,) = (cache / cohort_brain.FOLDER).iterdir()
    kept.write_text("5x6x7:AAAA")
    assert with_cohort(asking(store)).model.cohort == first
    assert read == [0, 1] * 2
    with_cohort(asking(build(tmp_path / "other", [1])))
    assert len(read) == 5
    frozen = replace(asking(store), model=replace(asking(store).model, cohort="frozen"))
    assert with_cohort(frozen) is frozen
    own = replace(base(), data=replace(base().data, brain="scan"))
    assert with_cohort(own) is own


def test_excluded_scans_are_not_in_it(tmp_path: Path) -> None:
    """By name of a scan or a subject, of a store of a mixture too; kept apart from the union of all."""
    one, two = build(tmp_path / "one", [1, 2]), build(tmp_path / "two", [3, 4])
    for names, numbers in (([], [1, 2, 3, 4]), (["02"], [1, 3, 4]), (["sub-02_task-rest", "03"], [1, 4])):
        cfg = asking(one, two, patch=(1, 1, 1, 1))
        for _ in range(2):
            found = with_cohort(replace(cfg, data=replace(cfg.data, exclude=names))).model.cohort
            assert found is not None
            assert np.array_equal(from_text(found), np.stack([scan(number)[1] for number in numbers]).any(0))


def test_a_damaged_mask_is_named_and_the_union_not_kept(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = build(tmp_path / "store", [1, 2], shard_bytes=1 << 20)
    store = Store(path)
    shard = path / "shards" / store.scans[0].shard
    offset = int(store._layout(1).offset[0])
    with shard.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\2")
    with caplog.at_level(logging.WARNING):
        found = with_cohort(asking(path)).model.cohort
    assert found is not None
    assert np.array_equal(from_text(found), expected([1]))
    (line,) = [record.getMessage() for record in caplog.records if "damaged mask" in record.getMessage()]
    assert "sub-02_task-rest" in line
    assert not list((cache / cohort_brain.FOLDER).iterdir())


def test_a_store_of_another_grid_is_refused(tmp_path: Path) -> None:
    cfg = asking(build(tmp_path / "store", [1]))
    with pytest.raises(UserError, match=r"have the grid \[5, 6, 7\], not data.grid=\[5, 6, 8\]"):
        with_cohort(replace(cfg, data=replace(cfg.data, grid=[5, 6, 8])))

"""Staging: once a node, verified, only what is needed; the shared file system where that fails, with a warning."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import shutil
from collections import namedtuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift.config.schema_data import CohortConfig
from swift.data.module import ClipDataModule
from swift.data.store import check as maintain
from swift.data.store import staging
from swift.data.store.reader import CorruptData, Store
from swift.data.store.staging import stage
from tests.data.stores import build
from tests.data.test_module import SETTINGS

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = build(tmp_path / "store", [0, 1, 2, 3], shard_bytes=15_000)
    assert len(list((path / "shards").iterdir())) == 2
    return path


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "swift.data")
    return caplog


def test_reads_from_the_copy(made: Path, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    store = Store(made)
    want = [store.read(scan, 0, 24) for scan in range(4)]
    assert stage(store, str(tmp_path / "disk"), range(4)) == ["00000.h5", "00001.h5"]
    assert "2 shards" in told.text
    assert "verified" in told.text
    assert all(path.is_relative_to(tmp_path / "disk") for path in store.local.values())
    for file in (made / "shards").iterdir():
        file.unlink()
    for scan in range(4):
        np.testing.assert_array_equal(store.read(scan, 0, 24, verify=True), want[scan])
        assert store.check(scan) == []


def test_only_the_shards_that_are_needed(made: Path, tmp_path: Path) -> None:
    store = Store(made)
    needed = [place for place, scan in enumerate(store.scans) if scan.shard == "00001.h5"]
    assert stage(store, str(tmp_path / "disk"), needed) == ["00001.h5"]
    assert [file.name for file in (tmp_path / "disk").glob("*/*.h5")] == ["00001.h5"]


def test_environment_variables(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "bb"))
    assert len(stage(Store(made), "$NODE_DISK/me", range(4))) == 2
    assert (tmp_path / "bb" / "me").is_dir()
    monkeypatch.delenv("NODE_DISK")
    assert stage(Store(made), "$NODE_DISK/me", range(4)) == []


def test_a_copy_is_found_again_and_a_changed_store_is_not_mixed_up(
    made: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    stage(Store(made), str(tmp_path / "disk"), range(4))
    told.clear()
    again = Store(made)
    assert len(stage(again, str(tmp_path / "disk"), range(4))) == 2
    assert told.text == ""
    shutil.rmtree(made)
    build(made, [7, 8], shard_bytes=15_000)
    other = Store(made)
    stage(other, str(tmp_path / "disk"), range(2))
    assert other.scans[0].scan_id == "sub-07_task-rest"
    assert other.check(0) == []
    assert set(other.local.values()).isdisjoint(again.local.values())


def _race(made: Path, disk: Path, copies: Any, start: Any) -> None:
    right = maintain.copy_file

    def counted(source: Path, target: Path, digest: str) -> None:
        with copies.get_lock():
            copies.value += 1
        right(source, target, digest)

    maintain.copy_file = counted
    store = Store(made)
    start.wait()
    assert len(stage(store, str(disk), range(4))) == 2
    assert all(store.check(scan) == [] for scan in range(4))


def test_once_a_node(made: Path, tmp_path: Path) -> None:
    """Four ranks of one node at the same moment: each shard is copied by one of them."""
    context = multiprocessing.get_context("fork")
    copies, start = context.Value("i", 0), context.Barrier(4)
    ranks = [context.Process(target=_race, args=(made, tmp_path / "disk", copies, start)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    assert copies.value == 2


def test_what_a_killed_process_left_is_removed(made: Path, tmp_path: Path) -> None:
    store = Store(made)
    stage(store, str(tmp_path / "disk"), [0])
    (folder,) = (tmp_path / "disk").iterdir()
    (folder / ".tmp-00001.h5-1-1").write_bytes(b"half")
    (folder / "00000.h5").write_bytes(b"cut short")  # not by us: our copies get their name when they are whole
    stage(store, str(tmp_path / "disk"), range(4))
    assert sorted(file.name for file in folder.iterdir()) == ["00000.h5", "00001.h5"]
    assert all(store.check(scan) == [] for scan in range(4))


# ------------------------------------------------------------------------------------------------------ falling back
def test_no_room(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture) -> None:
    store = Store(made)
    room = staging.SPARE_BYTES + store.shards["00000.h5"]["bytes"] + 10
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Usage(0, 0, room))
    assert stage(store, str(tmp_path / "disk"), range(4)) == ["00000.h5"]
    assert "no room for 1 of 2 shards" in told.text
    assert f"read from {made}" in told.text
    assert all(store.check(scan) == [] for scan in range(4))


def test_a_full_disk_in_mid_copy(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    right = maintain.copy_file

    def fails(source: Path, target: Path, digest: str) -> None:
        if source.name == "00000.h5":
            raise OSError(28, "No space left on device")
        right(source, target, digest)

    monkeypatch.setattr(maintain, "copy_file", fails)
    store = Store(made)
    assert stage(store, str(tmp_path / "disk"), range(4)) == ["00001.h5"]
    assert "shard 00000.h5 was not copied ([Errno 28] No space left on device)" in told.text
    assert all(store.check(scan) == [] for scan in range(4))


def test_a_folder_that_cannot_be_made(made: Path, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    store = Store(made)
    assert stage(store, str(tmp_path / "file" / "x"), range(4)) == []
    assert f"cannot be used (Not a directory); reading from {made}" in told.text
    assert store.local == {}


def test_a_damaged_shard_is_not_spread(made: Path, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    store = Store(made)
    file = made / "shards" / store.scans[0].shard
    raw = bytearray(file.read_bytes())
    raw[store._layout(0).bold + 1] ^= 1
    file.write_bytes(raw)
    assert stage(store, str(tmp_path / "disk"), range(4)) == ["00001.h5"]
    assert "differs from its checksum" in told.text
    with pytest.raises(CorruptData, match=f"{file}: .*frame 0"):
        store.read(0, 0, 1, verify=True)


def test_a_copy_that_vanishes(made: Path, tmp_path: Path) -> None:
    store = Store(made)
    stage(store, str(tmp_path / "disk"), range(4))
    shutil.rmtree(tmp_path / "disk")
    assert all(store.check(scan) == [] for scan in range(4))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_the_data_module(made: Path, tmp_path: Path, workers: int) -> None:
    """Two cohorts; the loader's workers read the copies: the originals are gone."""
    other = build(tmp_path / "other", [5])
    mixture = [CohortConfig(str(made)), CohortConfig(str(other))]
    settings = dataclasses.replace(SETTINGS, workers=workers, mixture=mixture)
    plain = ClipDataModule(settings, "unused", 7)
    want = [plain.dense(packed) for packed in islice(plain.train_dataloader(), 6)]
    data = ClipDataModule(dataclasses.replace(settings, stage_dir=str(tmp_path / "disk")), "unused", 7)
    loader = data.train_dataloader()
    for file in [*(made / "shards").iterdir(), *(other / "shards").iterdir()]:
        file.unlink()
    for packed, expected in zip(islice(loader, 6), want):
        got = data.dense(packed)
        assert all(got[name].equal(expected[name]) for name in expected)
    assert len(list((tmp_path / "disk").glob("*/*.h5"))) == 3

"""Writing: the same bytes in any order, after a kill at any moment, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift.data.store.reader import Store, StoreWriter
from swift.utils.errors import BadScan, UserError
from tests.data.stores import GRID, build, content, scan


def test_any_order_gives_the_same_bytes(tmp_path: Path) -> None:
    assert content(build(tmp_path / "a", [0, 1, 2, 3, 4])) == content(build(tmp_path / "b", [3, 0, 4, 2, 1]))
    names = sorted(content(tmp_path / "a"))
    assert names == ["manifest.csv", "shards/00000.h5", "shards/00001.h5", "shards/00002.h5", "store.json"]


def test_one_scan_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = content(build(tmp_path / "a", [2, 0, 1], shard_bytes=1))
    assert sum(name.startswith("shards/") for name in linked) == 3

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert content(build(tmp_path / "b", [0, 1, 2], shard_bytes=1)) == linked
    assert Store(tmp_path / "b").check(1) == []


def test_more_scans_go_to_new_shards(tmp_path: Path) -> None:
    path = build(tmp_path / "store", [3, 1])
    before = content(path)
    build(path, [0, 2])
    after = content(path)
    assert {name: after[name] for name in before if name.startswith("shards/")}.items() <= before.items()
    store = Store(path)
    assert [s.subject for s in store.scans] == ["01", "03", "00", "02"]
    for place, info in enumerate(store.scans):
        np.testing.assert_allclose(store.values(place), scan(int(info.subject))[2], atol=2e-3)
        assert store.check(place) == []


def test_done_and_doubles(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, GRID, 2.0)
    info = writer.add(*scan(1))
    assert (info.shard, info.scan_id) == ("", "sub-01_task-rest")
    assert writer.done() == {info.scan_id}
    with pytest.raises(UserError, match="already a scan sub-01_task-rest"):
        writer.add(*scan(1))
    with pytest.raises(UserError, match="holds no scans"):
        Store(tmp_path)
    writer.close()
    again = StoreWriter(tmp_path, GRID, 2.0)
    assert again.done() == writer.done() == {info.scan_id}
    with pytest.raises(UserError, match="already a scan"):
        again.add(*scan(1))
    again.close()
    assert len(Store(tmp_path).scans) == 1
    with pytest.raises(UserError, match="use another folder"):
        StoreWriter(tmp_path, GRID, 3.0)


def test_scans_that_cannot_be_stored(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, GRID, 2.0)
    header, mask, bold = scan(0)

    def trial(kind: type[Exception], message: str, mask: Any = mask, bold: Any = bold, **changes: Any) -> None:
        changed = scan(0)[0]
        for name, value in changes.items():
            setattr(changed, name, value)
        with pytest.raises(kind, match=message):
            writer.add(changed, mask, bold)

    trial(UserError, "scan name '../x'", scan_id="../x")
    trial(BadScan, "the store wants bool", mask=mask.astype(np.uint8))
    trial(BadScan, "the store wants bool", mask=mask[1:])
    trial(BadScan, "the mask wants", bold=bold[:, 1:])
    trial(BadScan, "0 frames of", bold=bold[:0])
    trial(BadScan, "4 x 4 finite", affine=np.full((4, 4), np.nan))
    trial(BadScan, "TR 0 s", tr=0)
    trial(BadScan, "no subject", subject="")
    trial(UserError, "names that the manifest itself uses", phenotypes={"tr": "2"})
    trial(BadScan, "confounds", confounds=np.zeros((3, 2)), confound_names=["a", "b"])
    trial(UserError, "notes has .* bytes", notes=["x" * 70_000])
    assert content(tmp_path).keys() == {"store.json"}
    header.confounds, header.confound_names = np.ones((24, 2)), ["a", "b"]
    writer.add(header, mask, bold)
    writer.close()
    assert Store(tmp_path).check(0) == []


def test_memory_maps_and_float64(tmp_path: Path) -> None:
    header, mask, bold = scan(0)
    np.save(tmp_path / "bold.npy", bold.astype(np.float64))
    with StoreWriter(tmp_path / "a", GRID, 2.0) as writer:
        writer.add(header, mask, np.load(tmp_path / "bold.npy", mmap_mode="r"))
    assert content(tmp_path / "a") == content(build(tmp_path / "b", [0]))


# -------------------------------------------------------------------------------------------------------- kills
CALLS = ("replace", "fsync", "pwrite", "link", "posix_fallocate", "unlink")


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except UserError as error:
            os.write(2, str(error).encode())
            os._exit(2)
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(number: int, after: bool) -> None:
    """SIGKILL this process at its `number`-th call that changes the disk, before or after doing it."""
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            last = count == number
            try:
                return real(*args, **kwargs) if after or not last else None
            finally:
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def ingest(path: Path, numbers: list[int]) -> None:
    """What a user does again after a kill: add what is not there yet, close."""
    writer = StoreWriter(path, GRID, 2.0, 14_000)
    done = writer.done()
    for number in numbers:
        header, mask, bold = scan(number)
        if header.scan_id not in done:
            writer.add(header, mask, bold)
    writer.close()


def test_killed_anywhere_and_continued_gives_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and a killed process leaves its page cache to the kernel
    numbers = [2, 0, 1]
    ingest(tmp_path / "calm", numbers)
    want = content(tmp_path / "calm")
    survived = trial = 0
    for moment in range(1, 200):
        trial += 1
        path = tmp_path / f"killed{moment}"

        def work(path: Path = path, moment: int = moment) -> None:
            kill_at(moment, after=moment % 2 == 0)
            ingest(path, numbers)

        status = in_child(work)
        if (path / "manifest.csv").exists():  # what is visible meanwhile is whole
            store = Store(path)
            assert all(store.check(place) == [] for place in range(len(store.scans)))
        ingest(path, numbers)
        assert content(path) == want, moment
        survived += status == 0
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert survived == 1
    assert trial > 30


# ----------------------------------------------------------------------------------------------------- full disk
def test_disk_full_when_room_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, GRID, 2.0)
    writer.add(*scan(0))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            writer.add(*scan(1))
    assert writer.done() == {"sub-00_task-rest"}
    writer.add(*scan(1))
    writer.close()
    assert [Store(tmp_path).check(place) for place in range(2)] == [[], []]


@pytest.mark.parametrize("limit", [1_000, 5_000, 9_000, 70_000])
def test_no_file_may_grow(tmp_path: Path, limit: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A real failing write (file size limit), in HDF5's part and in ours."""
    header, mask, bold = scan(1, frames=400)
    StoreWriter(tmp_path, GRID, 2.0).add(*scan(0))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        StoreWriter(tmp_path, GRID, 2.0).add(header, mask, bold)

    assert in_child(work) == 2
    assert "File too large" in capfd.readouterr().err
    assert content(tmp_path).keys() == {"staging/sub-00_task-rest.h5", "store.json"}
    StoreWriter(tmp_path, GRID, 2.0).close()
    assert json.loads((tmp_path / "store.json").read_text())["shards"].keys() == {"00000.h5"}
    assert Store(tmp_path).check(0) == []

"""One training at a time in a folder, whoever and wherever the other is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swift.train import run_lock
from swift.train.run_lock import only_training_in
from swift.utils.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in tmp_path / "run", with a child, as a data worker is one."""
    code = """
import os, sys, time
from pathlib import Path
from swift.train.run_lock import only_training_in
with only_training_in(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process
    for pid in (process.pid, child):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
    process.wait()


def left_by(run: Path, **owner: Any) -> Path:
    """A lock file that nobody locks."""
    run.mkdir()
    content = {"host": "elsewhere", "process": 12, "began": 1_700_000_000, "job": None, "start": "0"} | owner
    (run / "lock").write_text(json.dumps(content) + "\n")
    return run / "lock"


def test_a_second_command_is_refused_by_name(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    says = rf"run_dir=.*run: process {other.pid} on .* is training in it; wait until that has ended, or choose another"
    with pytest.raises(UserError, match=says), only_training_in(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / "lock").read_text())["process"] == other.pid


def test_a_killed_owner_blocks_nobody_though_its_worker_lives_on(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    with only_training_in(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["process"] == os.getpid()


def test_nothing_is_left_of_a_run_that_has_trained_nothing(tmp_path: Path) -> None:
    with only_training_in(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / "lock").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    with only_training_in(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_process_of_another_node_is_dead_when_it_is_silent(tmp_path: Path) -> None:
    lock = left_by(tmp_path / "run")
    with only_training_in(tmp_path / "run"):
        assert json.loads(lock.read_text())["process"] == os.getpid()


@pytest.mark.parametrize("locks", [True, False], ids=["locks of one node", "no locks"])
def test_a_process_of_another_node_that_lives_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "lockf", unsupported)
    lock = left_by(tmp_path / "run")
    ended = threading.Event()
    alive = threading.Thread(target=run_lock._touch, args=(lock, ended))
    alive.start()
    try:
        says = "process 12 on elsewhere, begun .* is training in it"
        with pytest.raises(UserError, match=says), only_training_in(tmp_path / "run"):
            pass
    finally:
        ended.set()
        alive.join()
    assert json.loads(lock.read_text())["host"] == "elsewhere"


def test_a_job_that_is_queued_again_goes_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its earlier start, on a node that was lost, has told nobody that it ended."""
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 600.0)
    lock = left_by(tmp_path / "run", job="7", start="1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with only_training_in(tmp_path / "run"):
        assert json.loads(lock.read_text())["start"] == "2"


def test_a_damaged_lock_file_is_taken(tmp_path: Path) -> None:
    left_by(tmp_path / "run").write_text('{"host": "els')
    with only_training_in(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: choose another"), only_training_in(tmp_path / "file"):
        pass

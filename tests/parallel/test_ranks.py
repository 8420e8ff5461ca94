"""Starting the ranks of one machine: what they are told, and how the run ends when one of them does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from swift.parallel.ranks import start_ranks


def rank(folder: Path, code: str) -> list[str]:
    """A rank's command: Python that has `rank`, `folder` and `say`."""
    head = f"""
import os, sys, time, signal, pathlib
rank, folder = int(os.environ["RANK"]), pathlib.Path({str(folder)!r})
def say(text): (folder / str(rank)).write_text(text)
"""
    return [sys.executable, "-c", head + code]


def test_ranks_are_told_their_place_and_the_settings(tmp_path: Path) -> None:
    code = """
names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SWIFT_LAUNCH")
say(" ".join([*(os.environ[name] for name in names), open(os.environ["SWIFT_RANK_SETTINGS"]).read()]))
"""
    assert start_ranks(rank(tmp_path, code), "some settings", 3) == 0
    said = [(tmp_path / str(number)).read_text().split(" ", 1) for number in range(3)]
    assert [place for place, _ in said] == ["0", "1", "2"]
    assert len({rest for _, rest in said}) == 1
    assert said[0][1].startswith("3 3 127.0.0.1 ")
    assert said[0][1].endswith(" some settings")


@pytest.mark.parametrize("status", [2, 75, -signal.SIGKILL])
def test_one_that_fails_ends_the_others_and_gives_its_status(tmp_path: Path, status: int) -> None:
    end = f"sys.exit({status})" if status > 0 else "os.kill(os.getpid(), signal.SIGKILL)"
    code = f"""
if rank == 1:
    while not (folder / "0").exists(): time.sleep(0.01)
    {end}
say(str(os.getpid()))
time.sleep(600)
"""
    assert start_ranks(rank(tmp_path, code), "", 2) == status
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)


def test_signals_reach_all_ranks(tmp_path: Path) -> None:
    code = """
def stop(*_):
    say("stopped")
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
(folder / f"ready-{rank}").touch()
time.sleep(600)
"""

    def ask() -> None:
        while not all((tmp_path / f"ready-{number}").exists() for number in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    asking = threading.Thread(target=ask)
    asking.start()
    assert start_ranks(rank(tmp_path, code), "", 2) == 75
    asking.join()
    assert [(tmp_path / str(number)).read_text() for number in range(2)] == ["stopped", "stopped"]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.skipif(sys.platform != "linux", reason="a service of Linux")
def test_ranks_do_not_outlive_what_started_them(tmp_path: Path) -> None:
    import subprocess

    inner = rank(tmp_path, "say(str(os.getpid())); time.sleep(600)")
    code = f"from swift.parallel.ranks import start_ranks; start_ranks({inner!r}, '', 1)"
    starter = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "0").exists() or not (tmp_path / "0").read_text():
            assert time.monotonic() < until, "the rank has not started"
            time.sleep(0.01)
    finally:
        starter.kill()
        starter.wait()
    child = int((tmp_path / "0").read_text())
    until = time.monotonic() + 120
    while Path(f"/proc/{child}").exists() and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until, "the rank lives on"
        time.sleep(0.01)

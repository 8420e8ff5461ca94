"""One training at a time in a run folder: two commands there would overwrite each other's checkpoints and metrics.

RUN/lock is locked by the process that owns the run (rank 0, or what started the ranks), and names it. The kernel frees
the lock when its process ends, however that ended. File systems of clusters do not always lock between nodes, so the
owner also touches the file every few seconds: a file that was left by a process of another node, and that nobody
touches any more, is taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from swift.utils.errors import UserError

log = logging.getLogger(__name__)

LOCK = "lock"
TOUCH_SECONDS = 5.0
"""Time between two signs of life of the owner."""
SILENT_SECONDS = 30.0
"""An owner on another node without a sign of life for so long is dead. Watched, as the clocks of nodes differ."""


@contextlib.contextmanager
def only_training_in(run_dir: Path) -> Iterator[None]:
    """Own a run folder, which is made if need be, for as long as the body runs.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    made = _make(run_dir)
    path = run_dir / LOCK
    try:
        stream, locks = _open_locked(path)
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: choose another") from error
    ended = threading.Event()
    try:
        _wait_for_silence(path, os.pread(stream, 4096, 0), locks)
        os.ftruncate(stream, 0)
        os.pwrite(stream, json.dumps(_owner()).encode() + b"\n", 0)
        threading.Thread(target=_touch, args=(path, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            path.unlink(missing_ok=True)
    finally:
        os.close(stream)
        # Nothing was trained: the folder is left as it was found.
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns those that did not exist, outer ones first."""
    made = [path for path in reversed((folder, *folder.parents)) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: choose another") from error
    return made


def _open_locked(path: Path) -> tuple[int, bool]:
    """The open file, and whether its file system has locks.

    POSIX locks, not flock: processes that are forked, such as data workers, do not hold them on after a kill.

    Raises:
        UserError: another process has locked it.
    """
    while True:
        stream = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.pread(stream, 4096, 0)
            os.close(stream)
            raise _in_use(path, owner) from error
        except OSError:
            return stream, False
        # An owner that ended meanwhile has removed the file that is open here.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(stream).st_ino:
                return stream, True
        os.close(stream)


def _wait_for_silence(path: Path, content: bytes, locks: bool) -> None:
    """Return when the process that has left `content` is known to be dead.

    Raises:
        UserError: it gives a sign of life.
    """
    owner, here = _parsed(content), _owner()
    if not owner or (locks and owner.get("host") == here["host"]):
        return
    if here["job"] and owner.get("job") == here["job"] and owner.get("start") != here["start"]:
        return  # an earlier start of this job: the batch system has ended it
    log.info("%s was left by %s: watching for %.0f s whether that lives", path, _text(owner), SILENT_SECONDS)
    before, until = _changed(path), time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        if _changed(path) != before:
            raise _in_use(path, content)


def _changed(path: Path) -> int:
    """When the file was touched; it is opened, or a network file system would tell what it has kept."""
    with path.open("rb") as stream:
        return os.fstat(stream.fileno()).st_mtime_ns


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def _owner() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID")
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    host = {"host": socket.gethostname(), "process": os.getpid(), "began": round(time.time())}
    return host | {"job": job, "start": start}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _text(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    job = f", job {owner['job']}" if owner.get("job") else ""
    began = datetime.fromtimestamp(owner.get("began", 0)).strftime("%Y-%m-%d %H:%M:%S")
    return f"process {owner.get('process')} on {owner.get('host')}{job}, begun {began}"


def _in_use(path: Path, content: bytes) -> UserError:
    return UserError(
        f"run_dir={path.parent}: {_text(_parsed(content))} is training in it; "
        "wait until that has ended, or choose another run_dir"
    )

"""Where swift keeps what it can make or fetch again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swift.utils.errors import UserError

REVISION = 2
"""Of the stores that swift makes in its cache; raised when new ones differ from those that runs have been made with."""


def check_revision(revision: int, there: bool, path: Path) -> None:
    """Refuse a store of the cache that cannot be made any more.

    Args:
        revision: That the run names (data.revision).
        there: Whether the store is in the cache.
        path: Of the store, for messages.

    Raises:
        UserError: no such revision, or an early one that is not there.
    """
    if not 1 <= revision <= REVISION:
        raise UserError(f"data.revision={revision}: legal is 1 to {REVISION}")
    if revision < REVISION and not there:
        raise UserError(
            f"{path}: the store of data.revision={revision} that this run was made with is not there, and this swift "
            f"makes revision {REVISION}, which differs; bring it back, or start a new run (init= takes the weights)"
        )


def cache_dir() -> Path:
    """The cache folder, made if need be: $SWIFT_CACHE, else $XDG_CACHE_HOME/swift-fmri, else ~/.cache/swift-fmri.

    Raises:
        UserError: it cannot be made or written; the message says how to choose another.

    """
    own, general = os.environ.get("SWIFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    usual = (Path(general) if general else Path.home() / ".cache") / "swift-fmri"
    folder = Path(own).expanduser() if own else usual
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell (read-only mounts, root)
            pass
    except OSError as error:
        raise UserError(
            f"cache folder {folder}: cannot be written ({error.strerror}); set SWIFT_CACHE to one"
        ) from error
    return folder


@contextlib.contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """One process at a time in a folder of the cache, made if need be; ranks of one job come here together.

    Where the file system has no locks, nobody waits.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); set SWIFT_CACHE to a folder of yours") from error
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

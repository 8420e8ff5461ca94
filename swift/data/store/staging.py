"""Shards on the node's own disk: copied once a node at the start, verified, read from there from then on.

Whatever cannot be copied (no room, a folder that cannot be written, a damaged shard) is read from the shared file
system as before, and that is said.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swift.data.store import format as fmt
from swift.data.store.reader import Store
from swift.utils.errors import UserError

log = logging.getLogger("swift.data")
COPIES = 4
"""Shards copied at the same time."""
SPARE_BYTES = 1 << 28
"""Left free on the disk."""


def stage(store: Store, folder: str, scans: Iterable[int]) -> list[str]:
    """Copy the shards of some scans to this node and let the store read them there.

    Every process of the node may call this: the first copies, the others wait for it and use its copies. Copies are
    found again by a later run on the node; a store that has changed gets new ones.

    Args:
        store: Its `local` is set.
        folder: On the node's own disk, such as /mnt/bb/$USER; environment variables are expanded.
        scans: Places of the scans that will be read.

    Returns:
        Names of the shards that are read from the node's disk.
    """
    target = Path(os.path.expanduser(os.path.expandvars(folder)))
    if "$" in str(target):
        log.warning("data.stage_dir=%s: no such environment variable; reading from %s", folder, store.path)
        return []
    target /= f"swift-store-{fmt.file_hash(store.path / 'store.json')}"
    names = sorted({store.scans[scan].shard for scan in scans})
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _alone(target) as alone:
            local = _copy(store, names, target, alone)
    except OSError as error:
        log.warning("data.stage_dir=%s cannot be used (%s); reading from %s", folder, error.strerror, store.path)
        return []
    store.close()  # shards that are open already are open on the shared file system
    store.local = {name: target / name for name in local}
    return local


def _copy(store: Store, names: list[str], target: Path, alone: bool) -> list[str]:
    """Copy what is missing, as far as there is room; returns the names of all shards that are there."""
    for left in target.glob(".tmp-*") if alone else ():  # of a process that was killed
        left.unlink(missing_ok=True)
    sizes = {name: store.shards[name]["bytes"] for name in names}
    there = [name for name in names if _is_there(target / name, sizes[name])]
    wanted, room = [], shutil.disk_usage(target).free - SPARE_BYTES
    for name in names:
        if name not in there and sizes[name] <= room:
            wanted.append(name)
            room -= sizes[name]
    if no_room := [name for name in names if name not in there and name not in wanted]:
        log.warning(
            "%s: no room for %d of %d shards (%.1f GB); they are read from %s",
            *(target, len(no_room), len(names), sum(sizes[name] for name in no_room) / 1e9, store.path),
        )
    began = time.monotonic()
    with ThreadPoolExecutor(COPIES) as pool:
        copied = [name for name, well in zip(wanted, pool.map(lambda n: _one(store, n, target), wanted)) if well]
    if copied:
        size, seconds = sum(sizes[name] for name in copied) / 1e9, time.monotonic() - began
        log.info("%d shards (%.1f GB) copied to %s and verified in %.0f s", len(copied), size, target, seconds)
    return sorted([*there, *copied])


def _one(store: Store, name: str, target: Path) -> bool:
    """Copy a shard under a temporary name, verify it, rename it."""
    from swift.data.store.check import copy_file

    try:
        copy_file(store.path / "shards" / name, target / name, store.shards[name]["xxh3_64"])
    except (UserError, OSError) as error:
        log.warning("shard %s was not copied (%s); it is read from %s", name, error, store.path)
        return False
    return True


def _is_there(path: Path, size: int) -> bool:
    """A copy gets its name only after it was verified."""
    return path.is_file() and path.stat().st_size == size


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """One process of this node at a time; False where the file system has no locks (all copy, under own names)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)

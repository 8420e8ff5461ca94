"""The shards of a store that a process has open."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import h5py

from swift.data.store import format as fmt
from swift.utils.errors import UserError

OPEN_SHARDS = 64


@dataclass
class Shard:
    """A shard opened for reading: through HDF5, and as a descriptor to read from at any offset."""

    file: h5py.File
    handle: int

    def close(self) -> None:
        os.close(self.handle)
        self.file.close()


class OpenShards:
    """The shards used last, OPEN_SHARDS at most.

    Handles belong to the process that opened them: after a fork the child opens its own.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._shards: OrderedDict[str, Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shards)

    def get(self, name: str) -> Shard | None:
        """A shard that is open in this process."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._shards = OrderedDict()
        if name in self._shards:
            self._shards.move_to_end(name)
        return self._shards.get(name)

    def open(self, name: str, path: Path) -> Shard:
        """Open a shard that is not; the one used longest ago is closed if there are too many.

        Raises:
            UserError: it is no HDF5 file.
        """
        try:
            file = fmt.open_hdf5(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened as HDF5 ({error}); copy or repair it") from error
        self._shards[name] = Shard(file, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        return self._shards[name]

    def close(self) -> None:
        """Close those of this process."""
        if self._process == os.getpid():
            for shard in self._shards.values():
                shard.close()
        self._shards = OrderedDict()

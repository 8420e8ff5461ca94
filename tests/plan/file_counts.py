"""What the ranks of a tiny run open, read and write, to be held against the plan: a job of tests.distributed.ranks."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from swift.data.store import format as fmt
from swift.data.store.reader import Store
from swift.parallel.checkpoint import files as checkpoint
from swift.train.callbacks.monitor import Monitor
from swift.train.callbacks.signals import Heartbeat
from tests.distributed import jobs

SECONDS = 7.5
"""Of an optimizer step, by the clock of the test."""


class Counts:
    """Counts what this process does with files below a folder, from now on: Python's own opens, HDF5's, safetensors'.

    Attributes:
        opened: Path below the folder, and mode -> times.
        read: Bytes from shards.
        clips, tables: Calls of Store.read and Store.table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened, self.read, self.clips = str(folder), Counter[tuple[str, str]](), 0, 0
        self.tables = 0
        sys.addaudithook(self._hook)
        hdf5, tensors, preadv = fmt.open_hdf5, checkpoint.safe_open, os.preadv
        read, table = Store.read, Store.table

        def open_hdf5(path: Path) -> Any:
            self._note(path, "hdf5")
            return hdf5(path)

        def safe_open(path: Path, **options: Any) -> Any:
            self._note(path, "safetensors")
            return tensors(path, **options)

        def counted(*arguments: Any) -> int:
            count = preadv(*arguments)
            self.read += count
            return count

        def read_clip(*arguments: Any, **options: Any) -> Any:
            self.clips += 1
            return read(*arguments, **options)

        def make_table(*arguments: Any, **options: Any) -> Any:
            self.tables += 1
            return table(*arguments, **options)

        fmt.open_hdf5, checkpoint.safe_open, os.preadv = open_hdf5, safe_open, counted
        Store.read, Store.table = read_clip, make_table  # type: ignore[method-assign]

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self._note(arguments[0], arguments[1] or "descriptor")

    def _note(self, path: Any, mode: str) -> None:
        name = os.fsdecode(path)
        if name.startswith(self.folder + "/") and not os.path.isdir(name):
            self.opened[name[len(self.folder) + 1 :], mode] += 1

    def __call__(self) -> dict[tuple[str, str], int]:
        return dict(self.opened)


class AtFirstStep(pl.Callback):
    """Keeps what had been opened when the first step was done."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.opened: dict[tuple[str, str], int] = {}

    def on_train_batch_end(self, *_: Any) -> None:
        self.opened = self.opened or self.counts()


def count(folder: Path, store: Path, run_dir: Path, overrides: list[str], stop: int) -> dict[str, Any]:
    """Train to step `stop`, or go on from there to the end; what this rank did."""
    counts = Counts(folder)
    module, data, trainer = jobs.build(store, run_dir, overrides)
    first = AtFirstStep(counts)
    trainer.callbacks.insert(0, first)
    for timed in trainer.callbacks:
        if isinstance(timed, Heartbeat | Monitor):
            timed._clock = lambda: SECONDS * trainer.global_step
    jobs.fitted(module, data, trainer, run_dir, stop)
    return {"first": first.opened, "opened": counts(), "read": counts.read} | {
        "clips": counts.clips,
        "tables": counts.tables,
    }

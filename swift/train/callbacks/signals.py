"""Stopping a run by a signal, and signs of life for whoever watches it."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch

from swift.parallel.checkpoint.saver import SaveCheckpoints
from swift.parallel.ranks import current_place
from swift.plan.file_system import HEARTBEAT_SECONDS
from swift.train.callbacks.guard import Guard
from swift.utils import device
from swift.utils.entry import INTERRUPTED_STATUS, STOPPED_STATUS
from swift.utils.files import replace_text

log = logging.getLogger(__name__)

HEARTBEATS = "heartbeats"
"""Folder in a run directory: a file for every start."""
STARTUP = "startup.jsonl"
"""In a run directory: seconds of every phase from the start of a job to its first step."""


class StopOnSignal(pl.Callback):
    """SIGUSR1 or SIGTERM on any rank: all ranks save after the same optimizer step, then end with status 75.

    Ctrl-C does the same and ends with status 130; a second one stops at once, without saving.

    The handlers only set a flag; data workers leave it to their rank (`swift.utils.signals`). All ranks stop at the
    start of a step, when everything of the step before has been done and logged, so the run goes on from there as if it
    had not stopped. Several ranks compare their flags at the start of a step and read the result at the start of the
    next: by then it has long been there, so that no device is waited for; they stop a step later.

    Args:
        saves: Saves the checkpoints of the run.
        guard: Judges the last step before it is saved; None: nothing is watched.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, saves: SaveCheckpoints, guard: Guard | None = None) -> None:
        self.saves, self.guard = saves, guard
        self._flags: device.HostCopy | None = None
        self.asked = 0
        """The signal, 0 before one has come."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals from Lightning, whose own SIGTERM handler communicates; it gives them back at the end."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # A command in the background of a shell is not meant by that shell's Ctrl-C.
                if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._note)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No step follows: from here on Ctrl-C stops at once."""
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before an optimizer step: stop here if any rank was asked to."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and (asked := self._agreed(trainer)):
            self._stop(trainer, asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            signal.default_int_handler(number, frame)
        place = current_place()
        if number == signal.SIGINT and not place.rank:
            # Neither print nor logging: they may be what this has interrupted.
            when = "this" if place.world == 1 else "the next"
            os.write(2, f"\nsaving and stopping at the end of {when} step; Ctrl-C again stops now\n".encode())
        self.asked = number

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The largest signal any rank has got; all ranks call it together."""
        if trainer.world_size == 1:
            return self.asked
        before, where = self._flags, trainer.strategy.root_device
        flag = torch.full((), self.asked, device=where)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        self._flags = device.HostCopy({"asked": flag}, where, {})
        return 0 if before is None else int(before.wait()["asked"])

    def _stop(self, trainer: pl.Trainer, asked: int) -> NoReturn:
        step = trainer.global_step
        if self.guard is not None:
            self.guard.settle(trainer)
        if self.saves.saved != step:
            trainer.save_checkpoint(self.saves.folder)
        self.saves.saver.finish()
        if asked == signal.SIGINT:
            raise SystemExit(INTERRUPTED_STATUS)
        if trainer.is_global_zero:
            log.info("%s: saved step %d and stopped; the run can go on from there", signal.Signals(asked).name, step)
        raise SystemExit(STOPPED_STATUS)


class Heartbeat(pl.Callback):
    """Writes RUN/heartbeats/START.json on rank zero: where this start of the run is, and how long its steps took.

    Whoever watches a run (the job's script, `swift.runs`) takes a file that grows old for a run that hangs. In a job
    the first step also ends the list of start-up phases in RUN/startup.jsonl.

    Args:
        run_dir: Folder of the run.
        every: Seconds between two writes.
        clock: Gives unix seconds.
    """

    def __init__(
        self, run_dir: str | Path, every: float = HEARTBEAT_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self.run_dir = Path(run_dir)
        self._clock, self._every = clock, every
        began = clock()
        self.attempt = os.environ.get("SWIFT_ATTEMPT") or f"{began:.0f}"
        self._mark = self._phase_began = float(os.environ.get("SWIFT_PHASE_BEGAN") or began)
        self._phase("python")
        self._written = 0.0
        self._first = True
        self._beat: dict[str, Any] = {"attempt": self.attempt, "began": round(began, 3), "train_seconds": 0.0}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ranks have met."""
        self._phase("meeting of the ranks", trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is built, and a checkpoint restored."""
        self._phase("model, data and checkpoint", trainer)
        self._beat |= {"first_step": trainer.global_step, "max_steps": trainer.max_steps}
        self._write(trainer, "starting", force=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first step's time begins with its batch."""
        if self._first:
            self._mark = self._clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the batch before."""
        now = self._clock()
        self._beat["train_seconds"] += now - self._mark
        self._mark = now
        if self._first:
            self._first = False
            self._phase("first step", trainer)
        self._write(trainer, "training")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Alive, but not training."""
        self._write(trainer, "validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is no part of a step."""
        self._mark = self._clock()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last word of training."""
        self._write(trainer, "trained", force=True)

    def judging(self, trainer: pl.Trainer) -> None:
        """A sign of life from the final judgement, which no event of Lightning's goes with: a batch was read."""
        self._write(trainer, "judging")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Why this start ended."""
        stopped = isinstance(exception, KeyboardInterrupt) or (
            isinstance(exception, SystemExit) and exception.code in (STOPPED_STATUS, INTERRUPTED_STATUS)
        )
        self._write(trainer, "stopped" if stopped else "failed", force=True)

    def _write(self, trainer: pl.Trainer, state: str, force: bool = False) -> None:
        now = self._clock()
        if not trainer.is_global_zero or not (force or now - self._written >= self._every):
            return
        self._written = now
        self._beat |= {"time": round(now, 3), "step": trainer.global_step, "state": state}
        self._beat["train_seconds"] = round(self._beat["train_seconds"], 3)
        path = self.run_dir / HEARTBEATS / f"{self.attempt}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(self._beat) + "\n")

    def _phase(self, name: str, trainer: pl.Trainer | None = None) -> None:
        """End a start-up phase of a job; those before it are written by the job's script."""
        now = self._clock()
        began, self._phase_began = self._phase_began, now
        first = trainer.is_global_zero if trainer else os.environ.get("SLURM_PROCID", os.environ.get("RANK")) == "0"
        if "SWIFT_PHASE_BEGAN" in os.environ and first:
            line = json.dumps({"attempt": self.attempt, "phase": name, "seconds": round(now - began, 3)})
            with (self.run_dir / STARTUP).open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

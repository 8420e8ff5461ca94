"""How fast a run trains, and how much of its time it waits for data: perf/* in the loggers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from swift.plan.flops import BrainCosts
from swift.utils import device


class FetchTimer(PassThroughProfiler):
    """Adds up the seconds the training loop waits for its next batch.

    Lightning reports to its profiler, and to nothing else, when it asks for a batch and when it has one. Its own
    ThroughputMonitor does not see the wait, and its table of peak rates lacks the devices of our sites.
    """

    ACTION = "train_dataloader_next"

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.seconds = 0.0
        self.on_start: Callable[[], None] | None = None
        """Called before the loop asks for a batch."""
        self.on_stop: Callable[[], None] | None = None
        """Called when it has one, or when there are no more."""
        self._clock, self._since = clock, 0.0

    def start(self, action_name: str) -> None:
        """An action begins."""
        if action_name.endswith(self.ACTION):
            if self.on_start is not None:
                self.on_start()
            self._since = self._clock()

    def stop(self, action_name: str) -> None:
        """An action has ended."""
        if action_name.endswith(self.ACTION):
            self.seconds += self._clock() - self._since
            if self.on_stop is not None:
                self.on_stop()


class Throughput(pl.Callback):
    """Logs rates over every `every` optimizer steps, with validation left out.

    perf/clips_per_second and perf/tokens_per_second of all ranks, perf/step_seconds, perf/tflops (of one device, by the
    model's FLOPs, recomputation not counted), perf/mfu (only where the device's peak is known) and perf/data_wait, the
    part of the time in which rank 0 waited for its next batch (on a GPU an upper bound of the stall: queued work goes
    on meanwhile).

    Args:
        flops: Forward and backward of one clip.
        tokens: Patch tokens of one clip.
        peak: FLOP/s of one device, None where it is not known.
        every: Optimizer steps between logged points.
        clock: Gives monotonic seconds.
        of_brain: FLOPs and tokens of one clip where they depend on its mask: all ranks are then taken to do what this
            one does. None: `flops` and `tokens` for all.
    """

    def __init__(
        self,
        flops: float,
        tokens: int,
        peak: float | None,
        every: int,
        clock: Callable[[], float] = time.perf_counter,
        of_brain: BrainCosts | None = None,
    ) -> None:
        self._of_brain = of_brain
        self._patches: list[Tensor] = []
        self.flops, self.tokens, self.peak, self.every = flops, tokens, peak, every
        self._clock = clock
        self.timer: FetchTimer | None = None
        """Of the trainer, once it is set up."""
        self._paused = False
        self._began = self._left_out = self._validating = 0.0
        self._step = self._first = self._clips = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to when batches are fetched."""
        if stage == "fit" and self.timer is None:
            self.timer = FetchTimer(self._clock)
            trainer.profiler = self.timer  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from the step the run starts or goes on from."""
        self._step = trainer.global_step
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._began, self._left_out, self._clips, self._first = self._now(trainer), 0.0, 0, trainer.global_step
        self._patches = []
        if self.timer is not None:
            self.timer.seconds = 0.0

    def pause(self) -> None:
        """Log nothing until `resume`."""
        self._paused = True

    def resume(self, trainer: pl.Trainer) -> None:
        """Go on measuring, from here; what was not logged yet is left out."""
        self._paused = False
        self._begin(trainer)
        self._validating = self._began

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._validating = self._now(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it run on."""
        self._left_out += self._now(trainer) - self._validating

    def _now(self, trainer: pl.Trainer) -> float:
        """Seconds, with the device's queue empty: what has been launched is not done yet."""
        device.synchronize(trainer.strategy.root_device)
        return self._clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a micro-batch; log what is due."""
        self._clips += int(batch["sample_id"].shape[0]) * trainer.world_size
        if self._of_brain is not None:
            # Stays on the device until it is logged: fetching it here would wait for the backward pass.
            self._patches.append(self._of_brain.patches(batch["brain"]))
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every == 0 and not self._paused:
            self._log(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the rest."""
        if self._step > self._first and not self._paused:
            self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        seconds = self._now(trainer) - self._began - self._left_out
        steps = self._step - self._first
        if self._of_brain is not None and self._patches:
            # The mean of the clips since `_begin` is what a clip costs.
            work = [self._of_brain(one) for one in torch.cat(self._patches).cpu()]
            flops, tokens = (sum(part) / len(work) for part in zip(*work))
            self.flops, self.tokens = flops, round(tokens)
        if seconds > 0:
            values = self.values(seconds, steps, self._clips, trainer.world_size)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self._step)
        self._begin(trainer)

    def values(self, seconds: float, steps: int, clips: int, world: int) -> dict[str, float]:
        """What is logged for `clips` clips of all ranks in `steps` optimizer steps that took `seconds`."""
        rate = clips / seconds
        done = rate * self.flops / world
        found = {
            "perf/clips_per_second": rate,
            "perf/tokens_per_second": rate * self.tokens,
            "perf/step_seconds": seconds / steps,
            "perf/tflops": done / 1e12,
        }
        if self.peak is not None:
            found["perf/mfu"] = done / self.peak
        if self.timer is not None:
            found["perf/data_wait"] = min(self.timer.seconds / seconds, 1.0)
        return found

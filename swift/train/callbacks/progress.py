"""Progress of a training run, counted in optimizer steps: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


def clock_text(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:05:00; "?" where they are not finite."""
    return tqdm.format_interval(round(seconds)).removeprefix("0") if math.isfinite(seconds) else "?"


class ClipProgress(ProgressBar):
    """Steps done of max_steps, the mean loss since the last refresh, clips/s of all ranks, and the time that is left.

    Lightning's own bars count the batches of an epoch, which never ends here, and write no plain lines into files.

    A resumed run starts at its own step. Clips/s covers the last `window` steps and leaves out validation. The time
    left counts everything, at the pace of this session so far. The loss is read from the device at a refresh only, so
    the bar never waits for a step.

    Args:
        stream: Where to write; standard error by default.
        line_seconds: Seconds between lines where `stream` is not a terminal.
        val_key: Metric shown once there is one.
        window: Optimizer steps that clips/s is averaged over.
        clock: Gives monotonic seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        line_seconds: float = 10.0,
        val_key: str = "val/l1",
        window: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._stream = stream if stream is not None else sys.stderr
        self._tty = bool(getattr(self._stream, "isatty", lambda: False)())
        self._every = 0.5 if self._tty else line_seconds
        self._val_key = val_key
        self._clock = clock
        self._enabled = True
        self._bar: tqdm | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=window)
        """Seconds and clips (of all ranks) of the last optimizer steps."""
        self._loss_sum: torch.Tensor | None = None
        self._loss_count = 0
        self._loss = math.nan
        self._val = math.nan
        self._first_step = self._step = 0
        self._total: int | None = None
        self._began = self._shown = self._mark = 0.0
        self._clips = 0

    def disable(self) -> None:
        """Show nothing from now on (lightning calls this on every rank but zero)."""
        self._enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            self._write(sep.join(str(arg) for arg in args))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start at the step the trainer is at."""
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self._total = int(steps) if math.isfinite(steps) else None
        self._first_step = self._step = trainer.global_step
        self._began = self._shown = self._mark = self._clock()
        self._clips, self._loss_sum, self._loss_count = 0, None, 0
        if not self._enabled:
            return
        if self._tty:
            self._bar = tqdm(
                total=self._total,
                initial=self._first_step,
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0,
                desc="training",
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}",
            )
        else:
            where = f"from step {self._first_step} " if self._first_step else ""
            self._write(f"training {where}to step {self._total if self._total is not None else '?'}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count one micro-batch; show what is due."""
        if not self._enabled:
            return
        self._add_loss(outputs, trainer.accumulate_grad_batches)
        self._clips += int(batch["sample_id"].shape[0]) * trainer.world_size
        if trainer.global_step == self._step:
            return
        now = self._clock()
        self._recent.append((now - self._mark, self._clips))
        self._step, self._mark, self._clips = trainer.global_step, now, 0
        if now - self._shown >= self._every:
            self._show(now)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the bar waits for."""
        if self._bar is not None:
            self._bar.set_description_str("validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the validation metric; the time a validation takes is no part of clips/s."""
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self._val_key)
        self._val = math.nan if value is None else float(value)
        if self._bar is not None:
            self._bar.set_description_str("training")
        self._mark = self._clock()
        if self._enabled and self._began:
            self._show(self._mark)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the last state."""
        if not self._enabled:
            return
        self._step = trainer.global_step
        self._show(self._clock(), done=True)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean for the message."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _add_loss(self, outputs: Any, accumulate: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        # lightning has divided the loss of each micro-batch by the number of them
        loss = loss.detach().float() * accumulate
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._loss_count += 1

    def _show(self, now: float, done: bool = False) -> None:
        self._shown = now
        if self._loss_sum is not None:
            self._loss = float(self._loss_sum) / self._loss_count
            self._loss_sum, self._loss_count = None, 0
        steps, seconds = self._step - self._first_step, now - self._began
        if done:
            timing = f"in {clock_text(seconds)}"
        else:
            left = math.nan if self._total is None or not steps else (self._total - self._step) * seconds / steps
            timing = f"ETA {clock_text(left)}"
        parts = [f"loss {self._loss:.4f}"] if math.isfinite(self._loss) or self._loss_count else []
        parts += [f"{self._val_key} {self._val:.4f}"] if math.isfinite(self._val) else []
        busy = sum(taken for taken, _ in self._recent)
        rate = sum(clips for _, clips in self._recent) / busy if busy > 0 else math.nan
        parts += [f"{rate:.3g} clips/s", timing]
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
            self._bar.n = self._step
            self._bar.refresh()
        else:
            total = f"/{self._total} ({100 * self._step // self._total}%)" if self._total else ""
            self._write("  ".join([f"step {self._step}{total}", *parts]))

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

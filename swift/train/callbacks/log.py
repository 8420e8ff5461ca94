"""metrics.jsonl: the numbers of a run, one JSON object a line, which every figure and table is made from.

A line is {"step": optimizer steps done, "time": unix seconds, "epoch": ..., "train/loss": ..., ...}; lines hold
whatever keys were logged together. The file holds one trajectory: a run that goes on from step S first drops what a
lost future wrote, that is every line with step > S (`TrimMetrics`). Where a step still has several lines, the last
value of a key wins.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from swift.utils import jsonl
from swift.utils.errors import UserError

FILE = "metrics.jsonl"


class JsonlLogger(Logger):
    """Appends metrics to RUN/metrics.jsonl, on rank zero only.

    The file is opened for each line: nothing is buffered, nothing has to be closed, and the logger pickles.

    Args:
        run_dir: Folder of the run; made on the first write.
        clock: Gives unix seconds.
    """

    def __init__(self, run_dir: str | Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self.path = Path(run_dir) / FILE
        self._clock = clock
        self._checked = False

    @property
    def name(self) -> str:
        """Empty: the run's folder is the name."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a run has one."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one line.

        Args:
            metrics: Scalars (numbers, one-element tensors). "epoch", if present, goes to the front of the line.
            step: Optimizer steps done.

        Raises:
            UserError: The file cannot be written.
        """
        values = dict(metrics)
        head: dict[str, Any] = {"step": None if step is None else int(step), "time": round(self._clock(), 3)}
        if "epoch" in values:
            head["epoch"] = int(values.pop("epoch"))
        try:
            self._mend()
            jsonl.append(self.path, head | values)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; choose another run_dir=") from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the frozen configuration of a run is its config.yaml."""

    @rank_zero_only
    def trim(self, step: int) -> int:
        """Drop the lines of a lost future, before a run goes on.

        Args:
            step: Optimizer steps done at the checkpoint; lines with a larger step go.

        Returns:
            Number of lines dropped.
        """
        if not self.path.exists():
            return 0
        records = jsonl.read(self.path)
        kept = [record for record in records if record.get("step") is None or record["step"] <= step]
        if len(kept) < len(records):
            jsonl.rewrite(self.path, kept)
        return len(records) - len(kept)

    def _mend(self) -> None:
        """Cut off a line that a killed process left without its end, or the next line would be glued to it."""
        if self._checked:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as stream:
            stream.seek(0)
            content = stream.read()
            stream.truncate(content.rfind(b"\n") + 1)
        self._checked = True


class TrimMetrics(pl.Callback):
    """Trims what the loggers of the trainer hold to the step training starts from (0 for a fresh run).

    The event files of TensorBoard are only ever added to, a new one for each start. The new one says that a session
    starts at the next step, and TensorBoard then leaves out what earlier files hold from that step on.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after a checkpoint is restored and before anything is logged."""
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                logger.trim(trainer.global_step)
            elif isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                # The loader of TensorBoard purges by this alone, not by a step that comes again.
                from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # half a second, of this logger only

                start = SessionLog(status=SessionLog.START)
                logger.experiment.file_writer.add_event(Event(session_log=start), trainer.global_step + 1)

"""What the ranks of a test run (tests.distributed.ranks imports this module once, in its server)."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from swift.config.compose import CHECKPOINTS, typed
from swift.data.cohort_brain import with_cohort
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.setup import resolve
from swift.train.wiring import build_data, build_module, build_trainer
from swift.utils import jsonl
from tests.small import command, composed


class Recorder(pl.Callback):
    """Loss of every optimizer step, mean over its micro-batches and ranks, and the samples behind it."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.samples: dict[int, list[int]] = {}
        self.norms: dict[int, float] = {}
        self._loss = 0.0
        self._samples: list[int] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss += float(trainer.strategy.reduce(outputs["loss"].detach().double().clone(), reduce_op="mean"))
        self._samples += batch["sample_id"].tolist()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step
            self.losses[step], self.samples[step] = self._loss, self._samples
            self.norms[step] = float(trainer.strategy.gradient_norm())
            self._loss, self._samples = 0.0, []


def build(store: Path, run_dir: Path, overrides: list[str]) -> tuple[pl.LightningModule, Any, pl.Trainer]:
    """As the command does it."""
    torch.use_deterministic_algorithms(True)
    cfg = typed(composed(*command(store, run_dir, "trainer.accelerator=cpu", "trainer.figures=false", *overrides)))
    cfg = with_cohort(cfg)
    module, data = build_module(resolve(cfg), empty=True), build_data(cfg)
    return module, data, build_trainer(resolve(cfg), overrides)


class Look(pl.Callback):
    """Keeps what this rank holds when training starts, and ends it."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for piece in trainer.strategy.pieces(moments=False):
            self.held[piece.name] = piece.start, piece.tensors["weight"].detach().float().numpy().copy()
        trainer.should_stop = True
        trainer.fit_loop.epoch_loop.max_steps = 0


def initial(store: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """The weights that this rank begins with: flat parts, or for one rank whole tensors."""
    module, data, trainer = build(store, run_dir, overrides)
    look = Look()
    trainer.callbacks[:] = [look]
    trainer.fit(module, datamodule=data)
    if trainer.world_size > 1:
        return look.held
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return {name: values.reshape(shapes[name]) for name, (_, values) in look.held.items()}


class Stop(pl.Callback):
    """Ends training after an optimizer step, as a job's end would: the schedule stays that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


class Lines(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(store: Path, run_dir: Path, overrides: list[str], stop: int | None = None) -> dict[str, Any]:
    """Train, going on from a checkpoint if the run has one; what this rank saw."""
    said = Lines()
    logging.getLogger("swift").addHandler(said)
    return fitted(*build(store, run_dir, overrides), run_dir, stop) | {"warnings": said.lines}


def fitted(
    module: pl.LightningModule, data: Any, trainer: pl.Trainer, run_dir: Path, stop: int | None
) -> dict[str, Any]:
    """Train as far as `stop`, going on from a checkpoint if the run has one; figures of every step on this rank."""
    recorder = Recorder()
    trainer.callbacks.insert(0, recorder)
    if stop:
        trainer.callbacks.insert(0, Stop(stop))
    folder = run_dir / CHECKPOINTS
    trainer.fit(module, datamodule=data, ckpt_path=folder if folder.exists() else None, weights_only=True)
    return {"losses": recorder.losses, "samples": recorder.samples, "norms": recorder.norms}


class Trace(pl.Callback):
    """Writes samples and loss of every optimizer step to RUN/trace-RANK.jsonl as they are done."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        record = {"step": trainer.global_step, "loss": float(outputs["loss"]), "time": time.time()}
        record["samples"] = batch["sample_id"].tolist()
        path = self.run_dir / f"trace-{trainer.global_rank}.jsonl"
        if path.exists():
            # A line that a kill has cut off must not swallow the next.
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                path.write_bytes(content[: content.rfind(b"\n") + 1])
        jsonl.append(path, record)


def traced(store: Path, run_dir: Path, overrides: list[str]) -> None:
    """Train to the end, going on from the latest checkpoint, and leave a trace."""
    run_dir.mkdir(parents=True, exist_ok=True)
    module, data, trainer = build(store, run_dir, overrides)
    trainer.callbacks.insert(0, Trace(run_dir))
    folder = run_dir / CHECKPOINTS
    trainer.fit(module, datamodule=data, ckpt_path=folder if checkpoint.exists(folder) else None, weights_only=True)

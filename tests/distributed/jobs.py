"""What the ranks of a test run (tests.distributed.ranks imports this module once, in its server)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from swift.build import build_data, build_module, build_trainer
from swift.config.compose import CHECKPOINTS, typed
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


def train(store: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, going on from a checkpoint if the run has one; what this rank saw."""
    torch.use_deterministic_algorithms(True)
    cfg = typed(composed(*command(store, run_dir, "trainer.accelerator=cpu", "trainer.figures=false", *overrides)))
    module, data = build_module(cfg, empty=True), build_data(cfg)
    trainer = build_trainer(cfg, run_dir, overrides)
    recorder = Recorder()
    trainer.callbacks.insert(0, recorder)
    folder = run_dir / CHECKPOINTS
    trainer.fit(module, datamodule=data, ckpt_path=folder if folder.exists() else None, weights_only=True)
    return {"losses": recorder.losses, "samples": recorder.samples, "norms": recorder.norms}

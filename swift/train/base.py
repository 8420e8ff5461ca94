"""What every training of swift has in common, as a LightningModule: weights, optimizer, logging, checkpoints."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from swift.config.schema import Config, ModelConfig
from swift.models import mup
from swift.models.init import Init, initial_values, initialize
from swift.train.optim import build_optimizer, build_schedule

Batch = dict[str, Tensor]
log = logging.getLogger(__name__)


class TrainingModule(pl.LightningModule):
    """A model with its initial values and its optimizer. Those that inherit say which model, and what a step is.

    Args:
        cfg: Of the run.
        empty: Leave the model on the meta device: whoever trains it gives it memory and its initial values.
    """

    def __init__(self, cfg: Config, empty: bool = False):
        super().__init__()
        self.cfg = cfg
        # muP: every parameter's scale, by name; made here because an engine may hold the parameters in shards later.
        self.widths = self.width_table()
        with torch.device("meta"):
            self.model: Any = self.build_model(cfg.model)
        if not empty:
            self.fill()
        if not cfg.model.final_norm:
            # It exists for v1's checkpoints only: no loss reaches it, and an engine would wait for its gradient.
            encoder: Any = self.model.encoder
            encoder.norm.requires_grad_(False)
        self.first_weights: Any = None
        """Weights to begin with in place of the initial values, for a module that is still empty."""
        self.first_contract: dict[str, Any] = {}
        """What the model of the weights of init= was given, as far as known."""
        self.seen_before: list[str] | None = []
        """Subjects that the weights of init= were trained on; None: not recorded."""
        self._step_loss: Tensor | None = None
        self._rate = 0.0
        self.brainless: set[int] = set()
        """Clips (sample_id) of this rank in which no brain voxel was left, so that they had no token."""

    @abstractmethod
    def build_model(self, cfg: ModelConfig) -> nn.Module:
        """The model of an architecture, on the grid of this run."""

    @property
    def parameter_count(self) -> int:
        """Parameters of the model: encoder, mask token and decoder, or head."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fill(self) -> None:
        """Give the model memory on the CPU and its initial values."""
        self.model.to_empty(device="cpu")
        initialize(self, self.initial_values(), self.cfg.seed)

    def rates(self) -> dict[str, float] | None:
        """Factors on the learning rate of the parameters of `model` by name; None: 1 for all."""
        return None

    def initial_values(self) -> dict[str, Init]:
        """How every parameter begins, by name; with muP scaled for its width."""
        scales = {name: scale.init for name, scale in self.widths.items()} if self.widths else {}
        return {f"model.{name}": value for name, value in initial_values(self.model, scales).items()}

    def width_table(self) -> mup.Table | None:
        """muP: the scale of every parameter of `model` by name; None without muP."""
        base = self.cfg.optimizer.base_width
        return None if base is None else mup.width_table(self.build_model, self.cfg.model, base)

    def seed_dropout(self, batch_idx: int) -> None:
        """Dropout and drop path of a micro-batch draw from a stream of its own: a resumed run draws the same."""
        model = self.cfg.model
        if model.dropout or model.attention_dropout or model.drop_path:
            place = (self.cfg.seed, self.global_step, batch_idx % self.cfg.trainer.accumulate, self.global_rank)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))

    def begin_step(self, batch_idx: int) -> None:
        """At the start of a training step: note the rate, seed what is dropped."""
        self._rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        self.seed_dropout(batch_idx)

    def brain_in_tokens(self, batch: Batch) -> Tensor:
        """Voxels of each clip's brain, bool (B, X, Y, Z), without those where data.brain=cohort has no token.

        Its stores have none there; an augmentation may move some out.
        """
        brain = batch["brain"]
        inside: Tensor = brain if self.cfg.model.cohort is None else self.model.encoder.inside(brain)
        return inside

    def has_brain(self, batch: Batch) -> Tensor:
        """Which clips have tokens, bool (B,); with model.tokens=brain those that have none are named and counted.

        Ingestion lets no scan without brain in; an augmentation may still push a small one out of the grid.
        """
        found = self.brain_in_tokens(batch).flatten(1).any(1)
        if self.cfg.model.tokens == "box":
            return torch.ones_like(found)
        for row in (batch["valid"] & ~found).nonzero()[:, 0].tolist():
            clip, scan, start = (int(batch[name][row]) for name in ("sample_id", "scan", "start"))
            if clip in self.brainless:
                continue
            self.brainless.add(clip)
            log.warning(
                "step %d: clip %d (scan %d, from frame %d) has no brain voxel and so no token: left out (%d such clips "
                "so far)",
                *(self.global_step, clip, scan, start, len(self.brainless)),
            )
        return found

    @property
    def logs(self) -> bool:
        """Whether the numbers of this optimizer step are logged; between such steps none is read from the device."""
        every = self.cfg.trainer.log_every
        assert every is not None, "settings of a Setup"
        return self.global_step % every == 0

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log loss, rate and gradient norm (before clipping) of an optimizer step, over its micro-batches and ranks."""
        # Lightning has divided the loss of a micro-batch by their number.
        self._step_loss = outputs["loss"] if self._step_loss is None else self._step_loss + outputs["loss"]
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        if self.logs:
            self.log("train/loss", self._step_loss, sync_dist=True)
            self.log("train/lr", self._rate)
            strategy: Any = self.trainer.strategy
            norm = strategy.gradient_norm()
            if norm is not None:
                self.log("train/grad_norm", norm)
            # Lightning numbers a step from 0; everything swift writes counts optimizer steps done.
            self.log("step", float(self.global_step))
        self._step_loss = None

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.cfg.optimizer, self.widths, rates=self.rates())
        schedule = build_schedule(optimizer, self.cfg.optimizer, self.cfg.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint carries its configuration, and with it the input contract of the weights."""
        checkpoint["config"] = asdict(self.cfg)
        if self.widths is not None:
            checkpoint["base_shapes"] = mup.record(self.widths)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With muP, go on only with weights of the same base shapes.

        Raises:
            UserError: the checkpoint has no record of them, or another one.
        """
        if self.widths is not None:
            mup.check_record(checkpoint.get("base_shapes"), self.widths)

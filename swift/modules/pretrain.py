"""Masked pre-training as a LightningModule.

Shapes: B batch, X Y Z T voxels and frames, x y z t token grid.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from swift.config.check import mask_unit
from swift.config.schema import Config, ModelConfig
from swift.models import mup
from swift.models.autoencoder import MaskedAutoencoder, clip_sums, reconstruction_loss
from swift.models.init import Init, initial_values, initialize
from swift.models.masking import draw_mask, mask_voxels
from swift.modules.metrics import WeightedMean
from swift.modules.optim import build_optimizer, build_schedule

Batch = dict[str, Tensor]


class PretrainModule(pl.LightningModule):
    """Hide patches of a clip, reconstruct them, count the loss on hidden brain voxels.

    A batch has bold (B, 1, X, Y, Z, T), brain bool (B, X, Y, Z), sample_id int64 (B,), valid bool (B,).

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
            self.model = self.build_model(cfg.model)
        if not empty:
            self.model.to_empty(device="cpu")
            initialize(self, self.initial_values(), cfg.seed)
        if not cfg.model.final_norm:
            # It exists for v1's checkpoints only: no loss reaches it, and an engine would wait for its gradient.
            self.model.encoder.norm.requires_grad_(False)
        self.val_loss = WeightedMean()
        self.val_l1 = WeightedMean()
        self.first_weights: Any = None
        """Weights to begin with in place of the initial values, for a module that is still empty."""
        self._step_loss = torch.zeros(())
        self._rate = 0.0

    def build_model(self, cfg: ModelConfig) -> MaskedAutoencoder:
        """The model of an architecture, on the grid of this run."""
        return MaskedAutoencoder(cfg, self.cfg.data.grid, self.cfg.data.frames)

    def initial_values(self) -> dict[str, Init]:
        """How every parameter begins, by name; with muP scaled for its width."""
        scales = {name: scale.init for name, scale in self.widths.items()} if self.widths else {}
        return {f"model.{name}": value for name, value in initial_values(self.model, scales).items()}

    def width_table(self) -> mup.Table | None:
        """muP: the scale of every parameter of `model` by name; None without muP."""
        base = self.cfg.optimizer.base_width
        return None if base is None else mup.width_table(self.build_model, self.cfg.model, base)

    def draw_mask(self, batch: Batch) -> Tensor:
        """Hidden tokens, bool (B, x, y, z, t): for each sample a function of the run's seed and its identity."""
        task, model, data = self.cfg.task, self.cfg.model, self.cfg.data
        volume = (*data.grid, data.frames)
        unit = mask_unit(task, model)
        sample = batch["sample_id"]
        return draw_mask(self.cfg.seed, sample, volume, model.patch_size, unit, task.mask_ratio, task.mask_kind)

    def counted_voxels(self, batch: Batch, mask: Tensor) -> Tensor:
        """Voxels in the loss, bool (B, X, Y, Z, T): hidden, in the brain (or anywhere, by option), not padding."""
        data = self.cfg.data
        hidden = mask_voxels(mask, self.cfg.model.patch_size, (*data.grid, data.frames))
        counted = hidden & batch["valid"].view(-1, 1, 1, 1, 1)
        return counted if self.cfg.task.loss_background else counted & batch["brain"].unsqueeze(-1)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prediction (B, 1, X, Y, Z, T) and the token mask (B, x, y, z, t) it was made under."""
        mask = self.draw_mask(batch)
        return self.model(batch["bold"], mask), mask

    def seed_dropout(self, batch_idx: int) -> None:
        """Dropout and drop path of a micro-batch draw from a stream of its own: a resumed run draws the same."""
        model = self.cfg.model
        if model.dropout or model.attention_dropout or model.drop_path:
            place = (self.cfg.seed, self.global_step, batch_idx % self.cfg.trainer.accumulate, self.global_rank)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        self.seed_dropout(batch_idx)
        prediction, mask = self.reconstruct(batch)
        counted = self.counted_voxels(batch, mask)
        return reconstruction_loss(prediction, batch["bold"], counted, self.cfg.task.loss)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log loss, rate and gradient norm (before clipping) of an optimizer step, over its micro-batches and ranks."""
        # Lightning has divided the loss of a micro-batch by their number.
        self._step_loss = self._step_loss + outputs["loss"]
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        if self.global_step % self.cfg.trainer.log_every == 0:
            self.log("train/loss", self._step_loss, sync_dist=True)
            self.log("train/lr", self._rate)
            strategy: Any = self.trainer.strategy
            norm = strategy.gradient_norm()
            if norm is not None:
                self.log("train/grad_norm", norm)
            # Lightning numbers a step from 0; everything swift writes counts optimizer steps done.
            self.log("step", float(self.global_step))
        self._step_loss = torch.zeros((), device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        prediction, mask = self.reconstruct(batch)
        counted = self.counted_voxels(batch, mask)
        # Sums and numbers, gathered over ranks, so that neither the batch size nor the ranks change the figures.
        sums, voxels = clip_sums(prediction, batch["bold"], counted, self.cfg.task.loss)
        self.val_loss.update(sums / voxels.clamp(min=1), voxels > 0)
        # What the baselines are compared with: voxels of the brain, whatever the loss counts.
        self.val_l1.update(*clip_sums(prediction, batch["bold"], counted & batch["brain"].unsqueeze(-1), "l1"))
        self.log("val/loss", self.val_loss, batch_size=len(mask))
        self.log("val/l1", self.val_l1, batch_size=len(mask))
        self.log("step", float(self.global_step), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.cfg.optimizer, self.widths)
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

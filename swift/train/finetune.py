"""Training towards a target, and what is said of each clip in validation and test, as a LightningModule.

Shapes: B batch, X Y Z T voxels and frames, K classes (1 for a regression), R clips of all ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swift.config.schema import Config, ModelConfig
from swift.evaluate.judge import ClipRows, gathered
from swift.models.adapt import depth_rates, lora_initial_values
from swift.models.autoencoder import LOSSES
from swift.models.heads import TargetModel
from swift.models.init import Init
from swift.train.base import Batch, TrainingModule
from swift.train.scan_maps import ScanMaps
from swift.utils.errors import UserError

log = logging.getLogger(__name__)

LOWER_IS_BETTER = ("loss", "mae")


class FinetuneModule(TrainingModule):
    """An encoder with a head, trained as far as task.adapt says.

    A batch has bold (B, 1, X, Y, Z, T), brain bool (B, X, Y, Z), target (B,) or (B, T) with NaN for "no label",
    sample_id, scan, start (B,) int64, valid bool (B,).

    Args:
        cfg: Of the run, with a target.
        empty: As in TrainingModule.

    Attributes:
        target_info: mean and std of a regression's labels, weights of the classes: of the training subjects. It is
            saved in checkpoints.
        figures: Makes figures of a validation's rows by name, "loss" among them; all are logged as val/NAME.
    """

    def __init__(self, cfg: Config, empty: bool = False):
        super().__init__(cfg, empty)
        assert cfg.task.target is not None
        self.regression = cfg.task.target.kind == "regression"
        self.target_info: dict[str, Any] = {}
        self.figures: Callable[[ClipRows], dict[str, float]] | None = None
        self.scan_maps: ScanMaps | None = None
        """Of task.courses with model.maps_of=scan: the maps of every scan, from its training frames."""
        self._rows: list[dict[str, np.ndarray]] = []
        self._best: float | None = None
        self._waited = 0

    def build_model(self, cfg: ModelConfig) -> TargetModel:
        """Encoder and head of an architecture."""
        return TargetModel(cfg, self.cfg.task, self.cfg.data.grid, self.cfg.data.frames)

    def initial_values(self) -> dict[str, Init]:
        """How every parameter begins; low-rank changes change nothing at first.

        muP: A is an output matrix, 1/m of the base model's values. Those of torch's linear maps fall with the root of
        the width by themselves.
        """
        lora = {
            f"model.{name}": value.scaled(self.widths[name].mult ** -0.5 if self.widths else 1.0)
            for name, value in lora_initial_values(self.model).items()
        }
        return super().initial_values() | lora

    def rates(self) -> dict[str, float] | None:
        """task.adapt=full: slower from block to block downwards."""
        if self.cfg.task.adapt != "full":
            return None
        names = [name for name, _ in self.model.named_parameters()]
        return depth_rates(names, self.model.encoder, self.cfg.task.layer_decay)

    # ---------------------------------------------------------------------------------------------------- the loss
    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """Mean over the clips of a batch of the mean over each one's labels; clips without one are left out.

        Args:
            out: (B, K) or (B, T, K).
            target: (B,) or (B, T), NaN: no label.

        Returns:
            A scalar, float32.
        """
        known = torch.isfinite(target)
        filled = torch.where(known, target, 0.0)
        if self.regression:
            wanted = (filled - self.target_info["mean"]) / self.target_info["std"]
            each = LOSSES[self.cfg.task.loss](out.squeeze(-1), wanted, reduction="none")
        else:
            weight = torch.tensor(self.target_info["class_weights"], dtype=out.dtype, device=out.device)
            place = filled.long()
            each = F.cross_entropy(out.flatten(0, -2), place.flatten(), reduction="none").view_as(filled)
            each = each * weight[place]
        each = torch.where(known, each, 0.0).view(len(out), -1)
        counts = known.view(len(out), -1).sum(1)
        return (each.sum(1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.begin_step(batch_idx)
        target = batch["target"]
        kept = self.has_brain(batch).view(-1, *[1] * (target.ndim - 1))
        return self.loss(self.outputs(batch), torch.where(kept, target, torch.nan))

    def outputs(self, batch: Batch) -> Tensor:
        """What the model says of a batch: (B, K) or (B, T, K)."""
        if self.scan_maps is None:
            return self.model(batch["bold"], batch["brain"])
        # Of all training frames, in training too: maps of other frames would give their courses in another order.
        return self.model(batch["bold"], batch["brain"], self.scan_maps(batch, training=False))

    # --------------------------------------------------------------------------------------------------- judgement
    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the model says of the real clips of a batch, as `ClipRows` has it; one softmax, in float64."""
        out = self.outputs(batch).double()
        scores = out * self.target_info["std"] + self.target_info["mean"] if self.regression else out.softmax(-1)
        rows = {"clip": batch["sample_id"], "scan": batch["scan"], "start": batch["start"]}
        rows |= {"scores": scores, "target": batch["target"].double()}
        kept = batch["valid"] & self.has_brain(batch)
        return {name: value[kept].cpu().numpy() for name, value in rows.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._rows.append(self.predict(batch))

    def on_validation_epoch_end(self) -> None:
        """Figures over all subjects of all ranks, the choice of the best, and the end of patience."""
        rows, self._rows = gathered(self._rows), []
        assert self.figures is not None
        self.choose(self.figures(rows))

    def choose(self, found: dict[str, float]) -> None:
        """Log the figures of a validation, count its patience, and say by which number it is compared."""
        for name, value in found.items():
            self.log(f"val/{name}", value)
        select = self.cfg.task.select
        value = found[select] if select in LOWER_IS_BETTER else -found[select]
        # Undefined (the correlation of constant predictions) is worse than anything.
        if not math.isfinite(value):
            log.warning("step %d: validation %s is undefined and counts as the worst", self.global_step, select)
        value = value if math.isfinite(value) else math.inf
        self.log("val/select", value)
        self.log("step", float(self.global_step))
        if self._best is None or value < self._best:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        if self.cfg.task.patience and self._waited >= self.cfg.task.patience:
            self.trainer.should_stop = True

    # -------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the scale of the labels: predictions need it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["target"] = self.target_info
        checkpoint["patience"] = {"best": self._best, "waited": self._waited}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the same labels only.

        Raises:
            UserError: their scale or weights are others.
        """
        super().on_load_checkpoint(checkpoint)
        there = checkpoint.get("target")
        if self.target_info and there != self.target_info:
            raise UserError(f"cannot go on exactly: the run had labels with {there}, now {self.target_info}")
        self._best, self._waited = checkpoint["patience"]["best"], checkpoint["patience"]["waited"]

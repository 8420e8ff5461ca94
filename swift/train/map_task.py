"""Training towards brain maps, and what is said of each subject in validation and test, as a LightningModule.

Shapes: B clips of a batch, K contrasts, C cells of the brain, S subjects, D numbers that are averaged over clips.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.config.schema import Config
from swift.evaluate.map_judge import SubjectMeans
from swift.models.map_heads import MapHead
from swift.train.base import Batch
from swift.train.contrastive import (
    distances,
    gathered,
    reconstructive_contrastive,
    scheduled,
    squared,
)
from swift.train.finetune import FinetuneModule

log = logging.getLogger(__name__)


class MapModule(FinetuneModule):
    """An encoder with a dense head. A batch has target (B, K, C) and subject (B,), see `swift.data.task_maps.module`.

    Attributes:
        cells: (C,) int64 flat places of the brain's cells among those that the head gives; set by `wiring.tell`.
        map_figures: Makes figures by name of (S,) subjects and their predicted (S, K, C) maps, "loss" among them.
    """

    def __init__(self, cfg: Config, empty: bool = False):
        super().__init__(cfg, empty)
        self.cells = torch.empty(0, dtype=torch.int64)
        self.map_figures: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None
        self._means = SubjectMeans()
        self._said_alone = False

    # ---------------------------------------------------------------------------------------------------- the loss
    def in_brain(self, out: Tensor) -> Tensor:
        """(B, K, cx, cy, cz) of the head -> (B, K, C)."""
        self.cells = self.cells.to(out.device)
        return out.flatten(2)[:, :, self.cells]

    def map_loss(self, out: Tensor, batch: Batch, batch_idx: int, kept: Tensor | None = None) -> Tensor:
        """l2: mean over clips of the squared error in the brain; contrastive: over the global batch.

        Args:
            out: (B, K, C).
            batch: With target and subject.
            batch_idx: Of the micro-batch, whose clips alone make pairs.
            kept: bool (B,), clips that count; None: all.
        """
        task = self.cfg.task
        if task.loss == "l2":
            each = squared(out, batch["target"])
            return each.mean() if kept is None else torch.where(kept, each, 0.0).sum() / kept.sum().clamp(min=1)
        step, steps = self.global_step, self.cfg.trainer.max_steps
        seed = (self.cfg.seed, step, batch_idx % self.cfg.trainer.accumulate)
        whole, target, subject = gathered(out, gradient=True), gathered(batch["target"]), gathered(batch["subject"])
        if kept is not None:
            counted = gathered(kept)
            if not counted.any():
                return out.sum() * 0.0
            whole, target, subject = whole[counted], target[counted], subject[counted]
        own, other = distances(whole, target, subject, seed)
        if other is None and not self._said_alone:
            self._said_alone = True
            log.warning("step %d: all clips are of one subject: nobody to tell it from, the error alone counts", step)
        margins = (scheduled(ends, step, steps) for ends in (task.margin_own, task.margin_other))
        return reconstructive_contrastive(own, other, *margins)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.begin_step(batch_idx)
        # Once a step: what is logged is what is stepped on.
        kept = None if self.cfg.model.tokens == "box" else self.has_brain(batch)
        return self.map_loss(self.in_brain(self.outputs(batch)), batch, batch_idx, kept)

    # --------------------------------------------------------------------------------------------------- judgement
    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Of the real clips of a batch: subject (b,), and scores (b, D) float32 that are averaged over its clips."""
        if self.cfg.task.average == "features":
            pooled = self.model.pooled(batch["bold"], batch["brain"])
            scores = torch.cat([one.flatten(1) for one in pooled], 1)
        else:
            scores = self.in_brain(self.outputs(batch)).flatten(1)
        rows = {"subject": batch["subject"], "scores": scores.float()}
        kept = batch["valid"] & self.has_brain(batch)
        return {name: value[kept].cpu().numpy() for name, value in rows.items()}

    def maps_of(self, means: np.ndarray) -> dict[str, np.ndarray]:
        """(S, D) means over each subject's clips -> maps (S, K, C) float32; by name, as ZeRO 3 takes no bare array."""
        head: MapHead = self.model.head
        if self.cfg.task.average == "predictions":
            return {"maps": np.asarray(means.reshape(len(means), head.outputs, -1), np.float32)}
        sizes = [math.prod(shape) for shape in head.shapes()]
        made = []
        for row in torch.from_numpy(means.astype(np.float32)).to(self.device):
            parts = [part.view(1, *shape) for part, shape in zip(row.split(sizes), head.shapes(), strict=True)]
            made.append(self.in_brain(self.model.decode(parts)).cpu().numpy())
        return {"maps": np.concatenate(made)}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._means.add(self.predict(batch))

    def on_validation_epoch_end(self) -> None:
        """Figures over all subjects of all ranks, the choice of the best, and the end of patience."""
        subjects, means = self._means.gathered()
        self._means = SubjectMeans()
        strategy: Any = self.trainer.strategy
        assert self.map_figures is not None
        # In the precision of the judgement, which decodes as a validation step does.
        with self.trainer.precision_plugin.val_step_context():
            maps = strategy.call("maps_of", means)["maps"]
        self.choose(self.map_figures(subjects, maps))

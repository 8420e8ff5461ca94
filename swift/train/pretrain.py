"""Masked pre-training as a LightningModule.

Shapes: B batch, X Y Z T voxels and frames, x y z t token grid.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from swift.config.check import mask_unit
from swift.config.schema import Config, ModelConfig
from swift.data.clips.mixture import Stores
from swift.models import any_mask
from swift.models.autoencoder import MaskedAutoencoder, clip_sums, reconstruction_loss, rows_loss
from swift.models.drop import AnyDrop, AnyUnits
from swift.models.heads import build_model
from swift.models.masking import draw_mask, mask_voxels
from swift.models.visible import Units, hidden_loss, put_cells
from swift.models.visible_frames import frames_loss
from swift.train.base import Batch, TrainingModule
from swift.train.scan_maps import ScanMaps

__all__ = ["Batch", "PretrainModule"]

log = logging.getLogger(__name__)
MOST_WAITING = 1000
"""Batches whose unusable clips are remembered until they are named."""


class WeightedMean(Metric):
    """Mean over all voxels (or clips) since the last reset, on all ranks; NaN if there were none.

    torchmetrics' MeanMetric either leaves NaN out of the mean or (nan_strategy="disable", 1.9) forgets the weights.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add sums, of any shape, and how many values are in them."""
        self.total += total.double().sum()
        self.count += count.sum()

    def compute(self) -> Tensor:
        """The mean, a float64 scalar."""
        return self.total / self.count


class Unseen:
    """Scans of whose brain nothing can be shown beside something hidden, named in the log once."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._named: set[int] = set()

    def note(self, unusable: Tensor, batch: Batch) -> None:
        """Keep bool (B,) of a batch, without waiting for the device."""
        if "scan" in batch and len(self._waiting) < MOST_WAITING:
            self._waiting.append((unusable & batch["valid"], batch["scan"]))

    def tell(self, store: Stores) -> None:
        """Name those that are new; waits for the device."""
        new = {place for unusable, scan in self._waiting for place in scan[unusable].tolist()} - self._named
        self._waiting, self._named = [], self._named | new
        for place in sorted(new):
            log.warning(
                "scan %s: fewer than two mask units touch its brain, one to show and one to hide "
                "(task.hidden=drop): its clips are left out of the loss",
                store.scans[place].scan_id,
            )


class PretrainModule(TrainingModule):
    """Hide patches of a clip, reconstruct them, count the loss on hidden brain voxels.

    A batch has bold (B, 1, X, Y, Z, T), brain bool (B, X, Y, Z), sample_id int64 (B,), valid bool (B,).

    Args:
        cfg: Of the run.
        empty: Leave the model on the meta device: whoever trains it gives it memory and its initial values.
    """

    def __init__(self, cfg: Config, empty: bool = False):
        super().__init__(cfg, empty)
        self.val_loss = WeightedMean()
        self.val_l1 = WeightedMean()
        self.unseen = Unseen()
        self.scan_maps: ScanMaps | None = None
        """Of model.maps_of=scan: the maps of every scan, from its training frames."""

    @property
    def units(self) -> AnyUnits | None:
        """Of task.hidden=drop: how clips are cut into what is shown or left out."""
        model: nn.Module = self.model  # a bench may wrap it
        return model.units if isinstance(model, AnyDrop) else None

    def build_model(self, cfg: ModelConfig) -> nn.Module:
        """The model of an architecture, on the grid of this run."""
        return build_model(cfg, self.cfg.task, self.cfg.data.grid, self.cfg.data.frames)

    def draw_shown(self, units: AnyUnits, batch: Batch) -> Tensor:
        """Visible units or time steps, int64 (B, V): for each sample a function of the run's seed, its identity and
        (units) its brain.
        """
        if isinstance(units, Units):
            self.unseen.note(~units.usable(batch["brain"]), batch)
        return units.draw(self.cfg.seed, batch["sample_id"], batch["brain"])

    def usable(self, batch: Batch) -> Tensor:
        """Clips in the loss, bool (B,): no padding, and with task.hidden=drop something of the brain is shown."""
        valid = batch["valid"]
        return valid if self.units is None else valid & self.units.usable(batch["brain"])

    def draw_mask(self, batch: Batch) -> Tensor:
        """Hidden tokens, bool (B, x, y, z, t): for each sample a function of the run's seed and its identity."""
        task, model, data = self.cfg.task, self.cfg.model, self.cfg.data
        if self.units is not None:
            return self.units.mask(self.draw_shown(self.units, batch))
        volume = (*data.grid, data.frames)
        unit = mask_unit(task, model)
        sample = batch["sample_id"]
        return draw_mask(self.cfg.seed, sample, volume, model.patch_size, unit, task.mask_ratio, task.mask_kind)

    def counted_voxels(self, batch: Batch, mask: Tensor) -> Tensor:
        """Voxels in the loss, bool (B, X, Y, Z, T): hidden, in the brain (or anywhere, by option), not padding."""
        data = self.cfg.data
        hidden = mask_voxels(mask, self.cfg.model.patch_size, (*data.grid, data.frames))
        counted = hidden & (self.usable(batch) & self.has_brain(batch)).view(-1, 1, 1, 1, 1)
        if self.cfg.task.loss_background:
            return counted
        return counted & self.brain_in_tokens(batch).unsqueeze(-1)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prediction (B, 1, X, Y, Z, T) and the token mask (B, x, y, z, t) it was made under."""
        if self.units is not None:
            shown = self.draw_shown(self.units, batch)
            hidden = self.model(batch["bold"], shown)
            if isinstance(self.units, Units):
                return put_cells(self.units, hidden, shown), self.units.mask(shown)
            return self.units.put(hidden, shown), self.units.mask(shown)
        mask = self.draw_mask(batch)
        return self.reconstruct_under(batch, mask), mask

    def reconstruct_under(self, batch: Batch, mask: Tensor) -> Tensor:
        """Prediction (B, 1, X, Y, Z, T) under a mask of the caller, bool (B, x, y, z, t), whatever the model hides."""
        if self.units is not None:
            return any_mask.reconstruct(self.model, batch["bold"], mask)
        maps = self.scan_maps(batch, self.training) if self.scan_maps is not None else None
        found: Tensor = self.model(batch["bold"], mask, batch["brain"], maps)
        return found

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        if self.units is None:
            return self._loss_of_tokens(batch)
        shown = self.draw_shown(self.units, batch)
        prediction = self.model(batch["bold"], shown)
        counted = self.usable(batch).view(-1, 1, 1, 1).expand_as(batch["brain"])
        if not self.cfg.task.loss_background:
            counted = counted & batch["brain"]
        if isinstance(self.units, Units):
            return hidden_loss(self.units, prediction, batch["bold"], counted, shown, self.cfg.task.loss)
        return frames_loss(self.units, prediction, batch["bold"], counted, shown, self.cfg.task.loss)

    def _loss_of_tokens(self, batch: Batch) -> Tensor:
        """The loss of a model with mask tokens; on brain tokens only hidden patches reach the head."""
        model: MaskedAutoencoder = self.model
        bold, brain, mask, kind = batch["bold"], batch["brain"], self.draw_mask(batch), self.cfg.task.loss
        rows = model.hidden_rows(bold, mask, brain) if self.cfg.model.tokens == "brain" else None
        if rows is None:
            prediction = self.reconstruct_under(batch, mask)
            return reconstruction_loss(prediction, bold, self.counted_voxels(batch, mask), kind)
        where = model.encoder.token_sets(brain, bold)
        assert where is not None
        counted = brain & (self.usable(batch) & self.has_brain(batch)).view(-1, 1, 1, 1)
        prediction = model(bold, mask, brain, None, rows)
        return rows_loss(prediction, bold, counted, rows, where[0], self.cfg.model.patch_size, kind)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.begin_step(batch_idx)
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        data = getattr(self.trainer, "datamodule", None)
        # The figures of a step that is logged wait for the device anyway.
        if data is not None and self.logs:
            self.unseen.tell(data.store)

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

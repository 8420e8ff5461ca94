"""Masked pre-training as a LightningModule.

Shapes: B batch, X Y Z T voxels and frames, x y z t token grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from swift.config.check import mask_unit
from swift.config.schema import Config, ModelConfig
from swift.models.autoencoder import MaskedAutoencoder, clip_sums, reconstruction_loss
from swift.models.masking import draw_mask, mask_voxels
from swift.train.base import Batch, TrainingModule
from swift.train.scan_maps import ScanMaps

__all__ = ["Batch", "PretrainModule"]


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
        self.scan_maps: ScanMaps | None = None
        """Of model.maps_of=scan: the maps of every scan, from its training frames."""

    def build_model(self, cfg: ModelConfig) -> MaskedAutoencoder:
        """The model of an architecture, on the grid of this run."""
        return MaskedAutoencoder(cfg, self.cfg.data.grid, self.cfg.data.frames)

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
        if not self.cfg.model.maps:
            return self.model(batch["bold"], mask), mask
        maps = self.scan_maps(batch, self.training) if self.scan_maps is not None else None
        return self.model(batch["bold"], mask, batch["brain"], maps), mask

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.begin_step(batch_idx)
        prediction, mask = self.reconstruct(batch)
        counted = self.counted_voxels(batch, mask)
        return reconstruction_loss(prediction, batch["bold"], counted, self.cfg.task.loss)

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

"""Metrics gathered over batches and ranks as sums and counts, never as means of means."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


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

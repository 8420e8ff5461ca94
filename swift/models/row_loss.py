"""The loss of gathered rows: what is hidden and predicted, without a prediction of the whole clip.

Shapes: R rows, V voxels of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RowSums(torch.autograd.Function):
    """Loss summed over the counted voxels of each row, in few passes: the target becomes the gradient in place."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor, left_out: Tensor, kind: str) -> Tensor:
        difference = target.neg_().add_(prediction).masked_fill_(left_out, 0.0)
        rows = difference.flatten(1)
        if kind == "l1":
            sums = torch.linalg.vector_norm(rows, 1, dim=1)
            gradient = difference.sgn_()
        elif kind == "l2":
            sums = torch.linalg.vector_norm(rows, 2, dim=1).square()
            gradient = difference.mul_(2)
        else:
            zero = rows.new_zeros(()).expand_as(rows)
            sums = F.smooth_l1_loss(rows, zero, reduction="none").sum(1)
            gradient = difference.clamp_(-1, 1)
        ctx.save_for_backward(gradient)
        ctx.dtype = prediction.dtype
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0].view(-1, *[1] * (gradient.ndim - 1))).to(ctx.dtype), None, None, None


def row_sums(prediction: Tensor, target: Tensor, counted: Tensor, kind: str) -> Tensor:
    """Loss summed over the counted voxels of each row.

    Args:
        prediction: (R, ...).
        target: The same shape, float32 or wider; it is written over.
        counted: bool, broadcastable to it.
        kind: l1 | smooth_l1 | l2.

    Returns:
        (R,).
    """
    sums: Tensor = RowSums.apply(prediction, target, ~counted, kind)
    return sums


def mean_of_clips(sums: Tensor, voxels: Tensor) -> Tensor:
    """Mean over clips of the mean of each from sums (B,) and voxels (B,); clips without a voxel are left out."""
    return (sums / voxels.clamp(min=1)).sum() / (voxels > 0).sum().clamp(min=1)

"""Which tokens of a stage see brain, and the mean over them.

Shapes: B batch, X Y Z voxels, x y z t token grid of a stage, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def brain_tokens(brain: Tensor, patch: Sequence[int], stage: int) -> Tensor:
    """Tokens with at least one brain voxel in their cell.

    A token of stage s (from 0) stands for a cell of patch * 2^s voxels along each axis of space; cells begin at
    voxel 0, and the last one may reach beyond the grid.

    Args:
        brain: bool (B, X, Y, Z).
        patch: Voxels x, y, z (and frames, not looked at) of a patch.
        stage: From 0.

    Returns:
        bool (B, x, y, z).
    """
    cell = [size << stage for size in patch[:3]]
    pads = [-n % c for n, c in zip(brain.shape[1:], cell)]
    padded = F.pad(brain, (0, pads[2], 0, pads[1], 0, pads[0]))
    for axis, size in enumerate(cell, start=1):
        padded = padded.unflatten(axis, (-1, size)).any(axis + 1)
    return padded


def pool(features: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the brain tokens of each time step; every token weighs the same.

    Args:
        features: (B, x, y, z, t, E) of a stage.
        tokens: bool (B, x, y, z), at least one True in each sample.

    Returns:
        (B, t, E).
    """
    weight = tokens.to(features.dtype) / tokens.flatten(1).sum(1).view(-1, 1, 1, 1)
    return torch.einsum("bxyzte,bxyz->bte", features, weight)

"""Masks for masked reconstruction: exact in ratio, the same for a sample whatever the batch, rank or device.

The noise is a counter-based hash of (seed, sample, unit), computed in 64-bit integers on the device, so nothing has to
be stored or resumed: sample 17 has the same mask on one rank and on a thousand, on a CPU and on a GPU.

Shapes: B batch, X Y Z T token grid, U mask units of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swift.models.layers import token_grid
from swift.models.noise import GOLDEN, mix, signed

MASK_KINDS = ("random", "tube", "temporal", "frames")


def unit_noise(seed: int, sample_id: Tensor, units: int) -> Tensor:
    """Pseudo-random int64 (B, U) that depends on seed, sample and unit only. `sample_id`: int64 (B,)."""
    golden = signed(GOLDEN)
    # Reduced here, in Python's integers: torch refuses a scalar that does not fit 64 bits.
    start = signed(seed * GOLDEN % (1 << 64))
    key = mix(mix(sample_id + start) + golden)
    return mix(key[:, None] + torch.arange(1, units + 1, device=sample_id.device) * golden)


def draw_mask(
    seed: int,
    sample_id: Tensor,
    volume: Sequence[int],
    patch: Sequence[int],
    unit: Sequence[int],
    ratio: float,
    kind: str,
) -> Tensor:
    """Which tokens of each sample are hidden.

    Args:
        seed: of the run.
        sample_id: int64 (B,), the identity of each sample; the mask depends on it and on nothing else of the batch.
        volume: voxels x, y, z and frames.
        patch: voxels and frames of a token.
        unit: voxels and frames hidden together, a multiple of the patch on each axis.
        ratio: part of the units that is hidden; round(ratio * U) of them exactly, at least one hidden and one visible.
        kind: random: any units | tube: the same places in all frames | temporal: the last frames, all places | frames:
            any frames, all places.

    Returns:
        bool (B, X, Y, Z, T), True = hidden.
    """
    tokens = token_grid(volume, patch)
    units = token_grid(volume, unit)
    per_unit = [u // p for u, p in zip(unit, patch, strict=True)]
    if kind == "temporal":
        hidden = torch.arange(units[3], device=sample_id.device) >= units[3] - hidden_count(ratio, units[3])
        mask = hidden.expand(len(sample_id), *units[:3], units[3])
    else:
        drawn = {"random": units, "tube": (*units[:3], 1), "frames": (1, 1, 1, units[3])}[kind]
        count = drawn[0] * drawn[1] * drawn[2] * drawn[3]
        noise = unit_noise(seed, sample_id, count)
        chosen = noise.argsort(dim=1)[:, : hidden_count(ratio, count)]
        flat = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device).scatter_(1, chosen, True)
        mask = flat.view(-1, *drawn).expand(-1, *units)
    for axis, repeat in enumerate(per_unit, start=1):
        mask = mask.repeat_interleave(repeat, axis)
    return mask[:, : tokens[0], : tokens[1], : tokens[2], : tokens[3]]


def draw_shown(seed: int, sample_id: Tensor, touched: Tensor, shown: int) -> Tensor:
    """Which units of each sample are visible, of those that touch its brain; the same in all frames.

    Where all units touch the brain, the hidden ones are those of `draw_mask` with kind=tube. At least one unit of the
    brain stays hidden: of a brain with too few the visible ones are filled up with units that do not touch it, which
    are computed and teach nothing.

    Args:
        seed: of the run.
        sample_id: int64 (B,), the identity of each sample.
        touched: bool (B, U), units with a voxel of the brain.
        shown: how many are visible in every sample.

    Returns:
        int64 (B, shown), ascending.
    """
    units = touched.shape[1]
    rank = unit_noise(seed, sample_id, units).argsort(1).argsort(1)
    first = torch.where(touched, rank, units).argmin(1, keepdim=True)
    order = (rank + units * touched).scatter(1, first, -1)
    return order.argsort(1, descending=True)[:, :shown].sort(1).values


def hidden_count(ratio: float, units: int) -> int:
    """Hidden units of `units`: exact to rounding, and never all or none."""
    if units < 2:
        raise ValueError(f"a mask needs at least 2 units and the clip has {units}: use a smaller task.mask_unit")
    return min(max(round(ratio * units), 1), units - 1)


def mask_voxels(mask: Tensor, patch: Sequence[int], volume: Sequence[int]) -> Tensor:
    """Token mask (B, x, y, z, t) -> voxel mask (B, X, Y, Z, T)."""
    for axis, size in enumerate(patch, start=1):
        mask = mask.repeat_interleave(size, axis)
    return mask[:, : volume[0], : volume[1], : volume[2], : volume[3]]

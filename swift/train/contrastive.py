"""The reconstructive-contrastive loss of predicted maps (Ngo et al. 2022, BrainSurfCNN, NeuroImage 248:118849).

With W the mean over subjects of the mean squared difference to the own map, and A that to another subject's,
RC = max(0, W - a) + max(0, W - A + b). Maps come normalized by the training variance, so that 1 is the error of the
training mean and margins have no unit.

Shapes: B clips of all ranks, K contrasts, C cells, S subjects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def gathered(values: Tensor, gradient: bool = False) -> Tensor:
    """(b, ...) of this rank -> (B, ...) of all ranks, in their order; with the gradient of this rank's own part.

    A loss of what all ranks gave has a gradient for each rank's part. DDP and the engines take the mean of the ranks'
    gradients where the sum is due, so that the own part's counts as often as there are ranks.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parts = [torch.empty_like(values) for _ in range(world)]
    torch.distributed.all_gather(parts, values.detach().contiguous())
    if gradient:
        own = values.detach() + world * (values - values.detach())
        parts[rank] = own
    return torch.cat(parts)


def partners(count: int, seed: Sequence[int]) -> np.ndarray:
    """(S,) another subject for each: the next in an order drawn from the seed, so that nobody gets himself."""
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(seed)))).permutation(count)
    found = np.empty(count, np.int64)
    found[order] = np.roll(order, -1)
    return found


def squared(out: Tensor, target: Tensor) -> Tensor:
    """(B, K, C) twice -> (B,) mean squared difference over cells with a value and contrasts; NaN stands for none."""
    known = torch.isfinite(target)
    each = torch.where(known, out - torch.where(known, target, 0.0), 0.0).square()
    return (each.sum(2) / known.sum(2).clamp(min=1)).mean(1)


def mean_over_subjects(values: Tensor, subject: Tensor, count: int) -> Tensor:
    """(B,) of clips -> their mean over subjects of the mean over each one's clips; subject (B,) below `count`."""
    clips = torch.bincount(subject, minlength=count).to(values)
    return (values / clips[subject]).sum() / count


def distances(out: Tensor, target: Tensor, subject: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """W and A of a global batch; A is None where it holds clips of one subject only.

    Args:
        out, target: (B, K, C).
        subject: (B,) number of each clip's subject; two clips of one subject are never a negative pair.
        seed: Of the pairs.
    """
    people, place = torch.unique(subject, return_inverse=True)
    count = len(people)
    own = mean_over_subjects(squared(out, target), place, count)
    if count < 2:
        return own, None
    numbers = torch.arange(len(place), device=place.device)
    first = torch.full_like(people, len(place)).scatter_reduce(0, place, numbers, "amin")
    other = torch.from_numpy(partners(count, seed)).to(place.device)[place]
    return own, mean_over_subjects(squared(out, target[first[other]]), place, count)


def reconstructive_contrastive(own: Tensor, other: Tensor | None, margin_own: float, margin_other: float) -> Tensor:
    """RC of W and A; without A its first term."""
    loss = torch.relu(own - margin_own)
    return loss if other is None else loss + torch.relu(own - other + margin_other)


def scheduled(ends: Sequence[float], step: int, steps: int) -> float:
    """A margin that goes evenly from the first to the last step."""
    part = min(1.0, step / max(1, steps - 1))
    return ends[0] + part * (ends[1] - ends[0])

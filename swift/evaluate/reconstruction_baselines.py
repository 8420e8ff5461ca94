"""What a masked-reconstruction model must beat: four predictions that need no training.

Shapes: bold (B, 1, X, Y, Z, T) normalized signal; masked (B, X, Y, Z, T) bool, True = hidden from the model; brain
(B, X, Y, Z) bool; predictions (B, 1, X, Y, Z, T) float32. A prediction uses visible values of brain voxels only, so
changing a hidden value, or one outside the brain, changes nothing. Outside the brain predictions are 0, never scored.

Where a voxel has no visible frame, all fall back to the brain mean; where a clip shows no brain voxel, that is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class _Packed:
    """The brain voxels of a batch as rows: N voxels of all clips together, T frames."""

    def __init__(self, bold: Tensor, masked: Tensor, brain: Tensor) -> None:
        _check(bold, masked, brain)
        self.shape, self.brain = bold.shape, brain
        self.visible = ~masked[brain]
        hidden = ~self.visible
        self.values = bold[:, 0][brain].float().masked_fill(hidden, 0.0)
        self.frames = self.visible.sum(1)
        self.clip = brain.nonzero()[:, 0]

    def clip_mean(self) -> Tensor:
        """Mean of the visible brain values of each voxel's clip: (N,)."""
        batch = self.shape[0]
        # summed in double: a clip has millions of values
        total = self.values.new_zeros(batch, dtype=torch.float64).index_add_(0, self.clip, self.values.double().sum(1))
        count = self.frames.new_zeros(batch).index_add_(0, self.clip, self.frames)
        return (total / count.clamp(min=1)).float()[self.clip]

    def neighbours(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The visible frame at or before, and at or after, each frame: value and distance in frames, each (N, T).

        The distance is T where there is none, more than any real one.
        """
        frames = self.values.shape[1]
        index = torch.arange(frames, device=self.values.device).expand_as(self.visible)
        before = index.masked_fill(~self.visible, -1).cummax(1).values
        after = index.masked_fill(~self.visible, frames).flip(1).cummin(1).values.flip(1)
        value_before = self.values.gather(1, before.clamp(min=0))
        value_after = self.values.gather(1, after.clamp(max=frames - 1))
        gap_before = (index - before).masked_fill(before < 0, frames)
        gap_after = (after - index).masked_fill(after == frames, frames)
        return value_before, gap_before, value_after, gap_after

    def dense(self, rows: Tensor, fallback: bool = True) -> Tensor:
        """Rows (N, T) put back into (B, 1, X, Y, Z, T); voxels without a visible frame get the brain mean."""
        if fallback:
            rows = torch.where(self.frames[:, None] > 0, rows, self.clip_mean()[:, None])
        out = rows.new_zeros(self.brain.shape + rows.shape[1:])
        out[self.brain] = rows
        return out[:, None]


def _check(bold: Tensor, masked: Tensor, brain: Tensor) -> None:
    expected = bold.shape[:1] + bold.shape[2:]
    if bold.ndim != 6 or bold.shape[1] != 1:
        raise ValueError(f"bold must be (B, 1, X, Y, Z, T), got {tuple(bold.shape)}")
    if masked.shape != expected or masked.dtype != torch.bool:
        raise ValueError(f"masked must be bool {tuple(expected)}, got {masked.dtype} {tuple(masked.shape)}")
    if brain.shape != expected[:-1] or brain.dtype != torch.bool:
        raise ValueError(f"brain must be bool {tuple(expected[:-1])}, got {brain.dtype} {tuple(brain.shape)}")


def brain_mean(bold: Tensor, masked: Tensor, brain: Tensor) -> Tensor:
    """The mean of all visible brain values of the clip, everywhere."""
    packed = _Packed(bold, masked, brain)
    return packed.dense(packed.clip_mean()[:, None].expand_as(packed.values), fallback=False)


def voxel_mean(bold: Tensor, masked: Tensor, brain: Tensor) -> Tensor:
    """The mean of the voxel's visible frames, in every frame."""
    packed = _Packed(bold, masked, brain)
    mean = packed.values.sum(1) / packed.frames.clamp(min=1)
    return packed.dense(mean[:, None].expand_as(packed.values))


def nearest_frame(bold: Tensor, masked: Tensor, brain: Tensor) -> Tensor:
    """The voxel's value in the visible frame nearest in time; the mean of both where two are equally near."""
    packed = _Packed(bold, masked, brain)
    before, gap_before, after, gap_after = packed.neighbours()
    nearer = torch.where(gap_before < gap_after, before, after)
    return packed.dense(torch.where(gap_before == gap_after, (before + after) / 2, nearer))


def linear_interpolation(bold: Tensor, masked: Tensor, brain: Tensor) -> Tensor:
    """A straight line in time between the visible frames around; beyond the first and the last one, their value."""
    packed = _Packed(bold, masked, brain)
    frames = packed.values.shape[1]
    before, gap_before, after, gap_after = packed.neighbours()
    weight = gap_before / (gap_before + gap_after).clamp(min=1)
    rows = before + weight * (after - before)
    rows = torch.where(gap_before == frames, after, torch.where(gap_after == frames, before, rows))
    return packed.dense(rows)


BASELINES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "brain mean": brain_mean,
    "voxel mean over visible frames": voxel_mean,
    "nearest visible frame": nearest_frame,
    "linear interpolation": linear_interpolation,
}
"""Name in summaries and figures -> prediction."""


def masked_l1_sum(
    pred: Tensor, bold: Tensor, masked: Tensor, brain: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of |pred - bold| over the masked voxel-frames of the brain, and their number.

    Sums and counts of batches and ranks may be added; means may not.

    Args:
        pred: (B, 1, X, Y, Z, T).
        bold: (B, 1, X, Y, Z, T).
        masked: (B, X, Y, Z, T) bool.
        brain: (B, X, Y, Z) bool.
        valid: (B,) bool, False for clips that are padding; None: all count.

    Returns:
        The sum (float64 scalar) and the count (int64 scalar).
    """
    _check(bold, masked, brain)
    counted = brain if valid is None else brain & valid[:, None, None, None]
    hidden = masked[counted]
    error = (pred[:, 0][counted].float() - bold[:, 0][counted].float()).abs()
    return error.masked_fill(~hidden, 0.0).sum(dtype=torch.float64), hidden.sum()


class BaselineScores:
    """The masked L1 of every baseline over many batches, each voxel-frame counting once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count: Tensor | int = 0

    @torch.no_grad()
    def update(
        self,
        bold: Tensor,
        masked: Tensor,
        brain: Tensor,
        valid: Tensor | None = None,
        fitted: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch (shapes as in `masked_l1_sum`); `fitted`: predictions of further baselines, by name."""
        made = {name: predict(bold, masked, brain) for name, predict in BASELINES.items()}
        for name, prediction in {**made, **(fitted or {})}.items():
            total, count = masked_l1_sum(prediction.to(bold.device), bold, masked, brain, valid)
            self.sums[name] = self.sums.get(name, torch.zeros_like(total)) + total
        self.count = self.count + count

    def compute(self) -> dict[str, float]:
        """Name -> mean L1; NaN where nothing was masked. Of this process: add `sums` and `count` over ranks first."""
        count = float(self.count)
        return {name: float(total) / count if count else float("nan") for name, total in self.sums.items()}

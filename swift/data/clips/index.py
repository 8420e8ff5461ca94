"""Which clips a scan gives: index arithmetic only, no file, no torch.

A clip starts at frame s and holds frames s, s + frame_stride, ..., `frames` of them; its span is
(frames - 1) * frame_stride + 1. A part of a scan of L frames gives clips at 0, stride, 2 stride, ... as far as they
fit, and one more that ends with the last frame if those do not reach it: with clip_stride <= span no frame of the part
lies outside every span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swift.utils.errors import UserError


@dataclass(frozen=True)
class ClipSpec:
    """Shape of a clip, in frames.

    Attributes:
        frames: Frames in a clip.
        frame_stride: Step between its frames.
        clip_stride: Step between the starts of training clips. Held-out clips follow each other without overlap.
    """

    frames: int
    frame_stride: int = 1
    clip_stride: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "frame_stride", "clip_stride"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least 1")

    @property
    def span(self) -> int:
        """Frames from the first to the last of a clip, both counted."""
        return (self.frames - 1) * self.frame_stride + 1


def clip_count(length: int, span: int, stride: int) -> int:
    """Number of clips in `length` frames; 0 if one does not fit."""
    if length < span:
        return 0
    return 1 + -(-(length - span) // stride)


def clip_start(number: int, length: int, span: int, stride: int) -> int:
    """First frame of clip `number` of a part."""
    assert 0 <= number < clip_count(length, span, stride)
    return min(number * stride, length - span)


def hold_out(frames: int, span: int, val_fraction: float, gap: int) -> tuple[int, int]:
    """Cut a scan in time: training frames [0, n), then `gap` frames used by neither, then held-out frames [first, end).

    The held-out part is val_fraction of the scan, or one clip where that is longer. A scan too short for one training
    clip, the gap and one held-out clip is all training.

    Returns:
        n, first (first == frames: nothing is held out).
    """
    if val_fraction == 0:
        return frames, frames
    held = max(round(frames * val_fraction), span)
    if frames - held - gap < span:
        held = span
    if frames - held - gap < span:
        return frames, frames
    return frames - held - gap, frames - held


class ClipIndex:
    """The clips of many parts of scans, numbered 0, 1, ...: part by part, in time within a part.

    Memory and time are those of the parts, not of the clips.

    Args:
        scan: (P,) scan of each part.
        first: (P,) its first frame.
        length: (P,) its frames, each at least `span`.
        span: Frames that a clip reaches over.
        stride: Frames between the starts of clips.
    """

    def __init__(
        self, scan: Sequence[int], first: Sequence[int], length: Sequence[int], span: int, stride: int
    ) -> None:
        self.scan = np.asarray(scan, np.int64)
        self.first = np.asarray(first, np.int64)
        self.length = np.asarray(length, np.int64)
        self.span, self.stride = span, stride
        assert self.scan.shape == self.first.shape == self.length.shape
        assert not len(self.length) or self.length.min() >= span
        counts = 1 + -(-(self.length - span) // stride)
        self.ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scan and first frame of clips: (n,) int64 numbers -> (n,) int64, (n,) int64."""
        numbers = np.asarray(numbers, np.int64)
        assert not len(numbers) or (numbers.min() >= 0 and numbers.max() < len(self))
        part = np.searchsorted(self.ends, numbers, side="right")
        begin = np.where(part > 0, self.ends[part - 1], 0)
        inside = np.minimum((numbers - begin) * self.stride, self.length[part] - self.span)
        return self.scan[part], self.first[part] + inside


def check_length(frames: Sequence[int], names: Sequence[str], spec: ClipSpec) -> None:
    """Raise UserError where a scan is shorter than a clip."""
    short = [i for i, n in enumerate(frames) if n < spec.span]
    if short:
        i = short[0]
        more = f" (and {len(short) - 1} other scans)" if len(short) > 1 else ""
        raise UserError(
            f"scan {names[i]}{more}: {frames[i]} frames, fewer than a clip, which spans {spec.span} "
            f"(data.frames={spec.frames}, data.frame_stride={spec.frame_stride}); shorten it or drop the scan"
        )


def time_split(
    scans: Sequence[int],
    frames: Sequence[int],
    names: Sequence[str],
    spec: ClipSpec,
    val_fraction: float,
    gap: int,
) -> tuple[ClipIndex, ClipIndex]:
    """Training and held-out clips of scans that are each cut in time.

    Args:
        scans: Places in the lists `frames` and `names`.
        frames: Frames of each scan.
        names: Their names, for messages.
        spec: The clip.
        val_fraction: Part of each scan to hold out, in [0, 1).
        gap: Frames left out between the parts.

    Raises:
        UserError: a scan shorter than a clip; no scan long enough to hold a clip out though val_fraction asks for it.
    """
    if not 0 <= val_fraction < 1 or gap < 0:
        raise UserError(f"data.val_fraction={val_fraction} must be in [0, 1) and data.val_gap={gap} at least 0")
    check_length([frames[i] for i in scans], [names[i] for i in scans], spec)
    cuts = [hold_out(frames[i], spec.span, val_fraction, gap) for i in scans]
    train = ClipIndex(scans, [0] * len(scans), [n for n, _ in cuts], spec.span, spec.clip_stride)
    held = [(i, first) for i, (_, first) in zip(scans, cuts, strict=True) if first < frames[i]]
    if val_fraction > 0 and not held:
        longest = max(frames[i] for i in scans)
        raise UserError(
            f"no scan can be held out in time: the longest has {longest} frames, a training clip, the gap and a "
            f"held-out clip need {2 * spec.span + gap}; lower data.frames or data.val_gap, or hold out subjects "
            "(data.split=FILE)"
        )
    val = ClipIndex(
        [i for i, _ in held],
        [first for _, first in held],
        [frames[i] - first for i, first in held],
        spec.span,
        spec.span,
    )
    return train, val


def whole_scans(
    scans: Sequence[int], frames: Sequence[int], names: Sequence[str], spec: ClipSpec, stride: int
) -> ClipIndex:
    """Clips of whole scans: `scans` are places in the lists `frames` and `names`."""
    check_length([frames[i] for i in scans], [names[i] for i in scans], spec)
    return ClipIndex(scans, [0] * len(scans), [frames[i] for i in scans], spec.span, stride)

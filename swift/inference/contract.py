"""The input contract: what a trained model must be given, as its run recorded it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift.data.clips.index import ClipSpec
from swift.utils.errors import BadScan, UserError

TR_TOLERANCE = 0.01
"""Relative difference of two TRs that count as the same."""


@dataclass(frozen=True)
class Contract:
    """What a model must be given, as its run recorded it.

    Attributes:
        grid: Voxels X, Y, Z.
        spacing: mm.
        frames, frame_stride: Of a clip.
        normalization: See `swift.data.store.stats.fold`.
        background: Value outside the brain.
        tr: Shortest and longest TR of the scans that it was trained on, seconds; None: not recorded.
    """

    grid: tuple[int, int, int]
    spacing: float
    frames: int
    frame_stride: int
    normalization: str
    background: float
    tr: tuple[float, float] | None = None

    @staticmethod
    def of(values: dict[str, Any], source: object) -> Contract:
        """From the plain values kept with weights.

        Raises:
            UserError: some are missing, or an orientation that swift does not make.
        """
        needed = ("grid", "spacing", "frames", "frame_stride", "normalization", "background")
        missing = [name for name in needed if name not in values]
        if missing:
            raise UserError(
                f"{source} carries no input contract ({', '.join(missing)} missing): swift made no such file"
            )
        if values.get("orientation", "RAS") != "RAS":
            raise UserError(f"{source}: wants orientation {values['orientation']}; swift brings scans to RAS only")
        x, y, z = values["grid"]
        low, high = values.get("tr") or (0.0, 0.0)
        return Contract(
            (int(x), int(y), int(z)),
            float(values["spacing"]),
            int(values["frames"]),
            int(values["frame_stride"]),
            str(values["normalization"]),
            float(values["background"]),
            (float(low), float(high)) if high else None,
        )

    @property
    def span(self) -> int:
        """Frames of a scan that a clip reaches over."""
        return ClipSpec(self.frames, self.frame_stride).span

    def resampled_tr(self, tr: float, name: str, other_tr: str) -> float | None:
        """The TR to bring a scan to; None: it stays.

        Args:
            tr: Of the scan, seconds.
            name: Of the scan, for messages.
            other_tr: What to do where it differs from training: refuse | resample | keep.

        Raises:
            BadScan: it differs, and is to be refused.
        """
        if self.tr is None or other_tr == "keep":
            return None
        low, high = self.tr
        if low * (1 - TR_TOLERANCE) <= tr <= high * (1 + TR_TOLERANCE):
            return None
        if other_tr == "resample":
            return min(max(tr, low), high)
        trained = f"{low:g} s" if low == high else f"{low:g} to {high:g} s"
        raise BadScan(
            f"{name}: TR {tr:g} s, but the model was trained on {trained}; --other-tr resample brings the scan there, "
            "--other-tr keep takes it as it is"
        )

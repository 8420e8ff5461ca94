"""The input contract: what a trained model must be given, as its run recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.data.clips.index import ClipSpec
from swift.data.store.stats import MINIMUM, least
from swift.models.v1 import INPUT
from swift.parallel.checkpoint.init_from import TR_TOLERANCE
from swift.utils.errors import BadScan, UserError

ORIENTATIONS = ("RAS", "LAS")


@dataclass(frozen=True)
class Contract:
    """What a model must be given, as its run recorded it.

    Attributes:
        grid: Voxels X, Y, Z.
        spacing: mm.
        frames, frame_stride: Of a clip.
        normalization: See `swift.data.store.stats.fold`.
        background: Value outside the brain; None: the smallest normalized value of the scan.
        tr: Shortest and longest TR of the scans that it was trained on, seconds; None: not recorded.
        orientation: RAS | LAS: whether x counts from left to right, or from right to left.
        placement: Where the grids of the training scans lay, a name of `swift.data.store.spaces`; "": not recorded.
    """

    grid: tuple[int, int, int]
    spacing: float
    frames: int
    frame_stride: int
    normalization: str
    background: float | None
    tr: tuple[float, float] | None = None
    orientation: str = "RAS"
    placement: str = ""

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
        if values.get("orientation", "RAS") not in ORIENTATIONS:
            raise UserError(f"{source}: wants orientation {values['orientation']}; legal are {', '.join(ORIENTATIONS)}")
        x, y, z = values["grid"]
        low, high = values.get("tr") or (0.0, 0.0)
        return Contract(
            (int(x), int(y), int(z)),
            float(values["spacing"]),
            int(values["frames"]),
            int(values["frame_stride"]),
            str(values["normalization"]),
            None if values["background"] == MINIMUM else float(values["background"]),
            (float(low), float(high)) if high else None,
            str(values.get("orientation", "RAS")),
            str(values.get("placement", "")),
        )

    @staticmethod
    def of_swift_v1(grid: Sequence[int], frames: int, frame_stride: int) -> Contract:
        """What the published SwiFT v1 models were given (Kim et al. 2023): arrays as HCP and FSL store them."""
        clips = {"grid": grid, "frames": frames, "frame_stride": frame_stride}
        return Contract.of(INPUT | clips, "SwiFT v1")

    def background_of(self, brain: dict[str, float]) -> float:
        """Value outside the brain of a scan with these statistics (`swift.data.store.stats.Summary.brain`)."""
        return least(self.normalization, brain) if self.background is None else self.background

    def __str__(self) -> str:
        """One line for people."""
        outside = "the scan's smallest value" if self.background is None else f"{self.background:g}"
        tr = f"TR {self.tr[0]:g} to {self.tr[1]:g} s" if self.tr else "TR not recorded"
        return (
            f"grid {list(self.grid)} of {self.spacing:g} mm, placed by {self.placement or 'a rule not recorded'}, "
            f"orientation {self.orientation}, {self.normalization}, background {outside}, {tr}"
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

"""Which model leaves hidden patches out (task.hidden=drop), by the kind of its masks."""

from __future__ import annotations

from collections.abc import Sequence

from swift.config.schema import ModelConfig, TaskConfig
from swift.models.visible import Units, VisibleAutoencoder, units_of
from swift.models.visible_frames import FrameAutoencoder, FrameUnits, frame_units_of

AnyUnits = Units | FrameUnits
AnyDrop = VisibleAutoencoder | FrameAutoencoder


def cut(cfg: ModelConfig, task: TaskConfig, volume: Sequence[int]) -> AnyUnits | None:
    """How clips of `volume` voxels and frames are cut into what is shown or left out; None: hidden patches are tokens.

    The settings must have passed `swift.config.check`.
    """
    if task.target is not None or task.hidden == "token":
        return None
    return (frame_units_of if task.mask_kind == "frames" else units_of)(cfg, task, volume)


def build(cfg: ModelConfig, units: AnyUnits) -> AnyDrop:
    """The model for clips that are cut so."""
    return FrameAutoencoder(cfg, units) if isinstance(units, FrameUnits) else VisibleAutoencoder(cfg, units)

"""The settings of the data, typed: a part of `swift.config.schema`, whose rules hold here too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


@dataclass
class CohortConfig:
    """One store of a mixture."""

    path: str
    """Folder of the store."""
    weight: Optional[float] = None
    """Part of the training samples, up to a common factor; null (for all cohorts): every clip once an epoch."""


@dataclass
class AugmentConfig:
    """Random changes of training clips, the same for all frames of a clip. A probability of 0 switches one off."""

    flip: float
    """Probability of mirroring left and right. Off by default: the sides of the brain differ."""
    affine: float
    """Probability of a rotation, shift and zoom together."""
    rotate: float
    """Largest angle about each axis, degrees."""
    shift: float
    """Largest shift along each axis, mm."""
    zoom: float
    """Largest relative change of size, each axis by itself."""
    intensity: float
    """Probability of scaling, and that of shifting, all brain values: x -> x * (1 + s), x -> x + o."""
    intensity_scale: float
    """Largest |s|."""
    intensity_shift: float
    """Largest |o|, in normalized units."""
    noise: float
    """Probability of Gaussian noise in the brain."""
    noise_std: float
    """Its largest standard deviation, in normalized units; drawn from 0 to this."""


@dataclass
class DataConfig:
    """Which scans, how they are cut into clips, and how their values are scaled (the input contract of a model)."""

    name: str
    """sample: the bundled real scans | synthetic: a generated cohort | store: a store made by `swift.data ingest`."""
    path: Optional[str]
    """Folder of the store; null: a folder in swift's cache (sample, synthetic)."""
    grid: list[int]
    """Voxels x, y, z a scan is brought to; null: those of the store, 96 96 96 where there is none."""
    spacing: float
    """Isotropic voxel size, mm; null: that of the store, 2 where there is none."""
    frames: int
    """Frames in a clip."""
    frame_stride: int
    """Step between the frames of a clip."""
    clip_stride: int
    """Frames between the starts of consecutive training clips."""
    normalization: str
    """zscore_voxel | zscore_global | percent | minmax | robust | none."""
    background: float
    """Value outside the brain mask, after normalization."""
    batch_size: int
    """Clips a device a step (before gradient accumulation)."""
    workers: int
    """DataLoader worker processes a rank."""
    val_fraction: float
    """Last part of every scan that is held out in time, when there is no split file; beside one it may be 0."""
    val_gap: int
    """Frames left out between training and held-out frames."""
    split: Optional[str]
    """File of a split by subject (made by `swift.data split`), FILE:3 for its split 3; null: hold out in time."""
    verify: bool
    """Check the checksum of every frame that is read."""
    mixture: list[CohortConfig]
    """Stores of one grid and spacing to draw from together, in place of `path`; empty: `path` alone."""
    max_subjects: Optional[int]
    """Train on so many subjects only; a smaller number takes a part of the same ones. null: all."""
    max_frames: Optional[int]
    """Train on at most so many frames in all, dealt evenly to the subjects. null: all."""
    budget_seed: int
    """Which subjects come first."""
    augment: AugmentConfig
    stage_dir: Optional[str]
    """Folder on this node's own disk (environment variables are expanded) to copy the needed shards to; null: none."""
    layout: str = "swift"
    """How clips lie in the model's input: swift (RAS, `background` outside the brain) | swift_v1 (as SwiFT v1's weights
    know them: LAS, the scan's smallest value outside the brain, v1's box where a scan lies in a template's)."""
    revision: int = 1
    """Of the stores that swift makes in its cache (sample, synthetic). A run keeps that of its first start; runs from
    before there was a second one do not name it."""
    repeat_batch: bool = False
    """Train on the first batch again and again, without any input: what a step costs without it (scaling studies)."""
    brain: str = "scan"
    """Whose brain decides on the tokens of model.tokens=brain. scan: that of a clip's own scan | cohort: all cells that
    hold brain in some scan of the stores, the same for every clip, so that no shape changes from step to step."""
    exclude: list[str] = field(default_factory=list)
    """Scans or subjects to leave out, by the names that `swift.data info --scans` shows."""

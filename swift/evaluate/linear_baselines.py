"""The strongest predictions without a network, fitted to the training frames of a run, scored on its held-out clips.

- low-rank: a low-rank Gaussian (`swift.models.low_rank`), its rank chosen on the last training frames or scans. Of
  clips held out in time each scan has its own, fitted to its training frames; of held-out subjects there is one, fitted
  to frames of the training scans on the common grid.
- local ridge: from the visible neighbours in space and time (`swift.evaluate.local_ridge`).
- low-rank + local ridge: the second applied to what the first leaves.

Legend: V brain voxels, n frames, X Y Z grid, B batch, T frames of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from torch import Tensor

from swift.config.check import mask_unit
from swift.config.schema import Config
from swift.data.clips.order import PADDING, ValBatches
from swift.data.module import ClipDataModule
from swift.evaluate.local_ridge import LocalRidge
from swift.evaluate.low_rank import RANKS, choose_rank
from swift.models.low_rank import LowRank, Sketch
from swift.models.masking import draw_mask, mask_voxels
from swift.utils.errors import UserError

OWN, SUBJECTS = "low-rank (own scan)", "low-rank (training subjects)"
LOCAL = "local ridge"
BOTH = " + local ridge"

KEEP = 2 * max(RANKS)
"""Directions that a sketch keeps."""
BLOCK = 64
"""Frames read at a time."""
MOST_FRAMES = 2048
"""Of all training scans together (low-rank, training subjects), and of one scan (own scan)."""
CHOICE_CLIPS = 6
"""Clips on which a rank is chosen and the neighbourhood of what it leaves is measured."""
LOCAL_VALUES = 4e8
"""Most voxels times frames that the local ridge predicts in one judgement: about ten minutes on a core."""


@dataclass
class Fitted:
    """The models of one scan, or of all.

    Attributes:
        index: (V,) flat places in the grid that `low_rank` knows.
    """

    index: np.ndarray
    low_rank: LowRank | None
    local: LocalRidge
    rest: LocalRidge | None


@dataclass
class LinearBaselines:
    """Fitted baselines; `notes` are sentences for the summary: ranks, and what was left out and why."""

    grid: tuple[int, ...]
    name: str
    models: dict[int, Fitted] = field(default_factory=dict)
    """By place of a scan in the store; of held-out subjects -1 for all."""
    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def agree(self, add_up: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Keep only what every rank has been able to fit."""
        every = [self.name, LOCAL, self.name + BOTH]
        missing = add_up(torch.tensor([float(name not in self.names) for name in every], device=device))
        self.names = [name for name, lacking in zip(every, missing.tolist()) if not lacking]

    def predict(self, bold: Tensor, masked: Tensor, brain: Tensor, scan: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Predictions (B, 1, X, Y, Z, T) float32 of `names`, on the CPU; 0 outside the brain and in padding clips.

        Args:
            bold: (B, 1, X, Y, Z, T).
            masked: bool (B, X, Y, Z, T).
            brain: bool (B, X, Y, Z).
            scan: (B,) place of each clip's scan in the store.
            valid: bool (B,).
        """
        found = {name: torch.zeros(bold.shape) for name in self.names}
        for place in valid.nonzero()[:, 0].tolist() if self.names else []:
            where = brain[place].cpu()
            values = bold[place, 0].cpu().float()[where]
            visible = ~masked[place].cpu()[where]
            for name, rows in self._rows(values, visible, where, int(scan[place])).items():
                found[name][place, 0][where] = rows
        return found

    def _rows(self, values: Tensor, visible: Tensor, brain: Tensor, scan: int) -> dict[str, Tensor]:
        """The predictions of `names` for one clip: (V, T) each."""
        model = self.models[scan if scan in self.models else -1]
        index = brain.flatten().nonzero()[:, 0]
        found = {}
        if LOCAL in self.names:
            found[LOCAL] = model.local.predict(values, visible, index, self.grid)
        if self.name in self.names:
            assert model.low_rank is not None
            wide = _on_voxels(model, index).predict(values, visible)
            found[self.name] = wide
            if self.name + BOTH in self.names:
                assert model.rest is not None
                rest = model.rest.predict(values - wide, visible, index, self.grid)
                found[self.name + BOTH] = wide + rest
        return found


def _on_voxels(model: Fitted, index: Tensor) -> LowRank:
    """A low-rank model for the voxels of one brain; of those it does not know it says 0."""
    assert model.low_rank is not None
    if np.array_equal(index.numpy(), model.index):
        return model.low_rank
    at = np.clip(np.searchsorted(model.index, index.numpy()), 0, len(model.index) - 1)
    known = torch.from_numpy(model.index[at] == index.numpy())
    basis = torch.where(known[:, None], model.low_rank.basis[torch.from_numpy(at)], 0.0)
    return LowRank(basis, model.low_rank.variance, model.low_rank.noise)


class TrainingFrames:
    """Normalized training frames of a store."""

    def __init__(self, data: ClipDataModule) -> None:
        self.store, self.kind = data.store, data.data.normalization
        train = data.train_index
        self.parts = {int(s): (int(f), int(n)) for s, f, n in zip(train.scan, train.first, train.length)}

    def index(self, scan: int) -> np.ndarray:
        """(V,) flat places of a scan's voxels, ascending."""
        return self.store.indices(scan)

    def read(self, scan: int, first: int, stop: int, step: int = 1) -> Tensor:
        """(n, V) float32, frames counted from the first training one."""
        begin = self.parts[scan][0]
        codes = self.store.read(scan, begin + first, begin + stop, step)
        a, b = self.store.normalizer(scan, self.kind)
        return torch.from_numpy(codes * a + b).float()


def _wide(values: Tensor, place: np.ndarray | Tensor, index: np.ndarray) -> Tensor:
    """(n, V) frames of the voxels at `place` on those at `index`, of which they are a part; 0 elsewhere."""
    out = torch.zeros(len(values), len(index))
    out[:, torch.from_numpy(np.searchsorted(index, np.asarray(place)))] = values
    return out


def union_of(frames: TrainingFrames, scans: Sequence[int], cells: int) -> np.ndarray:
    """Flat places, ascending, of the voxels that any of these scans has."""
    union = np.zeros(cells, bool)
    for scan in scans:
        union[frames.index(scan)] = True
    return np.flatnonzero(union)


def add_scans(sketch: Sketch, frames: TrainingFrames, scans: Sequence[int], index: np.ndarray, each: int) -> None:
    """Add up to `each` frames of each scan to a sketch over the voxels at `index`, evenly spaced."""
    for scan in scans:
        length = frames.parts[scan][1]
        step = max(length // each, 1)
        for at in range(0, min(length, step * each), step * BLOCK):
            stop = min(at + step * BLOCK, step * each, length)
            sketch.add(_wide(frames.read(scan, at, stop, step), frames.index(scan), index))


def _choice_masks(cfg: Config, clips: int) -> Tensor:
    """Masks like those in use, of clips that no training has: bool (clips, X, Y, Z, T)."""
    volume = (*cfg.data.grid, cfg.data.frames)
    unit = mask_unit(cfg.task, cfg.model)
    seed = cfg.seed ^ 0x5EED
    drawn = draw_mask(
        seed, torch.arange(clips), volume, cfg.model.patch_size, unit, cfg.task.mask_ratio, cfg.task.mask_kind
    )
    return mask_voxels(drawn, cfg.model.patch_size, volume)


def _fits_memory(name: str, voxels: int, notes: list[str]) -> bool:
    """Whether a sketch of so many voxels fits; a sentence in `notes` where it does not."""
    need = 3.0 * (KEEP + BLOCK) * voxels * 4
    have = 0.5 * psutil.virtual_memory().available
    if need <= have:
        return True
    notes.append(
        f"{name}: left out, it would need {need / 2**30:.1f} GiB of memory and {have / 2**30:.1f} GiB are free"
    )
    return False


def _fit_own(frames: TrainingFrames, scan: int, cfg: Config, notes: list[str], low_rank: bool) -> Fitted:
    """The models of one scan, from its training frames alone: the last quarter (at least a clip) chooses the rank."""
    index, length = frames.index(scan), frames.parts[scan][1]
    name = frames.store.scans[scan].scan_id
    span = cfg.data.frames
    held = min(max(span, length // 4), CHOICE_CLIPS * span)
    kernel = frames.read(scan, max(length - CHOICE_CLIPS * span, 0), length).T
    where = torch.from_numpy(index)
    local = LocalRidge.of([kernel], [where], cfg.data.grid)
    if not low_rank:
        return Fitted(index, None, local, None)
    if length - held < min(RANKS) + 1:
        raise UserError(
            f"{OWN}: left out, scan {name} has {length} training frames, of which {length - held} are left beside the "
            f"{held} that choose the rank: fewer than {min(RANKS)} components need"
        )
    sketch = Sketch(KEEP)
    begin = max(length - held - MOST_FRAMES, 0)
    for at in range(begin, length - held, BLOCK):
        sketch.add(frames.read(scan, at, min(at + BLOCK, length - held)))
    late = frames.read(scan, length - held, length).T
    masks = _choice_masks(cfg, -(-held // span)).flatten(1, 3)[:, where.long()]  # (clips, V, T)
    visible = ~torch.cat(list(masks), 1)[:, :held]
    rank, error = choose_rank(sketch, late, visible)
    notes.append(f"{OWN}: {name}: rank {rank} of {length} training frames (error {error:.4f} on the last {held})")
    before = sketch.fit(rank)
    rest = LocalRidge.of([late - before.project(late)], [where], cfg.data.grid)
    sketch.add(late.T)
    return Fitted(index, sketch.fit(rank), local, rest)


def _fit_subjects(frames: TrainingFrames, cfg: Config, notes: list[str], low_rank: bool) -> Fitted:
    """One model for all, from frames dealt evenly to the training scans; the last fifth of these chooses the rank."""
    scans = sorted(frames.parts)
    scans = scans[:: -(-len(scans) // MOST_FRAMES)]
    cut = max(len(scans) - max(len(scans) // 5, 1), 1)
    fitting, choosing = scans[:cut], scans[cut:] or scans[-1:]
    choosing = choosing[:: -(-len(choosing) // CHOICE_CLIPS)]
    span = cfg.data.frames
    clips = [frames.read(scan, 0, min(span, frames.parts[scan][1])).T for scan in choosing]
    places = [torch.from_numpy(frames.index(scan)) for scan in choosing]
    local = LocalRidge.of(clips, places, cfg.data.grid)
    index = union_of(frames, scans if low_rank else [], int(np.prod(cfg.data.grid)))
    if not low_rank or not _fits_memory(SUBJECTS, len(index), notes):
        return Fitted(index, None, local, None)
    each = max(MOST_FRAMES // len(scans), 1)
    sketch = Sketch(KEEP)
    add_scans(sketch, frames, fitting, index, each)
    late = torch.cat([_wide(clip.T, place, index) for clip, place in zip(clips, places)]).T
    masks = ~_choice_masks(cfg, len(choosing)).flatten(1, 3)[:, torch.from_numpy(index)]
    visible = torch.cat([mask[:, : clip.shape[1]] for mask, clip in zip(masks, clips)], 1)
    # What lies outside a scan's own brain is neither seen nor counted.
    inside = torch.cat([_inside(index, place, clip.shape[1]) for place, clip in zip(places, clips)], 1)
    rank, error = choose_rank(sketch, late, visible & inside, counted=~visible & inside)
    notes.append(
        f"{SUBJECTS}: rank {rank} of {sketch.frames} frames of {len(fitting)} scans (error {error:.4f} on others)"
    )
    before = sketch.fit(rank)
    left = [
        clip - _on_voxels(Fitted(index, before, local, None), place).project(clip) for clip, place in zip(clips, places)
    ]
    rest = LocalRidge.of(left, places, cfg.data.grid)
    if scans[cut:]:
        add_scans(sketch, frames, scans[cut:], index, each)
    return Fitted(index, sketch.fit(rank), local, rest)


def _inside(index: np.ndarray, place: Tensor, frames: int) -> Tensor:
    """Which of the voxels at `index` are at `place`: bool (V, n)."""
    return torch.from_numpy(np.isin(index, place.numpy()))[:, None].expand(-1, frames)


def fit_linear(data: ClipDataModule, cfg: Config, clips: int) -> LinearBaselines:
    """Fit what can be fitted; what cannot is named in `notes`.

    Args:
        data: Of the run, with its held-out clips.
        cfg: Of the run.
        clips: Held-out clips that will be predicted.
    """
    frames = TrainingFrames(data)
    # The first clips of validation's order, on however many ranks.
    first = next(iter(ValBatches(len(data.val_index), clips, 0, 1)))
    scored = np.array([clip for _, clip in first if clip != PADDING])
    held = np.unique(data.val_index.locate(scored)[0]).tolist()
    own = all(scan in frames.parts for scan in held)
    found = LinearBaselines(tuple(cfg.data.grid), OWN if own else SUBJECTS)
    every = {int(scan) for scan in data.val_index.scan}
    without = [scan for scan in frames.parts if scan not in every] if own else []
    if without:
        name = data.store.scans[without[0]].scan_id
        found.notes.append(f"{len(without)} scans without held-out frames count in no figure (the first: {name})")
    wide = True
    try:
        if own:
            most = max(data.store.scans[scan].voxels for scan in held)
            wide = _fits_memory(OWN, most * len(held), found.notes)
            found.models = {scan: _fit_own(frames, scan, cfg, found.notes, wide) for scan in held}
        else:
            found.models = {-1: _fit_subjects(frames, cfg, found.notes, True)}
            wide = found.models[-1].low_rank is not None
    except UserError as error:
        found.notes.append(str(error))
        wide = False
        if own:
            found.models = {scan: _fit_own(frames, scan, cfg, found.notes, False) for scan in held}
        else:
            found.models = {-1: _fit_subjects(frames, cfg, found.notes, False)}
    values = clips * cfg.data.frames * max(data.store.scans[scan].voxels for scan in held)
    local = values <= LOCAL_VALUES
    if not local:
        found.notes.append(
            f"{LOCAL}: left out, {clips} clips of {values // clips:,} values would take longer than ten minutes "
            "(trainer.val_batches limits the clips)"
        )
    found.names = [*([found.name] if wide else []), *([LOCAL] if local else [])]
    found.names += [found.name + BOTH] if wide and local else []
    return found

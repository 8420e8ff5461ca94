"""MapDataModule: clips with the map that is to be predicted from them, on the cells of `swift.data.task_maps.grid`.

Legend: K contrasts, V voxels and C cells of the brain, S subjects.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from swift.data.labels.targets import Labels
from swift.data.task_maps.grid import MapGrid
from swift.data.task_maps.store import MapStore, open_maps
from swift.data.task_module import TargetDataModule
from swift.utils.errors import UserError

log = logging.getLogger("swift.data")

COMMON = 0.9
"""A voxel counts if so large a part of the training subjects has a value there."""
ALIKE = 1e-6
"""Maps are alike that differ by no more than such a part of what their mean varies over the brain."""
LEAST_SUBJECTS = 2
"""Of each part: one subject has nobody to be told from."""
SHARED = 0.9
"""Below this part of the voxels a warning says that a part is judged on few of them."""


class MapDataModule(TargetDataModule):
    """The clips of a task of maps. Batches have target (B, K, C) float32: deviation from the training mean in units of
    the contrast's standard deviation; NaN where the subject has no value. And subject (B,) int64; -1 in padding.

    Args: as TargetDataModule.

    Attributes:
        maps, retest: Of all subjects; a second measurement if there is one.
        space: Voxels and cells that count: those that nearly all training subjects have.
        mean: (K, V) float32 mean of the training maps.
        std: (K,) root of the variance over training subjects, mean over cells.
        people: Subjects with a map, sorted; `subject` of a batch counts them.

    Raises:
        UserError: what TargetDataModule refuses; a part with one subject; training maps that are all alike; maps of a
            part that have no voxel in common; second maps of nobody who is judged.
    """

    def fit(self) -> None:
        """Mean and spread of the training maps, and every subject's deviation."""
        super().fit()
        task = self.task
        assert task.map_step is not None
        self.contrasts = self.maps.contrasts
        used = {part: self.subjects_of(part) for part in self.parts}
        for part, names in used.items():
            if len(names) < LEAST_SUBJECTS:
                raise UserError(
                    f"task={task.name}: the {part} part has {len(names)} subject with a map ({', '.join(names)}); at "
                    "least 2 are needed, or there is nobody to tell a map from: make another split"
                )
        self.space = MapGrid(self._common(used["train"]), task.map_step)
        self._check_judged({part: used[part] for part in ("val", "test")})
        train = [self.map_of(name) for name in used["train"]]
        self.mean = _mean(train)
        self.std = _spread(self.space.coarse(one - self.mean) for one in train)
        for contrast, std, own in zip(self.contrasts, self.std, self.mean, strict=True):
            if not std > ALIKE * np.std(own):
                raise UserError(f"task.target: all {len(train)} training maps of {contrast} are alike")
        self.people = sorted(set().union(*used.values()))
        number = {name: place for place, name in enumerate(self.people)}
        self._number = torch.tensor([number.get(scan.subject, -1) for scan in self.store.scans])
        # Differences are averaged over a cell, not maps: a voxel that one subject lacks must not look like one.
        table = [self.space.coarse(self.map_of(name) - self.mean) / self.std[:, None] for name in self.people]
        self._maps = torch.from_numpy(np.stack(table).astype(np.float32))

    def read_labels(self) -> Labels:
        """Which subjects have a map; one that cannot be used is left out by name, and why."""
        self.maps, self.retest = open_maps(self.store, self.target)
        maps = self.maps
        for reason in list(maps.failed.values())[:5]:
            log.warning("left out: %s", reason)
        if maps.failed:
            log.warning("%d subjects are left out, as their maps cannot be used", len(maps.failed))
        scans = self.store.scans
        values = [np.array(1.0 if scan.subject in maps.subjects else np.nan) for scan in scans]
        failed = {scan.scan_id: maps.failed[scan.subject] for scan in scans if scan.subject in maps.failed}
        return Labels("map", "subject", [], values, failed)

    def map_of(self, subject: str, store: MapStore | None = None) -> np.ndarray:
        """(K, V) float32 map of a subject at the voxels that count; NaN where it has no value."""
        placed = (store or self.maps).read(subject)
        whole = np.full((len(placed.values), int(np.prod(self.store.grid))), np.nan, np.float32)
        whole[:, placed.index] = placed.values
        return whole[:, self.space.voxels]

    def normalized(self, numbers: np.ndarray) -> np.ndarray:
        """(S, K, C) targets of subjects by their places in `people`."""
        return self._maps.cpu().numpy()[numbers]

    def _common(self, subjects: list[str]) -> np.ndarray:
        count = np.zeros(int(np.prod(self.store.grid)), np.int64)
        for subject in subjects:
            count[self.maps.read(subject).index] += 1
        brain = count >= COMMON * len(subjects)
        if not brain.any():
            raise UserError(f"task={self.task.name}: the training maps have no voxel in common")
        return brain.reshape(self.store.grid)

    def _check_judged(self, used: dict[str, list[str]]) -> None:
        """Warn of what shrinks a judgement, before anything is trained: voxels that one lacks, missing second maps."""
        for part, names in used.items():
            maps = {name: [self.map_of(name)] for name in names}
            if self.retest is not None:
                for name in set(names) & set(self.retest.subjects):
                    maps[name].append(self.map_of(name, self.retest))
            lacks = np.stack([~np.isfinite(np.concatenate(maps[name])).all(0) for name in names])
            share = float((~lacks.any(0)).mean())
            if share >= SHARED:
                continue
            alone = (lacks & (lacks.sum(0) == 1)).sum(1)  # voxels that all others have
            worst = max(range(len(names)), key=lambda place: (alone[place], lacks[place].sum()))
            said = (
                f"the maps of the {part} part share {share:.0%} of the {lacks.shape[1]} voxels, where alone they are "
                f"judged; {names[worst]} costs most and lacks {lacks[worst].mean():.0%}"
            )
            if share == 0:
                raise UserError(f"task={self.task.name}: {said}; leave it out, or mend its map")
            log.warning("%s", said)
        if self.retest is None:
            return
        again = {part: len(set(names) & set(self.retest.subjects)) for part, names in used.items()}
        if not sum(again.values()):
            raise UserError(
                f"task.target.retest={self.target.retest}: no subject of the val and test parts has a usable second map"
            )
        for part, count in again.items():
            if count < len(used[part]):
                log.warning("ceiling: %d of %d subjects of the %s part have a second map", count, len(used[part]), part)

    def describe(self) -> dict[str, Any]:
        """What a model of these maps must be given to make predictions of its outputs: plain values."""
        digest = hashlib.sha256(self.mean.tobytes() + self._maps.numpy().tobytes()).hexdigest()[:16]
        return {"contrasts": self.contrasts, "std": self.std.tolist(), "maps": digest}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, torch.Tensor]:
        """Packed to dense, with the maps."""
        if "codes" not in batch:
            return batch
        dense = super().on_after_batch_transfer(batch, dataloader_idx)
        device, valid = dense["scan"].device, dense["valid"]
        self._number, self._maps = self._number.to(device), self._maps.to(device)
        subject = torch.where(valid, self._number[dense["scan"].clamp(min=0)], -1)
        target = torch.where(valid[:, None, None], self._maps[subject.clamp(min=0)], torch.nan)
        return dense | {"target": target, "subject": subject}


def _mean(maps: list[np.ndarray]) -> np.ndarray:
    """(K, V) float32 mean over subjects of those with a value."""
    known = np.sum([np.isfinite(one) for one in maps], axis=0)
    total = np.sum([np.nan_to_num(one).astype(np.float64) for one in maps], axis=0)
    return np.asarray(total / known, np.float32)


def _spread(deviations: Iterable[np.ndarray]) -> np.ndarray:
    """(K,) float64 root of the mean over cells of the variance over subjects; of (K, C) deviations from their mean."""
    squares = [np.nanmean(one.astype(np.float64) ** 2, axis=1) for one in deviations]
    return np.asarray(np.sqrt(np.mean(squares, axis=0)))

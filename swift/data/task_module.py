"""TargetDataModule: clips with what is to be predicted from them; train, validation and test."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swift.config.schema import TaskConfig
from swift.config.schema_data import DataConfig
from swift.data.clips.dataset import ClipLoader
from swift.data.clips.index import ClipIndex, hold_out, whole_scans
from swift.data.clips.order import ValBatches
from swift.data.clips.subset import spend
from swift.data.labels.name_leak import id_leak
from swift.data.labels.splits import PARTS, audit, load_split
from swift.data.labels.targets import Labels, read_labels
from swift.data.module import ClipDataModule
from swift.utils.errors import BadScan, UserError

log = logging.getLogger("swift.data")


@dataclass(frozen=True)
class Scaling:
    """Of a regression: what the model sees is (label - mean) / std. Fitted on the training subjects alone."""

    mean: float = 0.0
    std: float = 1.0


class TargetDataModule(ClipDataModule):
    """The clips of a task with a target. Batches have one key more: target, (B,) or (B, T) float32, NaN: no label.

    Targets are places of classes, or numbers in the label's own unit.

    Args:
        data: Settings.
        task: With a target.
        store_path: Folder of the store.
        seed: Of the order of training samples.
        rank, world: As in ClipDataModule.

    Attributes:
        labels: Of all scans.
        parts: train, val, test -> clips.
        scaling: Of a regression.

    Raises:
        UserError: what `ClipDataModule` and `read_labels` refuse; no test part; a class that a part lacks; a constant
            target; labels that follow from the names of the subjects.
    """

    def __init__(
        self,
        data: DataConfig,
        task: TaskConfig,
        store_path: str | os.PathLike[str],
        seed: int,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        assert task.target is not None
        self.task, self.target = task, task.target
        super().__init__(data, store_path, seed, rank, world)
        frames = max(scan.frames for scan in self.store.scans) if self.labels.per == "frame" else 1
        table = np.full((len(self.store.scans), frames), np.nan, np.float32)
        for scan, value in enumerate(self.labels.values):
            table[scan, : value.size] = value
        self._table = torch.from_numpy(table)
        self.fit()

    # --------------------------------------------------------------------------------------------------- the parts
    def _clips(self) -> tuple[ClipIndex, ClipIndex]:
        data, scans = self.data, self.store.scans
        self.labels = self.read_labels()
        self.left_out = self.labels.failed | self.left_out
        self.parts = self._in_time() if data.split is None else self._by_subject()
        subjects = [scan.subject for scan in scans]
        self.parts["train"] = spend(self.parts["train"], subjects, data.max_subjects, data.max_frames, data.budget_seed)
        self._check_parts()
        self._check_names()
        return self.parts["train"], self.parts["val"]

    def read_labels(self) -> Labels:
        """The labels of all scans."""
        return read_labels(self.store, self.target)

    def _by_subject(self) -> dict[str, ClipIndex]:
        scans = self.store.scans
        split = load_split(str(self.data.split))
        self.split_hash = split.hash
        places = split.places([scan.subject for scan in scans])
        labelled = [scan for scan in self.used if len(self.labels.known(scan, 0, scans[scan].frames))]
        mine = {scan for part in PARTS for scan in places[part]} & set(self.used)
        without = {scans[scan].subject for scan in mine} - {scans[scan].subject for scan in labelled}
        if without:
            log.info("%d subjects of the split have no label and are left out: %s", len(without), _some(without))
        frames, names = [scan.frames for scan in scans], [scan.scan_id for scan in scans]
        apart = self.task.eval_stride or self.spec.span
        stride = {"train": self.spec.clip_stride, "val": apart, "test": apart}
        found = {}
        for part in PARTS:
            kept = sorted(set(places[part]) & set(labelled))
            if not kept:
                raise UserError(
                    f"data.split={self.data.split}: no subject of this store with a label is in its {part} part; a "
                    "task needs train, val and test (python -m swift.data split)"
                )
            found[part] = whole_scans(kept, frames, names, self.spec, stride[part])
        return found

    def _in_time(self) -> dict[str, ClipIndex]:
        if self.labels.per == "subject":
            raise UserError(
                f"task={self.task.name}: one label a subject needs data.split=FILE with train, val and test subjects "
                "(python -m swift.data split)"
            )
        rows: dict[str, list[tuple[int, int, int]]] = {part: [] for part in PARTS}
        labelled = [i for i in self.used if len(self.labels.known(i, 0, self.store.scans[i].frames))]
        failed: dict[str, BadScan] = {}
        for scan in labelled:
            info = self.store.scans[scan]
            try:
                cuts = cut_in_time(info.frames, self.spec.span, self.data, self.task.test_fraction, info.scan_id)
            except BadScan as error:
                failed[info.scan_id] = error
                continue
            for part, (first, length) in zip(PARTS, cuts, strict=True):
                if len(self.labels.known(scan, first, length)):
                    rows[part].append((scan, first, length))
        if failed:
            if len(failed) == len(labelled):
                raise next(iter(failed.values()))
            log.warning("%d of %d scans are left out, too short to be cut in time: %s", len(failed), len(labelled),
                        _some(set(failed)))  # fmt: skip
            self.left_out |= {name: str(error) for name, error in failed.items()}
        apart = self.task.eval_stride or self.spec.span
        found = {}
        for part in PARTS:
            columns: Sequence[Sequence[int]] = list(zip(*rows[part])) or [[], [], []]
            stride = self.spec.clip_stride if part == "train" else apart
            found[part] = ClipIndex(columns[0], columns[1], columns[2], self.spec.span, stride)
        return found

    def values_of(self, part: str) -> np.ndarray:
        """Labels of a part, (n,): one a subject, or one a labelled frame."""
        index, found, seen = self.parts[part], [], set()
        for scan, first, length in zip(index.scan.tolist(), index.first.tolist(), index.length.tolist(), strict=True):
            subject = self.store.scans[scan].subject
            if self.labels.per == "frame" or subject not in seen:
                found.append(self.labels.known(scan, first, length))
            seen.add(subject)
        return np.concatenate(found) if found else np.empty(0)

    def subjects_of(self, part: str) -> list[str]:
        """Subjects of a part, sorted."""
        return sorted({self.store.scans[scan].subject for scan in self.parts[part].scan.tolist()})

    def class_counts(self) -> np.ndarray:
        """(K,) how many training clips (per frame: labelled frames) each class has."""
        index, labels = self.parts["train"], self.labels
        counts = np.zeros(len(labels.classes), np.int64)
        clips = np.diff(index.ends, prepend=0)
        for row, scan in enumerate(index.scan.tolist()):
            known = labels.known(scan, int(index.first[row]), int(index.length[row])).astype(np.int64)
            weight = int(clips[row]) if labels.per == "subject" else 1
            counts += weight * np.bincount(known, minlength=len(counts))
        return counts

    def _check_parts(self) -> None:
        unit = "subject" if self.labels.per == "subject" else "frame"
        for part in PARTS:
            values = self.values_of(part)
            if not len(values):
                raise UserError(f"task={self.task.name}: no labelled {unit} in the {part} part")
            counts = {name: int((values == place).sum()) for place, name in enumerate(self.labels.classes)}
            missing = [name for name, count in counts.items() if not count]
            if missing:
                raise UserError(
                    f"task={self.task.name}: class {missing[0]!r} has no {unit} in the {part} part ({counts}): make "
                    "another split, or name other classes"
                )
            if self.task.select == "r" and part == "val" and (len(values) < 3 or np.ptp(values) == 0):
                raise UserError(
                    f"task.select=r: Pearson's r is undefined for the val part, {len(values)} {unit}s with labels from "
                    f"{values.min():g} to {values.max():g} (it needs three that differ): take task.select=mae, or "
                    "another split"
                )
            if self.labels.kind == "regression" and part == "train" and np.ptp(values) == 0:
                raise UserError(
                    f"task.target.column={self.target.column}: constant, {values[0]:g} for all {len(values)} training "
                    f"{unit}s: there is nothing to learn"
                )

    def _check_names(self) -> None:
        """Refuse labels that follow from the names of the subjects.

        Raises:
            UserError: how they do.
        """
        if self.labels.kind in ("regression", "map") or self.labels.per != "subject":
            return
        own: dict[str, str] = {}
        for part in PARTS:
            for scan in self.parts[part].scan.tolist():
                own[self.store.scans[scan].subject] = self.labels.classes[int(self.labels.values[scan])]
        found = id_leak(list(own), list(own.values()))
        if found and not self.task.allow_id_leak:
            raise UserError(
                f"task.target.column={self.target.column}: {found}: name and label leak into each other, as do site or "
                "scanner where they were handed out group by group; rename, or task.allow_id_leak=true"
            )
        if found:
            log.warning("task.allow_id_leak=true: %s", found)

    def check_seen(self, seen: Sequence[str] | None, source: str) -> None:
        """Refuse test subjects that the weights of init= have been trained on.

        Args:
            seen: Those subjects; None: not recorded.
            source: What init= named.

        Raises:
            UserError: names them.
        """
        if seen is None:
            log.warning(
                "init=%s does not say which subjects it was trained on: nobody can rule out test subjects", source
            )
            return
        self.seen_before = list(seen)
        if self.data.split is not None:
            said = audit(load_split(self.data.split), pretrained=seen)
        else:
            both = sorted(set(self.subjects_of("test")) & set(seen))
            said = [f"{len(both)} test subjects were in pre-training: {_some(both)}"] if both else []
        if said and not self.task.allow_seen:
            raise UserError(f"init={source}: {said[0].rstrip('.')}; take other weights, or task.allow_seen=true")
        for line in said:
            log.warning("task.allow_seen=true: %s", line)

    def fit(self) -> None:
        """What follows from the labels of the training subjects alone: the scaling of a regression."""
        self.scaling = Scaling()
        if self.labels.kind == "regression":
            values = self.values_of("train")
            self.scaling = Scaling(float(values.mean()), float(values.std()))

    # ----------------------------------------------------------------------------------------------------- loaders
    def indices(self) -> tuple[ClipIndex, ...]:
        """Everything that will be read."""
        return tuple(self.parts.values())

    def test_dataloader(self) -> ClipLoader:
        """Every test clip once."""
        rank, world = self._place()
        index = self.parts["test"]
        return self._loader(index, ValBatches(len(index), self.data.batch_size, rank, world), False)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, torch.Tensor]:
        """Packed to dense, with the targets."""
        if "codes" not in batch:
            return batch
        dense = super().on_after_batch_transfer(batch, dataloader_idx)
        self._table = self._table.to(dense["scan"].device)
        rows = self._table[dense["scan"].clamp(min=0)]
        if self.labels.per == "frame":
            steps = torch.arange(self.spec.frames, device=rows.device) * self.spec.frame_stride
            rows = rows.gather(1, dense["start"].clamp(min=0)[:, None] + steps)
        else:
            rows = rows[:, 0]
        valid = dense["valid"].view(-1, *[1] * (rows.ndim - 1))
        return dense | {"target": torch.where(valid, rows, torch.nan)}


def _some(names: Sequence[str] | set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def cut_in_time(frames: int, span: int, data: DataConfig, test_fraction: float, name: str) -> list[tuple[int, int]]:
    """Cut a scan into training, validation and test: (first frame, number of frames) of each, gaps between them.

    Args:
        frames: Of the scan.
        span: Frames that a clip reaches over.
        data: val_fraction of what is not tested validates; val_gap frames are left out between the parts.
        test_fraction: Last part of the scan.
        name: Of the scan, for the message.

    Raises:
        BadScan: too short for a clip in each part.
    """
    test = frames - round(frames * test_fraction)
    train, val = hold_out(test - data.val_gap, span, data.val_fraction, data.val_gap)
    if frames - test < span or train < span or val == test - data.val_gap:
        raise BadScan(
            f"scan {name}: {frames} frames cannot be cut into training, validation and test with a clip of {span} in "
            f"each and gaps of {data.val_gap}; lower data.frames or data.val_gap, change task.test_fraction, or split "
            "by subject (data.split=FILE)"
        )
    return [(0, train), (val, test - data.val_gap - val), (test, frames - test)]


def class_weights(task: TaskConfig, counts: np.ndarray) -> np.ndarray:
    """(K,) weight of each class in the loss: N / (K n) with task.balance, times task.class_weights."""
    weights = np.ones(len(counts))
    if task.balance:
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return weights * np.asarray(task.class_weights or 1.0)

"""A swift store for Brainmarks: one sample a person, with swift's split by subject and a task's classes.

Brainmarks draws 100 random splits over rows. So that these never part the scans of one person, each person has one row:
the first scan of each subject, and of subjects that may be one person, or are of one family, the first subject. The
registration is in brainmarks/datasets/swift_store.py; this file needs nothing of Brainmarks.

Legend: T frames, V voxels of the space.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from swift.config.compose import composed
from swift.config.schema import TargetConfig
from swift.data.clips.mixture import Stores
from swift.data.ingest.place import GridPlan, Sampler
from swift.data.labels.columns import listed
from swift.data.labels.splits import PARTS, audit, load_split, make_split
from swift.data.labels.subjects import people_of, same_person
from swift.data.labels.targets import read_labels
from swift.data.store.reader import Store
from swift.data.store.spaces import OWN
from swift.inference.brainmarks_model import AFFINE, GRID
from swift.utils.errors import UserError

log = logging.getLogger("swift.brainmarks")

NAMES = {"train": "train", "val": "validation", "test": "test"}
"""swift's parts of a split -> Brainmarks'."""
SMALLEST_STD = 1e-6
"""Voxels that change less are 0, as in brainmarks.nisc.scale."""


@dataclass(frozen=True)
class Space:
    """What a model is given of a scan on the template's grid of 2 mm.

    Attributes:
        mask: (Z, Y, X) bool, the voxels in the order of a sample.
        reduce: (T, voxels of the mask) -> (T, V), such as means of parcels; None: the voxels themselves.
    """

    mask: np.ndarray
    reduce: Callable[[np.ndarray], np.ndarray] | None = None


def scan_in_space(store: Store, place: int, frames: int, space: Space) -> dict[str, Any]:
    """A scan as Brainmarks stores it: resampled (trilinear) to the template at 2 mm, z-scored over time.

    Args:
        store: Of scans in a template's box.
        place: Of the scan.
        frames: The first so many are taken.
        space: What is taken of each volume; voxels without data are 0.

    Returns:
        bold (T, V), mean and std (1, V) float32 tensors, tr in seconds.
    """
    mask, values = store.mask(place), store.values(place, 0, frames)
    to_source = np.round(np.linalg.inv(store.affine(place)) @ AFFINE, 7)
    sampler = Sampler(GridPlan(GRID, 2.0, AFFINE, to_source, 0.0), mask, mask, store.scans[place].scan_id)
    place_of = np.full(GRID, -1, np.int64)  # of a voxel in the sample
    place_of.T[space.mask] = np.arange(int(space.mask.sum()))
    places = place_of[sampler.mask]
    there = places >= 0
    volume, voxels = np.zeros(store.grid, np.float32), np.zeros((len(values), int(space.mask.sum())), np.float64)
    for frame, row in enumerate(values):
        volume[mask] = row
        voxels[frame, places[there]] = sampler(volume)[there]
    bold = voxels if space.reduce is None else space.reduce(voxels)
    mean, std = bold.mean(0, keepdims=True), bold.std(0, keepdims=True)
    still = std <= SMALLEST_STD
    mean[still] = std[still] = 0
    scaled = np.where(still, 0, bold - mean) / np.where(still, 1, std)
    found = {name: torch.from_numpy(one.astype(np.float32)) for name, one in (("bold", scaled), ("mean", mean))}
    return found | {"std": torch.from_numpy(std.astype(np.float32)), "tr": store.scans[place].tr}


@dataclass(eq=False)
class StoreRows(Dataset[dict[str, Any]]):
    """One part of a split, with the interface of brainmarks.datasets.base.HFDataset.

    Attributes:
        store, places: The scans, one a person.
        frames: Taken of each.
        space: See `scan_in_space`.
        classes: Names of the classes of the task.
        target_ids: Class of each row.
    """

    store: Store
    places: list[int]
    frames: int
    space: Space
    classes: list[str]
    target_ids: np.ndarray
    transforms: list[Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=list)

    @property
    def labels(self) -> np.ndarray:
        """Names of the classes."""
        return np.asarray(self.classes)

    @property
    def targets(self) -> np.ndarray:
        """Name of the class of each row."""
        return self.labels[self.target_ids]

    @property
    def num_classes(self) -> int:
        """Of the task."""
        return len(self.classes)

    @property
    def label_counts(self) -> np.ndarray:
        """Rows of each class."""
        return np.bincount(self.target_ids, minlength=len(self.classes))

    def compose(self, transform: Callable[[dict[str, Any]], dict[str, Any]]) -> StoreRows:
        """Add a model's transform of samples."""
        self.transforms.append(transform)
        return self

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = scan_in_space(self.store, self.places[index], self.frames, self.space)
        sample["target"] = self.target_ids[index]
        for transform in self.transforms:
            sample = transform(sample)
        return sample

    def __repr__(self) -> str:
        counts = dict(zip(self.classes, self.label_counts.tolist()))
        return f"StoreRows({self.store.path}, {len(self)} persons, {self.frames} frames each, {counts})"


def target_of(task: str, store: Path, config_dir: str | None) -> TargetConfig:
    """The target of a task's YAML file.

    Raises:
        UserError: no such task, or no classification of subjects.
    """
    folder = Path(config_dir) if config_dir else None
    target = composed([f"task={task}", "data=store", f"data.path={store}"], folder, model=False)[0].task.target
    if target is None or target.kind not in ("binary", "multiclass") or target.per != "subject":
        kind = "no target" if target is None else f"kind={target.kind}, per={target.per}"
        raise UserError(f"task={task} ({kind}): Brainmarks judges classes of subjects only (binary, multiclass)")
    return target


def store_rows(
    space: Space,
    store: str | None = None,
    task: str | None = None,
    split: str | None = None,
    frames: int | None = None,
    family: str | None = None,
    config_dir: str | None = None,
    val: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
) -> dict[str, StoreRows]:
    """train, validation and test, of Brainmarks' `dataset_kwargs`.

    Args:
        space: See `scan_in_space`.
        store: A store of scans in a template space.
        task: A task of conf/task: a classification of subjects.
        split: File of `python -m swift.data split` (FILE or FILE:NUMBER); None: made here, alike in class and site.
        frames: The first so many frames of every scan; None: as many as the shortest has.
        family: Phenotype column of families, of whom one person has a row.
        config_dir: Folder with YAML files of one's own.
        val, test, seed: Of a split that is made here.

    Raises:
        UserError: something missing, a store without template space, no classification, a part without rows.
    """
    if store is None or task is None:
        raise UserError(
            "swift_store needs a store and a task: --overrides dataset_kwargs.store=STORE dataset_kwargs.task=sex"
        )
    opened = Store(Path(store).expanduser())
    if opened.placement == OWN:
        raise UserError(
            f"{opened.path}: its scans are not in a template space (each on its own brain): no place in MNI"
        )
    target = target_of(task, opened.path, config_dir)
    labels = read_labels(Stores([opened.path]), target)
    first: dict[str, int] = {}
    for place, scan in enumerate(opened.scans):
        first.setdefault(scan.subject, place)
    people = people_of(opened.scans, target.column, family, False, _one_person(opened))
    parts = load_split(split) if split else make_split(people, val, test, seed)
    audit(parts, people)
    home: dict[str, str] = {}
    for person in people:  # sorted by subject
        home.setdefault(person.family or person.subject, person.subject)
    kept = {subject for subject in home.values() if np.isfinite(labels.values[first[subject]]).all()}
    places = {
        part: [first[subject] for subject in parts.parts[part] if subject in kept and subject in first]
        for part in PARTS
    }
    _say_left_out(opened, first, home, kept)
    for part, some in places.items():
        if not some:
            raise UserError(f"{split or 'the split'}: part {part} has no subject with a label in {opened.path}")
    count = _frames([opened.scans[place].frames for some in places.values() for place in some], frames)
    return {
        NAMES[part]: StoreRows(
            opened, some, count, space, labels.classes, np.array([int(labels.values[place]) for place in some])
        )
        for part, some in places.items()
    }


def _one_person(store: Store) -> list[set[str]]:
    """Groups of subjects that may be one person: the same file, or two spellings of a name."""
    sources: dict[str, set[str]] = {}
    for place, scan in enumerate(store.scans):
        sources.setdefault(str(store.attributes(place)["source_sha256"]), set()).add(scan.subject)
    groups = same_person({scan.subject for scan in store.scans}, sources)
    return [group for some in groups.values() for group in some]


def _say_left_out(store: Store, first: dict[str, int], home: dict[str, str], kept: set[str]) -> None:
    """Say which scans have no row, and why."""
    counts = {
        "further scans of a subject": [s.scan_id for p, s in enumerate(store.scans) if first[s.subject] != p],
        "subjects of a family or person that has a row": sorted(set(first) - set(home.values())),
        "subjects without a label": sorted(set(home.values()) - kept),
    }
    for why, names in counts.items():
        if names:
            log.warning("left out, %d %s: %s", len(names), why, listed(names))


def _frames(there: Sequence[int], wanted: int | None) -> int:
    """How many frames of each scan are taken."""
    if wanted is not None and not 2 <= wanted <= min(there):
        raise UserError(f"frames={wanted}: the scans have {min(there)} to {max(there)}; legal is 2 to {min(there)}")
    if wanted is None and min(there) < max(there):
        log.warning("scans have %d to %d frames: the first %d of each are taken", min(there), max(there), min(there))
    return wanted or min(there)

"""A synthetic cohort small enough for tests of tasks: 24 subjects of 24 frames on a 12^3 grid, and a split of it."""

from __future__ import annotations

from pathlib import Path

from swift.data.clips.mixture import Stores
from swift.data.labels.splits import make_split, save_splits
from swift.data.labels.subjects import people_of
from swift.data.synthetic import CohortSpec, write_store
from tests.small import GRID, command

SPEC = CohortSpec(n_subjects=24, frames=24, grid=GRID, spacing=4.0, seed=3, sites=2, drift=0.0, motion=0.0)


def cohort(folder: Path) -> Path:
    """Store and split.json in `folder`: 12 train, 6 validate, 6 test."""
    write_store(SPEC, folder / "store")
    people = people_of(Stores([folder / "store"]).scans, label="label_binary")
    save_splits(folder / "split.json", [make_split(people, 0.25, 0.25, 0)])
    return folder


def task_command(folder: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The overrides of a small run of a task on the cohort."""
    own = [f"data.split={folder / 'split.json'}", "data.batch_size=4", "trainer.figures=false", *overrides]
    return command(folder / "store", run_dir, *own)

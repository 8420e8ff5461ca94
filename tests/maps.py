"""The small cohort of `tests.cohort` with planted maps of tasks, and ways to spoil one."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from swift.config.schema import Config
from swift.data.synthetic.task_maps import CONTRASTS, write_task_maps
from swift.data.task_maps.module import MapDataModule
from tests.cohort import SPEC, cohort, task_command
from tests.small import composed

MAPS = ["task=task_map", "task.map_step=2"]


def map_cohort(folder: Path) -> Path:
    """Store, split.json, maps and retest in `folder`."""
    cohort(folder)
    return write_task_maps(SPEC, folder)


def map_command(folder: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The overrides of a small run on the map `coupling`."""
    own = [*MAPS, f"task.target.maps={folder / 'maps'}", "task.target.contrasts=[coupling]", *overrides]
    return task_command(folder, run_dir, *own)


def map_settings(folder: Path, *overrides: str) -> Config:
    """Typed settings of such a run."""
    from swift.config.compose import typed

    return typed(composed(*map_command(folder, folder / "nowhere", *overrides)))


def map_data(folder: Path, *overrides: str) -> MapDataModule:
    """Their data."""
    cfg = map_settings(folder, *overrides)
    return MapDataModule(cfg.data, cfg.task, folder / "store", 0)


def map_file(folder: Path, subject: int, contrast: str = CONTRASTS[0]) -> Path:
    """File of subject number `subject`."""
    (path,) = (folder / "maps").glob(f"sub-{subject:04d}_*contrast-{contrast}_*")
    return path


def rewrite(path: Path, values: np.ndarray, affine: np.ndarray | None = None, code: int = 4) -> None:
    """Put other values into a map's file."""
    affine = nib.load(path).affine if affine is None else affine
    image = nib.Nifti1Image(values.astype(np.float32), affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    nib.save(image, path)

"""Judging predicted maps: clips averaged to subjects, figures of a validation, the files and the summary of a run.

Shapes: S subjects, K contrasts, V voxels and C cells of the brain, D numbers that are averaged over clips.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from swift.data.ingest.nifti import as_stored
from swift.data.ingest.place import GridPlan, Sampler
from swift.data.store import format as fmt
from swift.data.store.spaces import box_affine
from swift.data.task_maps.module import MapDataModule
from swift.evaluate.map_scores import MapPredictions, judge_contrast, judged, table_of
from swift.utils.errors import UserError


class SubjectMeans:
    """Sums over the clips of each subject; never more than one row a subject, however many clips it has."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[np.ndarray, int]] = {}

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Clips: subject (b,), scores (b, D)."""
        for subject, scores in zip(rows["subject"].tolist(), rows["scores"], strict=True):
            total, clips = self._sums.get(subject, (np.zeros(scores.shape), 0))
            # In float64 sums of float32 numbers are exact but for the rarest, so that ranks hardly show.
            self._sums[subject] = total + scores, clips + 1

    def gathered(self) -> tuple[np.ndarray, np.ndarray]:
        """(S,) subjects, ascending, and (S, D) float64 means over the clips of all ranks; they call it together."""
        parts: list[Any] = [self._sums]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self._sums)
        subjects = sorted({subject for part in parts for subject in part})
        if not subjects:
            raise UserError("task.target.kind=map: no clip of a part holds a brain voxel: nobody to predict a map of")
        means = []
        for subject in subjects:
            found = [part[subject] for part in parts if subject in part]
            means.append(sum(total for total, _ in found) / sum(clips for _, clips in found))
        return np.array(subjects), np.stack(means)


def map_figures(data: MapDataModule) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """What a validation logs: mean squared error, and scores on the cells, by which a checkpoint may be chosen."""

    def figures_of(subjects: np.ndarray, maps: np.ndarray) -> dict[str, float]:
        truth = data.normalized(subjects)
        error = np.nanmean((maps - truth) ** 2, axis=(1, 2))
        known = np.isfinite(truth).all((0, 1))
        found = {"loss": float(error.mean())}
        zero = np.zeros(int(known.sum()))
        # Deviations from the training mean: their correlation is the residual r.
        each = [judge_contrast(truth[:, k, known], maps[:, k, known], zero) for k in range(truth.shape[1])]
        for name in ("residual_r", "identification"):
            found[name] = float(np.mean([one.values[name] for one in each]))
        return found

    return figures_of


def in_units(data: MapDataModule, maps: np.ndarray) -> np.ndarray:
    """(S, K, C) normalized deviations on cells -> (S, K, V) maps in their own unit."""
    return np.stack([data.mean + data.std[:, None] * data.space.fine(one) for one in maps]).astype(np.float32)


def predictions_of(data: MapDataModule, names: list[str], predicted: np.ndarray) -> MapPredictions:
    """(S, K, V) predicted maps in their own unit, with the true ones.

    Raises:
        UserError: what MapPredictions refuses.
    """
    truth = np.stack([data.map_of(name) for name in names])
    retest = None
    if data.retest is not None:
        nothing = np.full_like(truth[0], np.nan)
        known = data.retest.subjects
        retest = np.stack([data.map_of(name, data.retest) if name in known else nothing for name in names])
    return MapPredictions.shared(names, data.contrasts, truth, predicted, data.mean, retest)


def write_maps(data: MapDataModule, names: list[str], predicted: np.ndarray, folder: Path) -> None:
    """Write SUBJECT_contrast-NAME_map.nii.gz of (S, K, V) maps, on the grid and in the voxel order of each subject's
    own map; NaN outside.

    Raises:
        UserError: a file cannot be written.
    """
    grid = data.store.grid
    x, y, z = grid
    brain = np.zeros(x * y * z, bool)
    brain[data.space.voxels] = True
    brain = brain.reshape(grid)
    here = box_affine(data.store.placements[0], grid, data.store.spacing)
    folder.mkdir(parents=True, exist_ok=True)
    for name, maps in zip(names, predicted, strict=True):
        placed = data.maps.read(name)
        to_source = np.round(np.linalg.inv(here) @ placed.affine, 7)
        a, b, c = placed.shape
        plan = GridPlan((a, b, c), data.store.spacing, placed.affine, to_source, 0.0)
        sampler = Sampler(plan, brain, brain, name)
        for contrast, values in zip(data.contrasts, maps, strict=True):
            dense = np.zeros(brain.size, np.float32)
            dense[data.space.voxels] = values
            out = np.full(placed.shape, np.nan, np.float32)
            out[sampler.mask] = sampler(dense.reshape(grid))
            stored, affine = as_stored(out, placed.affine, placed.ornt)
            image = nib.Nifti1Image(stored, affine)
            image.set_sform(affine, code=4)
            image.set_qform(affine, code=4)
            with fmt.atomic(folder / f"{name}_contrast-{contrast}_map.nii.gz") as temp:
                temp.write_bytes(_zipped(image))


def _zipped(image: nib.Nifti1Image) -> bytes:
    import gzip

    return gzip.compress(image.to_bytes(), mtime=0)


def leave(data: MapDataModule, names: list[str], predicted: np.ndarray, maps: MapPredictions, folder: Path) -> None:
    """What a judged test part leaves in a run's folder: predictions/test.csv, predictions/maps, figures/maps.npz.

    Args:
        data: Of the run.
        names: Subjects.
        predicted: (S, K, V) at all voxels of data.space.
        maps: The same where all have a value.
        folder: Of the run.
    """
    one, each = judged(maps)
    table_of(maps, one).save(folder / "predictions" / "test.csv")
    write_maps(data, names, predicted, folder / "predictions" / "maps")
    shown = each[data.contrasts[0]]  # the figure is of one contrast: its maps, its scores
    order = np.argsort(-shown.values["residual_r"], kind="stable")
    chosen = [int(order[0]), int(order[len(order) // 2]), int(order[-1])]
    dense = np.full((3, len(chosen), int(np.prod(data.store.grid))), np.nan, np.float32)
    dense[0][:, data.space.voxels] = np.stack([data.map_of(names[place])[0] for place in chosen])
    dense[1][:, data.space.voxels] = predicted[chosen, 0]
    dense[2][:, data.space.voxels] = data.mean[0]
    path = folder / "figures" / "maps.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        truth=dense[0].reshape(-1, *data.store.grid),
        predicted=dense[1].reshape(-1, *data.store.grid),
        mean=dense[2].reshape(-1, *data.store.grid)[0],
        residual_r=shown.values["residual_r"][chosen],
        subjects=np.array([names[place] for place in chosen]),
        contrast=np.array(data.contrasts[0]),
        raw=shown.raw,
        residual=shown.residual,
    )

"""Small scans with real affines, made by nibabel alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

SHAPE = (16, 20, 14)
SPACING = 4.0  # a brain of 64 ml: ingestion takes less for no head
AFFINE = np.array([[4.0, 0, 0, -30.0], [0, 4.0, 0, -54.0], [0, 0, 4.0, -21.0], [0, 0, 0, 1]])


def ellipsoid(shape: tuple[int, ...] = SHAPE, part: float = 0.8) -> np.ndarray:
    """(X, Y, Z) bool: a brain's stand-in around the middle of the box."""
    places = np.indices(shape).reshape(3, -1).T
    half = (np.asarray(shape) - 1) / 2
    return ((((places - half) / (part * half)) ** 2).sum(axis=1) <= 1).reshape(shape)


def bold(frames: int = 8, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """(X, Y, Z, T) float32: 1000 in the brain, 20 outside, noise of 10 and 5."""
    rng = np.random.default_rng(seed)
    brain = ellipsoid(shape)[..., None]
    noise = rng.normal(size=(*shape, frames))
    return np.where(brain, 1000 + 10 * noise, 20 + 5 * np.abs(noise)).astype(np.float32)


def save(
    path: Path,
    data: np.ndarray,
    affine: np.ndarray = AFFINE,
    codes: str = "RAS",
    tr: float | None = 2.0,
    dtype: type = np.float32,
) -> Path:
    """Write data that are in RAS+ order to a file whose voxel order is `codes`."""
    image = nib.Nifti1Image(data.astype(dtype), affine)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes)))
    image = image.as_reoriented(turn)
    image.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4 and tr is not None:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def patch(path: Path, **fields: Any) -> Path:
    """Overwrite header fields of an uncompressed file, whatever their sense."""
    raw = path.read_bytes()
    header = nib.Nifti1Header(raw[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + raw[348:])
    return path


def set_place(path: Path, field: str, place: int, value: float) -> Path:
    """Overwrite one element of an array field of the header."""
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    array = header[field].copy()
    array[place] = value
    return patch(path, **{field: array})


def dataset(root: Path, subjects: int = 2, frames: int = 8, tr: float = 2.0) -> Path:
    """A little fMRIPrep derivatives folder: masks, sidecars, confounds, participants.tsv."""
    space = "space-MNI152NLin2009cAsym_res-2"
    people = ["participant_id\tsex\tage\tsite"]
    for number in range(1, subjects + 1):
        name = f"sub-{number:02d}_ses-1_task-rest_run-{number}"
        folder = root / f"sub-{number:02d}" / "ses-1" / "func"
        save(folder / f"{name}_{space}_desc-preproc_bold.nii.gz", bold(frames, seed=number), tr=0)
        save(folder / f"{name}_{space}_desc-brain_mask.nii.gz", ellipsoid(), dtype=np.uint8)
        (folder / f"{name}_{space}_desc-preproc_bold.json").write_text(json.dumps({"RepetitionTime": tr}))
        lines = ["trans_x\tcsf_derivative1", *(f"{t / 10}\t{'n/a' if t == 0 else t}" for t in range(frames))]
        (folder / f"{name}_desc-confounds_timeseries.tsv").write_text("\n".join(lines) + "\n")
        people.append(f"sub-{number:02d}\t{'M' if number % 2 else 'F'}\tn/a\tA")
    (root / "participants.tsv").write_text("\n".join(people) + "\n")
    (root / "dataset_description.json").write_text(json.dumps({"Name": "t", "BIDSVersion": "1.9.0"}))
    return root

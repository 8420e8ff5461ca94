"""A cohort on disk: BIDS derivatives or a store, with the truth beside it, and the cached cohort for pre-training.

The truth, in `truth/` of either folder (none of it is part of BIDS or of the store):
  spec.json       the CohortSpec
  subjects.csv    demographics, labels and the latents that carry the effects
  space.npz       affine; mask (X, Y, Z); maps (K, X, Y, Z) float16; region_NAME (X, Y, Z) bool for every planted region
  SCAN_ID.npz     courses (T, K), coupling (K, K), motion (T, 6), framewise_displacement, valence, valence_bold (T,)
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from swift.config.schema_data import DataConfig
from swift.data.store.spaces import placement_of
from swift.data.synthetic.labels import Person, cohort_table, person, phenotypes
from swift.data.synthetic.maps import SPACE, geometry
from swift.data.synthetic.scan import MOTION_COLUMNS, SyntheticScan, make_subject
from swift.data.synthetic.spec import RECIPE, CohortSpec
from swift.utils.cache import cache_dir, check_revision
from swift.utils.errors import UserError

Progress = Callable[[SyntheticScan], None]


def scan_id(spec: CohortSpec, who: Person, run: int) -> str:
    """sub-0001_task-rest, with _run-1 where a subject has several."""
    return f"sub-{who.subject}_task-{spec.task}" + (f"_run-{run + 1}" if spec.runs > 1 else "")


def _scans(spec: CohortSpec) -> Iterator[SyntheticScan]:
    """All scans of a cohort, one in memory at a time."""
    for subject in range(spec.n_subjects):
        for run in range(spec.runs):
            yield make_subject(spec, subject, run)


def _new_folder(folder: Path) -> Path:
    """Makes an empty folder. Raises UserError if it holds something or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: not empty; a synthetic cohort goes into a new or empty folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def _table(path: Path, rows: list[dict[str, Any]], delimiter: str = "\t") -> None:
    """Writes rows of equal keys; None becomes n/a (BIDS)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "n/a" if v is None else v for k, v in row.items()} for row in rows)


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_cohort_truth(spec: CohortSpec, folder: Path) -> Path:
    """Makes `truth/` with what does not belong to one scan."""
    truth = folder / "truth"
    truth.mkdir()
    (truth / "spec.json").write_text(spec.to_json() + "\n", encoding="utf-8")
    _table(truth / "subjects.csv", cohort_table(spec), ",")
    shared = geometry(spec)
    regions = {f"region_{name}": mask for name, mask in shared.regions().items()}
    arrays = {
        "affine": shared.affine,
        "mask": shared.mask,
        "maps": shared.maps.astype(np.float16),
        **regions,
    }
    np.savez_compressed(truth / "space.npz", allow_pickle=False, **arrays)
    return truth


def _write_scan_truth(spec: CohortSpec, scan: SyntheticScan, truth: Path) -> None:
    np.savez(
        truth / f"{scan_id(spec, scan.person, scan.run)}.npz",
        courses=scan.courses,
        coupling=scan.coupling,
        motion=scan.motion,
        framewise_displacement=scan.framewise_displacement,
        valence=scan.task.valence,
        valence_bold=scan.task.valence_bold,
    )


def load_truth(folder: Path | str) -> dict[str, Any]:
    """Reads the truth of a cohort made by `write_bids` or `write_store`.

    Returns:
        `spec` (CohortSpec), `subjects` (list of dicts of text), `space` and `scans[SCAN_ID]` (dicts of arrays, see the
        module).

    Raises:
        UserError: no truth in this folder.

    """
    truth = Path(folder) / "truth"
    if not (truth / "spec.json").is_file():
        raise UserError(f"{folder}: no truth/spec.json; truth lies only in folders made by `swift.data synthetic`")

    def arrays(path: Path) -> dict[str, np.ndarray]:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    with (truth / "subjects.csv").open(newline="", encoding="utf-8") as file:
        subjects = list(csv.DictReader(file))
    return {
        "spec": CohortSpec.from_json((truth / "spec.json").read_text(encoding="utf-8")),
        "subjects": subjects,
        "space": arrays(truth / "space.npz"),
        "scans": {path.stem: arrays(path) for path in sorted(truth.glob("sub-*.npz"))},
    }


def _confounds(scan: SyntheticScan) -> list[dict[str, Any]]:
    """The columns of fMRIPrep; the first framewise displacement is not defined."""
    whole = scan.bold.mean(1)
    rows = []
    for t, (moved, fd) in enumerate(zip(scan.motion, scan.framewise_displacement)):
        row: dict[str, Any] = {name: f"{value:.6g}" for name, value in zip(MOTION_COLUMNS, moved)}
        row["framewise_displacement"] = f"{fd:.6g}" if t else None
        row["global_signal"] = f"{whole[t]:.6g}"
        rows.append(row)
    return rows


def _image(values: np.ndarray, scan: SyntheticScan, dtype: type) -> nib.Nifti1Image:
    image = nib.Nifti1Image(values, scan.affine, dtype=dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(scan.affine, code=4)  # 4: MNI152
    image.set_qform(scan.affine, code=4)
    return image


def _events(scan: SyntheticScan) -> str:
    """events.tsv: the scenes of the film with their valence."""
    rows = zip(scan.task.onset, scan.task.duration, scan.task.value)
    lines = [f"{onset:.2f}\t{duration:.2f}\tscene\t{valence:.3f}" for onset, duration, valence in rows]
    return "\n".join(["onset\tduration\ttrial_type\tvalence", *lines]) + "\n"


def _write_bids_scan(spec: CohortSpec, scan: SyntheticScan, folder: Path) -> None:
    """Writes the six files of one run into sub-NUMBER/func."""
    name = scan_id(spec, scan.person, scan.run)
    func = folder / f"sub-{scan.person.subject}" / "func"
    func.mkdir(parents=True, exist_ok=True)
    # int16 without scaling: the mean is about 10,000, so rounding costs 0.003 %, far below the noise.
    packed = np.clip(np.rint(scan.bold), 0, 32767).astype(np.int16)
    volume = np.zeros((len(packed), scan.mask.size), np.int16)
    volume[:, np.flatnonzero(scan.mask)] = packed
    bold = _image(np.moveaxis(volume.reshape(-1, *scan.mask.shape), 0, -1), scan, np.int16)
    bold.header.set_zooms((*bold.header.get_zooms()[:3], scan.tr))
    nib.save(bold, func / f"{name}_space-{SPACE}_desc-preproc_bold.nii.gz")
    _json(
        func / f"{name}_space-{SPACE}_desc-preproc_bold.json",
        {
            "RepetitionTime": scan.tr,
            "TaskName": spec.task,
            "SkullStripped": True,
            "SliceTimingCorrected": False,
        },
    )
    mask = _image(scan.mask.astype(np.uint8), scan, np.uint8)
    nib.save(mask, func / f"{name}_space-{SPACE}_desc-brain_mask.nii.gz")
    _table(func / f"{name}_desc-confounds_timeseries.tsv", _confounds(scan))
    (func / f"{name}_events.tsv").write_text(_events(scan), encoding="utf-8")
    _json(
        func / f"{name}_events.json",
        {"valence": {"Description": "Rating of the scene, -1 (bad) to 1 (good)"}},
    )


def write_bids(spec: CohortSpec, folder: Path | str, progress: Progress | None = None) -> Path:
    """Writes a cohort as fMRIPrep derivatives in BIDS layout, with `truth/` beside the subjects.

    Args:
        spec: the cohort.
        folder: new or empty.
        progress: called after each scan.

    Raises:
        UserError: the folder holds something or cannot be written.

    """
    folder = _new_folder(Path(folder))
    _json(
        folder / "dataset_description.json",
        {
            "Name": "Synthetic BOLD cohort with planted effects",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "License": "CC0",
            "GeneratedBy": [{"Name": "swift.data.synthetic", "Version": str(RECIPE)}],
        },
    )
    (folder / ".bidsignore").write_text("truth/\n", encoding="utf-8")
    people = [person(spec, i) for i in range(spec.n_subjects)]
    _table(
        folder / "participants.tsv",
        [{"participant_id": f"sub-{who.subject}", **phenotypes(who)} for who in people],
    )
    _json(
        folder / "participants.json",
        {
            "age": {"Description": "Age", "Units": "years"},
            "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
            "site": {"Description": "Scanner"},
            "label_binary": {"Description": "Planted: coupling of one pair of networks, amplitude of one region"},
            "label_continuous": {"Description": "Planted in another pair and region; mean 100, SD 15"},
            "label_null": {"Description": "No effect on the scans"},
        },
    )
    truth = _write_cohort_truth(spec, folder)
    for scan in _scans(spec):
        _write_bids_scan(spec, scan, folder)
        _write_scan_truth(spec, scan, truth)
        if progress:
            progress(scan)
    return folder


def write_store(spec: CohortSpec, folder: Path | str, progress: Progress | None = None) -> Path:
    """Writes a cohort straight into a store (no NIfTI between), with `truth/` inside its folder.

    The manifest carries age, sex and the labels; confounds are the movement, framewise displacement and the per-frame
    label (`valence`, and `valence_bold`, convolved).

    Args:
        spec: the cohort.
        folder: new or empty.
        progress: called after each scan.

    Raises:
        UserError: the folder holds something or cannot be written.

    """
    from swift.data.store.reader import ScanHeader, StoreWriter

    folder = _new_folder(Path(folder))
    names = [*MOTION_COLUMNS, "framewise_displacement", "valence", "valence_bold"]
    truth = _write_cohort_truth(spec, folder)
    placement = placement_of(SPACE)
    with StoreWriter(folder, spec.grid, spec.spacing, placement=placement) as writer:
        for scan in _scans(spec):
            who, task = scan.person, scan.task
            columns = [
                scan.motion,
                scan.framewise_displacement,
                task.valence,
                task.valence_bold,
            ]
            table = {key: str(value) for key, value in phenotypes(who).items() if key != "site"}
            header = ScanHeader(
                scan_id=scan_id(spec, who, scan.run),
                subject=f"sub-{who.subject}",  # as ingestion names the subjects of the same cohort in BIDS
                tr=scan.tr,
                affine=scan.affine,
                task=spec.task,
                run=str(scan.run + 1) if spec.runs > 1 else "",
                site=who.site,
                source="swift.data.synthetic",
                notes=[f"synthetic, seed {spec.seed}"],
                phenotypes=table,
                confounds=np.column_stack(columns).astype(np.float32),
                confound_names=names,
                events=_events(scan),
                space=SPACE,
                placement=placement,
            )
            writer.add(header, scan.mask, scan.bold)
            _write_scan_truth(spec, scan, truth)
            if progress:
                progress(scan)
    return folder


def spec_for(data: DataConfig, seed: int) -> CohortSpec:
    """The small cohort for pre-training: 8 subjects on the grid of `data`, long enough for its held-out clips."""
    span = (data.frames - 1) * data.frame_stride + 1
    held_out = int(np.ceil(2 * span / data.val_fraction)) if data.val_fraction > 0 else 0
    frames = max(100, 4 * span + data.val_gap, min(held_out, 20 * span))
    x, y, z = data.grid
    return CohortSpec(n_subjects=8, frames=frames, grid=(x, y, z), spacing=data.spacing, seed=seed)


def synthetic_store(data: DataConfig, seed: int) -> Path:
    """The store of a small synthetic cohort for pre-training, made on the first call and kept.

    It lies at `data.path` or, where that is null, in swift's cache under a name made from everything it depends on. It
    is made in a hidden folder beside and renamed, so that several processes may call this at once and what a killed one
    leaves is never taken for a cohort.

    Args:
        data: grid, spacing, frames and strides are read.
        seed: seed of the cohort.

    Raises:
        UserError: the folder cannot be written, or `data.path` holds something else than this cohort.

    """
    spec = spec_for(data, seed)
    told = spec.to_json() if data.revision == 1 else f"revision {data.revision}\n{spec.to_json()}"
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    target = Path(data.path) if data.path else cache_dir() / "synthetic" / key
    check_revision(data.revision, _is_cohort(target, spec), target)
    if not made_once(spec, target):
        raise UserError(f"data.path={target}: holds something else than this synthetic cohort; use a new folder")
    return target


def made_once(spec: CohortSpec, target: Path) -> bool:
    """Make the store of a cohort at `target`, unless it lies there; several processes may call this at once.

    Returns:
        Whether it lies there now; False: something else does, and is left alone.

    Raises:
        UserError: the folder cannot be written.
    """
    if _is_cohort(target, spec):
        return True
    if target.is_dir() and any(target.iterdir()):
        return False
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    try:
        write_store(spec, building)
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        os.rename(building, target)
    except OSError as error:
        if not _is_cohort(target, spec):  # else another process was faster: its cohort is the same
            raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def _is_cohort(folder: Path, spec: CohortSpec) -> bool:
    """Whether the store of exactly this cohort lies there, whole."""
    path = folder / "truth" / "spec.json"
    if not (path.is_file() and (folder / "store.json").is_file()):
        return False
    return path.read_text(encoding="utf-8").strip() == spec.to_json()

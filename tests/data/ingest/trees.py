"""Trees of empty files with the names that tools give: finding scans opens none."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def make(root: Path, names: Iterable[str], made_by: str | None = None, kind: str = "derivative") -> Path:
    """Empty files below a folder, and a dataset_description.json if a tool is named."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if made_by is not None:
        content = {"Name": "t", "BIDSVersion": "1.9.0", "DatasetType": kind}
        content |= {"GeneratedBy": [{"Name": made_by}]} if kind == "derivative" else {}
        (root / "dataset_description.json").write_text(json.dumps(content))
    return root


def fmriprep(root: Path, subjects: Iterable[str] = ("01", "02"), made_by: str = "fMRIPrep") -> Path:
    """One run with mask a subject."""
    names = []
    for subject in subjects:
        start = f"sub-{subject}/func/sub-{subject}_task-rest_space-MNI152NLin2009cAsym"
        names += [f"{start}_desc-preproc_bold.nii.gz", f"{start}_desc-brain_mask.nii.gz"]
    return make(root, names, made_by)

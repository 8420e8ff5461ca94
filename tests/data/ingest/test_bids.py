"""Finding scans: BIDS derivatives, folders, tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from swift.data.ingest.bids import find_sources, parse_name
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.store.reader import Store
from swift.utils.errors import UserError
from tests.data import scans

RECIPE = Recipe(grid=(24, 24, 24), spacing=4.0)
SPACE = "space-MNI152NLin2009cAsym_res-2"


def test_name_is_taken_apart() -> None:
    name = parse_name(Path(f"sub-01_ses-2_task-rest_acq-x_run-3_{SPACE}_desc-preproc_bold.nii.gz"))
    assert name.suffix == "bold"
    assert name.run_entities == {"sub": "01", "ses": "2", "task": "rest", "acq": "x", "run": "3"}


def test_dataset(tmp_path: Path) -> None:
    root = scans.dataset(tmp_path / "d")
    first, second = find_sources([root])
    assert first.scan_id == "sub-01_ses-1_task-rest_run-1"
    assert (first.subject, first.session, first.task, first.run, first.site) == ("sub-01", "1", "rest", "1", "A")
    assert first.phenotypes == {"sex": "M", "age": "n/a"}
    assert second.phenotypes["sex"] == "F"
    assert first.mask is not None
    assert first.mask.name == f"sub-01_ses-1_task-rest_run-1_{SPACE}_desc-brain_mask.nii.gz"
    assert first.confounds is not None
    ready = prepare(first, RECIPE)
    assert ready.header.tr == 2.0  # the header has none: it is the sidecar's
    assert ready.header.confound_names == ["trans_x", "csf_derivative1"]
    assert ready.header.confounds is not None
    np.testing.assert_allclose(ready.header.confounds[:, 0], np.arange(8) / 10, rtol=1e-6)
    assert np.isnan(ready.header.confounds[0, 1])
    ingest([first, second], tmp_path / "s", RECIPE)
    stored = Store(tmp_path / "s").scans
    assert [scan.subject for scan in stored] == ["sub-01", "sub-02"]
    assert stored[0].phenotypes == {"sex": "M", "age": "n/a"}
    assert stored[0].site == "A"


def test_mask_and_sidecar_are_inherited_from_above(tmp_path: Path) -> None:
    """Layout with one mask for all at the top, and one sidecar a task."""
    root = scans.dataset(tmp_path / "d")
    masks = sorted(root.rglob("*_mask.nii.gz"))
    shutil.copy(masks[0], root / f"{SPACE}_desc-brain_mask.nii.gz")
    shutil.copy(masks[0], root / "space-T1w_desc-brain_mask.nii.gz")
    for file in [*masks, *root.rglob("*_bold.json")]:
        file.unlink()
    (root / "task-rest_bold.json").write_text('{"RepetitionTime": 1.25}')
    (root / "task-other_bold.json").write_text('{"RepetitionTime": 9}')
    for source in find_sources([root]):
        assert source.mask == root / f"{SPACE}_desc-brain_mask.nii.gz"
        assert prepare(source, RECIPE).header.tr == 1.25


def test_two_spaces_of_one_run_are_refused_unless_one_is_chosen(tmp_path: Path) -> None:
    root = scans.dataset(tmp_path / "d", subjects=1)
    for path in list(root.rglob("*_bold.*")):
        shutil.copy(path, path.with_name(path.name.replace(SPACE, "space-T1w")))
    report = ingest(find_sources([root]), tmp_path / "s", RECIPE)
    assert [row.status for row in report.results] == ["failed", "failed"]
    assert all("--space" in row.reason and "space-T1w" in row.reason for row in report.results)
    assert len(find_sources([root], space="MNI152NLin2009cAsym")) == 1
    with pytest.raises(UserError, match=r"--space fsLR: no scan of .*; there are MNI152NLin2009cAsym, T1w"):
        find_sources([root], space="fsLR")


def test_participants_elsewhere_and_wrong(tmp_path: Path) -> None:
    root = scans.dataset(tmp_path / "raw" / "derivatives" / "fmriprep", subjects=1)
    (root / "participants.tsv").rename(tmp_path / "raw" / "participants.tsv")
    assert find_sources([root])[0].phenotypes["sex"] == "M"
    (tmp_path / "p.csv").write_text("participant_id,iq,task\nsub-01,100,x\n")
    (source,) = find_sources([root], participants=tmp_path / "p.csv")
    assert source.phenotypes == {"iq": "100", "given_task": "x"}
    (tmp_path / "p.csv").write_text("participant_id,iq\nsub-01,100\nsub-01,90\n")
    with pytest.raises(UserError, match="line 3: a second line for sub-01"):
        find_sources([root], participants=tmp_path / "p.csv")


def test_folder_of_any_nifti(tmp_path: Path) -> None:
    for name in ("s1/rest", "s2/rest", "odd name (1)"):
        scans.save(tmp_path / "f" / f"{name}.nii.gz", scans.bold(2))
    scans.save(tmp_path / "f" / "s1" / "rest_brainmask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    found = find_sources([tmp_path / "f"])
    assert [source.scan_id for source in found] == ["odd-name-1", "s1_rest", "s2_rest"]
    assert [source.subject for source in found] == ["odd-name-1", "s1", "s2"]
    assert [source.mask is not None for source in found] == [False, True, False]
    (single,) = find_sources([tmp_path / "f" / "s1" / "rest.nii.gz"])
    assert (single.scan_id, single.mask) == ("rest", found[1].mask)


def test_table(tmp_path: Path) -> None:
    scans.save(tmp_path / "x" / "1.nii.gz", scans.bold(2), tr=0)
    scans.save(tmp_path / "m.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    table = tmp_path / "t.csv"
    table.write_text("path,subject,session,tr,mask,sex,frames\nx/1.nii.gz,A,2,0.8,m.nii.gz,F,7\n")
    (source,) = find_sources([table])
    assert (source.scan_id, source.subject, source.session) == ("A_2", "A", "2")
    assert source.phenotypes == {"sex": "F", "given_frames": "7"}
    assert prepare(source, RECIPE).header.tr == 0.8
    for text, words in (
        ("subject\nA\n", "column `path`"),
        ("path,tr\nx/1.nii.gz,fast\n", "line 2: tr 'fast'"),
        ("path,tr\n,1\n", "line 2: no path"),
        ("path,tr\nx/1.nii.gz\n", "line 2: has not as many fields"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=words):
            find_sources([table])


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    for place, words in (("none", "no such file"), ("empty", "no scan"), ("a.txt", "neither a NIfTI")):
        with pytest.raises(UserError, match=words):
            find_sources([tmp_path / place])
    with pytest.raises(UserError, match="legal are auto, bids"):
        find_sources([tmp_path / "empty"], layout="odd")

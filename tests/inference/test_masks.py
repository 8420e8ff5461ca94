"""One brain mask for a scan, however it is named: as a file, in its data set, or in a store; and which one is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

import swift
from swift.data.__main__ import main as data
from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.store.reader import Store
from swift.inference.contract import Contract
from swift.inference.fit_scan import Fitting, find_scans, fit
from tests.data import scans
from tests.inference.test_embed_cli import embed, npz

STEM = "sub-1_task-a_space-T1w"
SMALL = 0.76
"""Of the half axes: no mask that is computed from the image."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fMRIPrep derivatives with one run."""
    root = tmp_path_factory.mktemp("tree") / "fmriprep"
    func = root / "sub-1" / "func"
    scans.save(func / f"{STEM}_desc-preproc_bold.nii.gz", scans.bold(20))
    scans.save(func / f"{STEM}_desc-brain_mask.nii.gz", scans.ellipsoid(part=SMALL), dtype=np.uint8)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    return root


@pytest.fixture(scope="module")
def file(tree: Path) -> Path:
    return next(tree.rglob("*_bold.nii.gz"))


def test_a_file_its_data_set_and_its_store_are_one_scan(
    finished: Path, tree: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not ingest(find_sources([tree]), tmp_path / "store", Recipe((12, 12, 12), 4.0)).exit_code
    found = []
    for name, place in (("file", file), ("tree", tree), ("one subject", tree / "sub-1"), ("store", tmp_path / "store")):
        caplog.clear()
        embed(finished, place, "--out", tmp_path / f"{name}.npz", "--per", "clip")
        if name != "store":
            assert f"sub-1_task-a: brain mask: {STEM}_desc-brain_mask.nii.gz" in caplog.messages
        found.append(npz(tmp_path / f"{name}.npz"))
    for one in found:
        assert one["scan"].tolist() == ["sub-1_task-a"] * 3
        np.testing.assert_array_equal(one["embedding"], found[0]["embedding"])
    # The mask counts: the scan alone, without what lies beside it, is embedded otherwise.
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
    caplog.clear()
    embed(finished, tmp_path / "alone" / file.name, "--out", tmp_path / "alone.npz", "--per", "clip")
    assert "no brain mask given: computed from the mean image" in caplog.text
    assert np.abs(npz(tmp_path / "alone.npz")["embedding"] - found[0]["embedding"]).max() > 1e-3


def test_the_transformer_takes_the_same_and_says_which(
    finished: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embed(finished, file, "--out", tmp_path / "a.npz")
    embedder = swift.Embedder(finished, device="cpu")
    with caplog.at_level(logging.INFO, "swift"):
        np.testing.assert_array_equal(embedder.transform([file]), npz(tmp_path / "a.npz")["embedding"])
    assert "brain masks of 1 scans: 1 given or found beside them, 0 worked out from the scan" in caplog.text
    assert f"brain mask: {STEM}_desc-brain_mask.nii.gz" in embedder.notes_["sub-1_task-a"]
    (tmp_path / file.name).write_bytes(file.read_bytes())
    caplog.clear()
    embedder.transform([tmp_path / file.name])
    assert [record.levelname for record in caplog.records if "worked out" in record.message] == ["WARNING"]
    assert "1 worked out from the scan (sub-1_task-a)" in caplog.text


def test_a_mask_that_is_named_wins_everywhere(
    finished: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = scans.save(tmp_path / "own.nii.gz", scans.ellipsoid(part=0.78), dtype=np.uint8)
    (tmp_path / "scans.csv").write_text(f"path,mask,subject,task\n{file},own.nii.gz,sub-1,a\n")
    embed(finished, file, "--out", tmp_path / "option.npz", "--mask", mask)
    embed(finished, tmp_path / "scans.csv", "--out", tmp_path / "table.npz")
    out, grid = ("--out", str(tmp_path / "store")), ("--grid", "12", "--spacing", "4")
    with pytest.raises(SystemExit) as ended:
        data(["ingest", str(file), *out, *grid, "--mask", str(mask), "--workers", "1"])
    assert not ended.value.code
    embed(finished, tmp_path / "store", "--out", tmp_path / "store.npz")
    found = [npz(tmp_path / f"{name}.npz")["embedding"] for name in ("option", "table", "store")]
    for one in found:
        np.testing.assert_array_equal(one, found[0])
    contract = Contract((12, 12, 12), 4.0, 8, 1, "zscore_voxel", 0.0)
    fitted = fit(find_scans([file], contract)[0], contract, Fitting(mask=mask))
    np.testing.assert_array_equal(fitted.mask, Store(tmp_path / "store").mask(0))
    capsys.readouterr()
    embed(finished, file, "--out", tmp_path / "gone.npz", "--mask", tmp_path / "gone.nii.gz", status=2)
    assert f"--mask {tmp_path}/gone.nii.gz: no such file" in capsys.readouterr().err


def test_a_brain_that_is_no_head_is_taken_where_it_is_meant(
    finished: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = scans.save(tmp_path / "small.nii.gz", scans.ellipsoid(part=0.5), dtype=np.uint8)
    out = "--out", tmp_path / "small.npz", "--mask", small
    embed(finished, file, *out, status=1)
    assert "no head (0.05 to 5 litres)" in capsys.readouterr().err
    embed(finished, file, *out, "--any-size")
    embedder = swift.Embedder(finished, mask=small, any_size=True, device="cpu")
    np.testing.assert_array_equal(embedder.transform([file]), npz(tmp_path / "small.npz")["embedding"])

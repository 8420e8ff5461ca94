"""The synthetic cohort on disk: BIDS derivatives, store, cache folder and command."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest

from swift.config.schema_data import DataConfig
from swift.data import synthetic
from swift.data.store.reader import Store
from swift.data.synthetic import CohortSpec, geometry, make_subject
from swift.utils.errors import UserError
from tests.data.stores import PLAIN

SMALL = CohortSpec(n_subjects=3, grid=(16, 18, 14), spacing=10.0, frames=40, seed=7)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_bids_round_trip(tmp_path: Path) -> None:
    spec = SMALL.with_(n_subjects=2, runs=2, site_tr=(0.8, 2.0, 2.5))
    synthetic.write_bids(spec, tmp_path / "out")
    func = tmp_path / "out" / "sub-0002" / "func"
    scan = make_subject(spec, 1, 1)
    stem = "sub-0002_task-rest_run-2"
    image: Any = nib.load(func / f"{stem}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz")
    np.testing.assert_allclose(image.affine, scan.affine)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == pytest.approx((10, 10, 10, scan.tr))
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert np.abs(image.get_fdata() - scan.dense()).max() <= 0.501
    mask: Any = nib.load(func / f"{stem}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj) > 0, scan.mask)
    side = json.loads((func / f"{stem}_space-MNI152NLin2009cAsym_desc-preproc_bold.json").read_text())
    assert side["RepetitionTime"] == scan.tr
    confounds = read_table(func / f"{stem}_desc-confounds_timeseries.tsv")
    assert len(confounds) == 40
    assert confounds[0]["framewise_displacement"] == "n/a"
    np.testing.assert_allclose([float(row["rot_z"]) for row in confounds], scan.motion[:, 5], rtol=1e-5, atol=1e-12)
    events = read_table(func / f"{stem}_events.tsv")
    np.testing.assert_allclose([float(row["valence"]) for row in events], scan.task.value)
    people = read_table(tmp_path / "out" / "participants.tsv")
    assert [row["participant_id"] for row in people] == ["sub-0001", "sub-0002"]
    assert set(people[0]) == {
        "participant_id", "age", "sex", "site", "label_binary", "label_continuous", "label_null",
    }  # fmt: skip
    assert people[1]["site"] == scan.person.site
    truth = synthetic.load_truth(tmp_path / "out")
    assert truth["spec"] == spec
    assert float(truth["subjects"][1]["latent_binary"]) == scan.person.latent_binary
    np.testing.assert_array_equal(truth["scans"][stem]["courses"], scan.courses)
    np.testing.assert_array_equal(truth["space"]["region_frame"], geometry(spec).regions()["frame"])
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 8
    with pytest.raises(UserError, match="not empty"):
        synthetic.write_bids(spec, tmp_path / "out")


def test_store_holds_the_scans_and_their_frame_labels(tmp_path: Path) -> None:
    folder = synthetic.write_store(SMALL, tmp_path / "store")
    store = Store(folder)
    assert [info.scan_id for info in store.scans] == [f"sub-000{i}_task-rest" for i in (1, 2, 3)]
    for number, info in enumerate(store.scans):
        scan = make_subject(SMALL, number)
        a, b = store.normalizer(number, "none")
        np.testing.assert_array_equal(store.mask(number), scan.mask)
        step = np.ptp(scan.bold, axis=0) / 65534
        assert (np.abs(store.read(number, 0, 40) * a + b - scan.bold) <= step / 2 + 2e-3).all()
        assert info.tr == 2.0
        assert info.subject == f"sub-{scan.person.subject}"
        assert info.site == scan.person.site
        assert info.phenotypes["label_binary"] == str(scan.person.label_binary)
        assert "latent_binary" not in info.phenotypes
    shard, name = store.scans[0].shard, store.scans[0].scan_id
    store.close()
    with h5py.File(folder / "shards" / shard) as file:
        confounds = file["scans"][name]["confounds"][()]
    scan = make_subject(SMALL, 0)
    np.testing.assert_allclose(confounds[:, :6], scan.motion, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(confounds[:, -1], scan.task.valence_bold, rtol=1e-6, atol=1e-7)
    assert len(synthetic.load_truth(folder)["scans"]) == 3


def data_config(path: str | None = None) -> DataConfig:
    return DataConfig(
        **PLAIN, name="synthetic", path=path, grid=[12, 12, 12], spacing=14.0, frames=10, frame_stride=1, clip_stride=5,
        normalization="zscore_voxel", background=0.0, batch_size=2, workers=0, val_fraction=0.2, val_gap=5, split=None,
        verify=False,
    )  # fmt: skip


def test_synthetic_store_is_made_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    folder = synthetic.synthetic_store(data_config(), 4)
    assert folder.is_relative_to(tmp_path / "cache")
    assert len(Store(folder).scans) == 8
    assert Store(folder).scans[0].frames * 0.2 >= 2 * 10  # held-out part has room for clips
    before = (folder / "manifest.csv").stat().st_mtime_ns
    assert synthetic.synthetic_store(data_config(), 4) == folder
    assert (folder / "manifest.csv").stat().st_mtime_ns == before
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]  # nothing half-made is left
    assert synthetic.synthetic_store(data_config(), 5) != folder
    chosen = tmp_path / "mine"
    assert synthetic.synthetic_store(data_config(str(chosen)), 4) == chosen
    with pytest.raises(UserError, match="something else"):
        synthetic.synthetic_store(data_config(str(chosen)), 5)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swift.utils.cache import cache_dir

    monkeypatch.delenv("SWIFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "swift-fmri"
    assert cache_dir().is_dir()
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("SWIFT_CACHE", str(file / "below"))
    with pytest.raises(UserError, match="SWIFT_CACHE"):
        cache_dir()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    synthetic.add_arguments(parser)
    text = "--subjects 1 --grid 10 10 10 --spacing 15 --frames 20 --site-tr 1 1.5 2 --binary-auroc 0.8 --json --quiet"
    for kind, made in (("bids", "participants.tsv"), ("store", "manifest.csv")):
        out = tmp_path / kind
        args = parser.parse_args(["--out", str(out), "--format", kind, *text.split()])
        assert synthetic.run(args) == 0
        assert json.loads(capsys.readouterr().out)["scans"] == 1
        assert (out / made).is_file()
        assert synthetic.load_truth(out)["spec"].binary_auroc == 0.8

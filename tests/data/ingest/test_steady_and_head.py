"""Frames that are no steady state, brains that are none, masks of centred data, and files with a changed byte."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swift.data.ingest.bids import find_sources
from swift.data.ingest.head import edge_share
from swift.data.ingest.nifti import plan_scan
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.ingest.sources import Source
from swift.data.ingest.steady import frames_to_drop, standing_out
from swift.data.store.reader import Store
from swift.utils.errors import BadScan
from tests.data import scans

RECIPE = Recipe(grid=(24, 24, 24), spacing=4.0)


def source(
    folder: Path, data: np.ndarray, name: str = "a", masked: bool = True, affine: np.ndarray = scans.AFFINE
) -> Source:
    path = scans.save(folder / f"{name}.nii.gz", data, affine)
    mask = scans.save(folder / f"{name}_mask.nii.gz", scans.ellipsoid(), affine, dtype=np.uint8) if masked else None
    return Source(name, path, name, mask=mask)


def test_flagged_frames_are_dropped_and_the_scan_keeps_its_clock(tmp_path: Path) -> None:
    data = scans.bold(20)
    data[..., 0] *= 1.6
    data[..., 1] *= 1.2
    flags = "\n".join(f"{t / 10}\t{int(t == 0)}\t{int(t == 1)}" for t in range(20))
    table = tmp_path / "c.tsv"
    table.write_text(f"trans_x\tnon_steady_state_outlier00\tnon_steady_state_outlier01\n{flags}\n")
    made = replace(source(tmp_path, data), confounds=table, start_time=0.5)
    ready = prepare(made, RECIPE)
    assert (ready.header.dropped, ready.header.start_time) == (2, 0.5 + 2 * 2.0)
    places = data[scans.ellipsoid()].T
    np.testing.assert_allclose(ready.bold, places[2:], rtol=1e-5)
    assert ready.header.confounds is not None
    np.testing.assert_allclose(ready.header.confounds[:, 0], np.arange(2, 20) / 10, rtol=1e-6)
    assert any("2 frames at the start are flagged as no steady state" in note for note in ready.header.notes)
    # Flags count where confounds are not kept; more can be dropped.
    assert prepare(made, replace(RECIPE, confounds=False)).header.dropped == 2
    more = prepare(made, replace(RECIPE, drop_first=5)).header
    assert (more.dropped, more.start_time) == (5, 10.5)


def test_frames_that_stand_out_unflagged_are_named(tmp_path: Path) -> None:
    data = scans.bold(30)
    data[..., :2] *= 1.3
    header = prepare(source(tmp_path, data), RECIPE).header
    assert header.dropped == 0
    assert any("the first 2 frames stand out from the rest and are not flagged" in note for note in header.notes)
    rng = np.random.default_rng(0)
    assert not any(standing_out(1000 + rng.normal(size=40)) for _ in range(200))
    assert frames_to_drop({"non_steady_state_outlier00": np.array([0, 0, 0, 1.0])}, 0, 4, "a") == (
        0,
        ["frames 3 are flagged as no steady state, not at the start: kept"],
    )
    with pytest.raises(BadScan, match="1 of 4 frames are left after 3"):
        frames_to_drop({}, 3, 4, "a")


def test_a_wrong_voxel_size_is_no_head(tmp_path: Path) -> None:
    small = np.diag([1.0, 1.0, 1.0, 1.0])
    made = source(tmp_path, scans.bold(4), affine=small)
    with pytest.raises(BadScan, match=r"brain of 0\.001 litres \(\d+ voxels of 1 x 1 x 1 mm\): no head .*--any-size"):
        prepare(made, RECIPE)
    header = prepare(made, replace(RECIPE, any_size=True, spacing=1.0)).header
    assert any("unusual (0.5 to 2.5): is the voxel size" in note for note in header.notes)


def test_a_cropped_brain_is_named_with_its_share(tmp_path: Path) -> None:
    made = source(tmp_path, scans.bold(4))
    with pytest.raises(BadScan, match=r"\d\d(\.\d)? % of the brain lies outside the \(8, 8, 8\) grid of 4 mm;"):
        prepare(made, replace(RECIPE, grid=(8, 8, 8)))
    brain = scans.ellipsoid()
    ready = prepare(made, replace(RECIPE, grid=(8, 8, 8), cropped=True))
    assert ready.mask.sum() < brain.sum()
    data = scans.bold(4)
    data[:, :8] = 0  # not scanned there
    with pytest.raises(BadScan, match="% of the brain lies where the scan has no data"):
        prepare(source(tmp_path, data, "b"), RECIPE)
    whole = np.zeros((6, 6, 6), bool)
    whole[0:3, 1:4, 1:4] = True
    assert edge_share(whole) == pytest.approx(9 / 27)
    assert edge_share(brain) == 0


def test_the_brain_of_centred_data_is_what_changes(tmp_path: Path) -> None:
    brain, rng = scans.ellipsoid(), np.random.default_rng(0)
    trace = 0.5 * np.indices(scans.SHAPE)[0] / 16  # what a regression leaves of the mean
    data = (12 * rng.normal(size=(*scans.SHAPE, 30)) + trace[..., None]) * brain[..., None]
    ready = prepare(source(tmp_path, data, masked=False), RECIPE)
    assert ready.mask.sum() == brain.sum()
    assert any("values are centred (mean near 0)" in note for note in ready.header.notes)
    with pytest.raises(BadScan, match=r"centred .* and the background changes too; give a mask"):
        prepare(source(tmp_path, rng.normal(size=data.shape), "b", masked=False), RECIPE)


def test_a_changed_byte_in_a_gzip_file_is_damage(tmp_path: Path) -> None:
    made = source(tmp_path, scans.bold(4))
    packed = bytearray(gzip.compress(gzip.decompress(made.path.read_bytes()), 0, mtime=0))
    packed[len(packed) // 2] ^= 0x10  # stored, not deflated: a value changes and nothing else
    made.path.write_bytes(packed)
    with pytest.raises(BadScan, match=r"a\.nii\.gz: damaged: CRC check failed"):
        prepare(made, RECIPE)


def test_a_quaternion_longer_than_one_by_rounding(tmp_path: Path) -> None:
    path = scans.save(tmp_path / "a.nii", scans.bold(2))
    scans.patch(
        path, sform_code=0, qform_code=1, quatern_b=0.0, quatern_c=np.float32(np.sqrt(1 + 3.85e-7)), quatern_d=0
    )
    affine = plan_scan(path).affine
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), 4.0, atol=1e-3)
    # 180 degrees about y: x and z change sign, then the axes are brought to RAS+.
    raw = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    corner = np.array([float(raw[f"qoffset_{axis}"]) for axis in "xyz"])
    far = (np.asarray(scans.SHAPE) - 1) * 4.0
    np.testing.assert_allclose(affine[:3, 3], [corner[0] - far[0], corner[1], corner[2] - far[2]], atol=0.1)


def test_one_odd_scan_does_not_end_the_others(tmp_path: Path) -> None:
    """4,000 confounds, and a name that is no UTF-8: both are taken, and the reports are written."""
    dataset = scans.dataset(tmp_path / "d", subjects=2)
    table = next(dataset.rglob("sub-01*_desc-confounds_timeseries.tsv"))
    names = [f"a_comp_cor_with_a_long_name_{k:04d}" for k in range(4000)]
    rows = ["\t".join(names), *("\t".join(["0.5"] * 4000) for _ in range(8))]
    table.write_text("\n".join(rows) + "\n")
    assert ingest(find_sources([dataset]), tmp_path / "s", RECIPE).exit_code == 0
    assert list(Store(tmp_path / "s").confounds(0)) == names
    folder = tmp_path / "f"
    good = source(folder, scans.bold(4), masked=False)
    os.link(good.path, os.fsencode(folder) + b"/M\xfcller.nii.gz")
    mask = scans.save(tmp_path / "m.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    odd = Source("odd", Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller.nii.gz")), "odd", mask=mask)
    report = ingest([replace(good, mask=mask), odd], tmp_path / "t", RECIPE)
    assert {row.scan_id: row.status for row in report.results} == {"a": "added", "odd": "added"}
    told = json.loads((tmp_path / "t" / "ingest_report.json").read_text())["scans"]
    assert told[1]["source"].endswith("M\\xfcller.nii.gz")
    assert "M\\xfcller.nii.gz" in (tmp_path / "t" / "ingest_report.csv").read_text()

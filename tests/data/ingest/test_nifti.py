"""Headers read with suspicion: each fault ends in a named reason or a stated correction."""

from __future__ import annotations

import gzip
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift.data.ingest import nifti
from swift.data.ingest.mask import compute_mask, read_mask, survey
from swift.data.ingest.nifti import iter_frames, plan_scan
from swift.data.ingest.place import Sampler, plan_grid
from swift.data.ingest.tr import resample_tr, resolve_tr
from swift.utils.errors import BadScan
from tests.data import scans


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return scans.save(tmp_path / "a.nii", scans.bold(), dtype=np.int16)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "PSR", "AIL"])
def test_frames_come_in_ras_with_the_affine_of_nibabel(tmp_path: Path, codes: str) -> None:
    data = scans.bold()
    path = scans.save(tmp_path / "a.nii.gz", data, codes=codes)
    plan = plan_scan(path)
    canonical = nib.as_closest_canonical(nib.load(path))
    assert plan.orientation == codes
    assert plan.shape == canonical.shape[:3] == scans.SHAPE
    np.testing.assert_allclose(plan.affine, canonical.affine, atol=1e-5)
    np.testing.assert_allclose(plan.affine, scans.AFFINE, atol=1e-5)
    np.testing.assert_array_equal(np.stack(list(iter_frames(plan)), -1), data)
    assert plan.tr == 2.0
    assert plan.notes == ()


def test_scaling_and_big_endian_are_those_of_nibabel(tmp_path: Path) -> None:
    data = np.arange(4 * 5 * 3 * 2, dtype=np.int16).reshape(4, 5, 3, 2)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    image = nib.Nifti1Image(data, scans.AFFINE, header)
    image.header.set_slope_inter(0.5, -7.0)
    image.header.set_zooms((3, 3, 3, 1.5))
    nib.save(image, tmp_path / "b.nii")
    scans_read = np.stack(list(iter_frames(plan_scan(tmp_path / "b.nii"))), -1)
    np.testing.assert_allclose(scans_read, nib.load(tmp_path / "b.nii").get_fdata(), rtol=1e-6)


def test_series_of_five_dimensions(scan: Path) -> None:
    """(X, Y, Z, 1, T), as torchio and ANTs write a series."""
    four = np.stack(list(iter_frames(plan_scan(scan))), -1)
    scans.patch(scan, dim=[5, *scans.SHAPE, 1, 8, 1, 1])
    plan = plan_scan(scan)
    assert nib.load(scan).shape == (*scans.SHAPE, 1, 8)
    assert (plan.frames, plan.tr) == (8, 2.0)
    np.testing.assert_array_equal(np.stack(list(iter_frames(plan)), -1), four)


def test_nifti2(tmp_path: Path) -> None:
    data = scans.bold(3)
    image = nib.Nifti2Image(data, scans.AFFINE)
    image.header.set_zooms((3, 3, 3, 1.5))
    nib.save(image, tmp_path / "two.nii.gz")
    plan = plan_scan(tmp_path / "two.nii.gz")
    assert plan.tr == 1.5
    np.testing.assert_array_equal(np.stack(list(iter_frames(plan)), -1), data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


NAN = float("nan")
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no such file"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "not nifti": (lambda p: p.write_bytes(b"x" * 5000), "not NIfTI"),
    "truncated": (_cut, "truncated"),
    "3D": (lambda p: scans.save(p, scans.bold()[..., 0]), "3D, shape"),
    "one frame": (lambda p: scans.save(p, scans.bold(1)), "3D, shape"),
    "rank 0": (lambda p: scans.set_place(p, "dim", 0, 0), "wrong dimensions"),
    "rank 9": (lambda p: scans.set_place(p, "dim", 0, 9), "wrong dimensions"),
    "negative size": (lambda p: scans.set_place(p, "dim", 2, -20), "wrong dimensions"),
    "zero size": (lambda p: scans.set_place(p, "dim", 4, 0), "wrong dimensions"),
    "huge": (lambda p: scans.patch(p, dim=[4, 32767, 32767, 32767, 32767, 1, 1, 1]), "needs"),
    "5D vector": (lambda p: scans.patch(p, dim=[5, 16, 20, 14, 1, 3, 1, 1]), "5D"),
    "5D": (lambda p: scans.patch(p, dim=[5, 16, 20, 14, 4, 2, 1, 1]), "5D"),
    "data type": (lambda p: scans.patch(p, datatype=32), "data type"),
    "unknown type": (lambda p: scans.patch(p, datatype=77), "data type"),
    "offset": (lambda p: scans.patch(p, vox_offset=NAN), "vox_offset"),
    "negative offset": (lambda p: scans.patch(p, vox_offset=-8), "vox_offset"),
    "NaN affine": (lambda p: scans.patch(p, srow_x=[NAN, 0, 0, 0]), "NaN"),
    "singular": (lambda p: scans.patch(p, srow_x=[0, 3, 0, 0]), "singular"),
    "zero affine": (lambda p: scans.patch(p, srow_x=0, srow_y=0, srow_z=0), "singular"),
    "tiny voxels": (lambda p: scans.patch(p, srow_x=[1e-5, 0, 0, 0]), "voxel size"),
    "slope overflow": (lambda p: scans.patch(p, scl_slope=1e36, scl_inter=0), "scl_slope"),
    "slope inf": (lambda p: scans.patch(p, scl_slope=float("inf"), scl_inter=0), "scl_slope"),
    "TR 0": (lambda p: scans.set_place(p, "pixdim", 4, 0), "give --tr"),
    "TR NaN": (lambda p: scans.set_place(p, "pixdim", 4, NAN), "give --tr"),
    "TR 60": (lambda p: scans.set_place(p, "pixdim", 4, 60), "give --tr"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_in_one_line(scan: Path, fault: str) -> None:
    spoil, words = FAULTS[fault]
    spoil(scan)
    with pytest.raises(BadScan, match=words) as caught:
        plan_scan(scan)
    assert "\n" not in str(caught.value)
    assert scan.name in str(caught.value)


CORRECTIONS: dict[str, tuple[Callable[[Path], object], str, float]] = {
    "ms with unit sec": (lambda p: scans.set_place(p, "pixdim", 4, 2000), "header says 2000 with sec", 2.0),
    "ms": (lambda p: scans.patch(scans.set_place(p, "pixdim", 4, 720), xyzt_units=2 + 16), "read as 0.72 s", 0.72),
    "sec called ms": (lambda p: scans.patch(p, xyzt_units=2 + 16), "read as 2 s", 2.0),
    "negative voxel size": (lambda p: scans.set_place(p, "pixdim", 1, -4), "negative voxel sizes", 2.0),
    "NaN slope": (lambda p: scans.patch(p, scl_slope=NAN), "scl_slope is NaN", 2.0),
    "no codes": (lambda p: scans.patch(p, sform_code=0, qform_code=0), "no orientation code .* LAS assumed", 2.0),
}


@pytest.mark.parametrize("fault", CORRECTIONS)
def test_correction_is_stated(scan: Path, fault: str) -> None:
    spoil, words, tr = CORRECTIONS[fault]
    spoil(scan)
    plan = plan_scan(scan)
    assert plan.tr == tr
    assert len(plan.notes) == 1
    assert re.search(words, plan.notes[0])
    assert np.isfinite(plan.affine).all()
    np.testing.assert_allclose(plan.spacing, scans.SPACING, atol=1e-5)


def test_negative_voxel_size_does_not_mirror(scan: Path) -> None:
    before = plan_scan(scan)
    scans.patch(scans.set_place(scan, "pixdim", 1, -4), sform_code=0, qform_code=1)
    np.testing.assert_allclose(plan_scan(scan).affine, before.affine, atol=1e-4)


def test_where_the_tr_comes_from() -> None:
    assert resolve_tr("a", 2.0, 8) == (2.0, [])
    assert resolve_tr("a", 2.0, 8, sidecar=0.8)[0] == 0.8
    assert "header says 2 s" in resolve_tr("a", 2.0, 8, sidecar=0.8)[1][0]
    assert resolve_tr("a", 0.0, 0, sidecar=2000.0)[0] == 2.0
    assert resolve_tr("a", 2.0, 8, option=1.0, sidecar=0.8)[0] == 1.0
    assert resolve_tr("a", 1.5e6, 24)[0] == 1.5
    with pytest.raises(BadScan, match="--tr 900"):
        resolve_tr("a", 2.0, 8, option=900.0)


def test_memory_does_not_follow_the_declared_size(tmp_path: Path) -> None:
    """200 kB of zeros compressed to nothing, declaring frames of 2 GB: refused when the data end, in little memory."""
    path = scans.save(tmp_path / "c.nii", np.zeros((4, 4, 4, 2)), dtype=np.int16)
    scans.patch(path, dim=[4, 1024, 1024, 1024, 2, 1, 1, 1])
    noise = np.random.default_rng(0).bytes(4_200_000)  # so that the file is large enough to be believed at first
    with gzip.open(tmp_path / "c.nii.gz", "wb", compresslevel=1) as stream:
        stream.write(path.read_bytes() + noise)
    plan = plan_scan(tmp_path / "c.nii.gz")
    tracemalloc.start()
    with pytest.raises(BadScan, match="truncated or damaged: holds 0 of 2 frames"):
        next(iter_frames(plan))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * nifti.PIECE  # the frame that the header promises has 2 GiB


def test_gzip_cut_short_names_the_frame(tmp_path: Path) -> None:
    path = scans.save(tmp_path / "d.nii.gz", scans.bold())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadScan, match=r"holds [34] of 8 frames"):
        list(iter_frames(plan_scan(path)))


@settings(max_examples=150)
@given(place=st.integers(0, 347), value=st.integers(0, 255), other=st.integers(0, 347), more=st.integers(0, 255))
def test_fuzzed_header_ends_well(
    place: int, value: int, other: int, more: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two random bytes of a header changed: a named reason, or frames of the size that the file can hold."""
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    raw = bytearray(scans.save(path, np.ones((4, 5, 3, 3)), dtype=np.int16).read_bytes())
    raw[place], raw[other] = value, more
    path.write_bytes(raw)
    reason = ""
    try:
        plan = plan_scan(path)
        for frame in iter_frames(plan):
            assert frame.shape == plan.shape
            assert frame.nbytes <= 64 * len(raw)
    except BadScan as error:
        reason = str(error)
    assert "\n" not in reason


def test_survey_counts_nan_and_flat_voxels() -> None:
    data = scans.bold(6)
    data[3, 4, 5, 2] = np.nan
    data[3, 4, 6, :] = np.inf
    data[7, 7, 7, :] = 5.0
    seen = survey((data[..., t] for t in range(6)), "s")
    assert [tuple(place) for place in np.argwhere(seen.nan)] == [(3, 4, 5), (3, 4, 6)]
    assert [tuple(place) for place in np.argwhere(seen.flat)] == [(7, 7, 7)]
    good = np.isfinite(data).all(-1)
    np.testing.assert_allclose(seen.mean[good], data[good].mean(-1), rtol=1e-5)
    data[..., 4] = np.nan
    with pytest.raises(BadScan, match="frames without a finite value: 4 of 6"):
        survey((data[..., t] for t in range(6)), "s")
    with pytest.raises(BadScan, match="1 frame; a scan has at least 2"):
        survey(iter([data[..., 0]]), "s")


def test_mask_of_another_grid_is_refused(tmp_path: Path) -> None:
    brain = scans.ellipsoid()
    for codes in ("RAS", "LPI"):  # another voxel order is no other grid
        path = scans.save(tmp_path / f"{codes}.nii.gz", brain, codes=codes, dtype=np.uint8)
        np.testing.assert_array_equal(read_mask(path, scans.SHAPE, scans.AFFINE, "s"), brain)
    with pytest.raises(BadScan, match=r"another grid: \(16, 20, 14\) voxels, the scan has \(16, 20, 15\)"):
        read_mask(path, (16, 20, 15), scans.AFFINE, "s")
    moved = scans.AFFINE.copy()
    moved[0, 3] += 3
    with pytest.raises(BadScan, match=r"corners lie 3\.0 mm apart"):
        read_mask(path, scans.SHAPE, moved, "s")
    empty = scans.save(tmp_path / "e.nii.gz", np.zeros(scans.SHAPE), dtype=np.uint8)
    with pytest.raises(BadScan, match="is empty"):
        read_mask(empty, scans.SHAPE, scans.AFFINE, "s")


def test_computed_mask_finds_the_ellipsoid() -> None:
    shape = (40, 44, 36)
    brain = scans.ellipsoid(shape)
    found = compute_mask(scans.bold(4, shape).mean(-1), scans.AFFINE, "s")
    assert (found & brain).sum() * 2 / (found.sum() + brain.sum()) > 0.97


def test_same_spacing_is_a_shift_of_whole_voxels() -> None:
    brain, data = scans.ellipsoid(), scans.bold(1)[..., 0]
    plan = plan_grid(brain, scans.AFFINE, (24, 24, 24), scans.SPACING)
    sampler = Sampler(plan, brain, np.ones_like(brain), "s")
    start = np.round((np.linalg.inv(scans.AFFINE) @ plan.affine)[:3, 3]).astype(int)
    assert sampler.mask.sum() == brain.sum()
    places = np.argwhere(sampler.mask) + start
    np.testing.assert_array_equal(sampler(data), data[tuple(places.T)])
    middle = (np.argwhere(sampler.mask).min(0) + np.argwhere(sampler.mask).max(0)) / 2
    assert np.abs(middle - 11.5).max() <= 0.5
    assert plan.outside == 0


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_linear_field_is_sampled_exactly(angle: float) -> None:
    """Trilinear interpolation has no error on a field linear in world coordinates, whatever the rotation."""
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ scans.AFFINE
    brain = scans.ellipsoid(part=0.7)
    world = np.argwhere(np.ones(scans.SHAPE)) @ affine[:3, :3].T + affine[:3, 3]
    field = (5 + world @ [1.0, -2.0, 0.5]).reshape(scans.SHAPE).astype(np.float32)
    good = np.ones(scans.SHAPE, bool)
    good[0] = False  # outside of the brain: must not matter
    plan = plan_grid(brain, affine, (32, 32, 32), 8 / 3)
    sampler = Sampler(plan, brain, good, "s")
    there = np.argwhere(sampler.mask) @ plan.affine[:3, :3].T + plan.affine[:3, 3]
    np.testing.assert_allclose(sampler(field), 5 + there @ [1.0, -2.0, 0.5], atol=1e-4)
    assert sampler.mask.sum() == pytest.approx(brain.sum() * 27 / 8, rel=0.05)


def test_bad_voxels_do_not_darken_their_neighbours() -> None:
    brain = scans.ellipsoid()
    good = np.ones_like(brain)
    good[8, 10, 7] = False
    frame = np.full(scans.SHAPE, 7.0, np.float32)
    frame[8, 10, 7] = np.nan
    sampler = Sampler(plan_grid(brain, scans.AFFINE, (32, 32, 32), 2.0), brain, good, "s")
    np.testing.assert_allclose(sampler(frame), 7.0, rtol=1e-6)


def test_tr_resampling_keeps_slow_waves_and_stops_fast_ones() -> None:
    tr, new = 0.8, 2.0
    time = np.arange(300) * tr
    slow, fast = np.sin(2 * np.pi * 0.02 * time), np.sin(2 * np.pi * 0.42 * time)
    out = resample_tr(np.stack([slow, fast], 1).astype(np.float32), tr, new)
    assert out.shape == (int(299 * tr / new) + 1, 2)
    there = np.arange(len(out)) * new
    middle = slice(20, -20)
    np.testing.assert_allclose(out[middle, 0], np.sin(2 * np.pi * 0.02 * there)[middle], atol=0.01)
    assert np.abs(out[middle, 1]).max() < 0.02  # 0.42 Hz is above the new Nyquist frequency: would fold to 0.08 Hz
    finer = resample_tr(slow[:, None].astype(np.float32), tr, 0.4)
    np.testing.assert_allclose(finer[:, 0], np.sin(2 * np.pi * 0.02 * np.arange(len(finer)) * 0.4), atol=1e-4)
    with pytest.raises(BadScan, match="cannot be brought"):
        resample_tr(np.zeros((3, 2), np.float32), 2.0, 1.0)

"""Imported SwiFT v1 weights see what they were trained on: v1's own preparation, on an asymmetric scan."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from swift.config.compose import freeze, load_frozen
from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.inference.attribution import on_own_grid
from swift.inference.contract import Contract
from swift.inference.fit_scan import FittedScan, Fitting, find_scans, fit
from swift.inference.model import load_trained
from swift.models.v1 import INPUT
from swift.utils.errors import BadScan
from tests.data import scans
from tests.models.test_v1_import import CASE, CFG, v1_state

CPU = torch.device("cpu")
SHAPE, FRAMES = (91, 109, 91), 6
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
"""Of HCP's and FSL's MNI images: x counts from right to left."""
CONTRACT = Contract.of_swift_v1((96, 96, 96), FRAMES, 1)


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    """(91, 109, 91, 6) float32 as it lies in the file: a brain that leans to one side, 0 outside."""
    i, j, k = np.indices(SHAPE)
    brain = ((i - 40) / 30) ** 2 + ((j - 58) / 40) ** 2 + ((k - 44) / 33) ** 2 <= 1
    rng = np.random.default_rng(0)
    level = 8000 + 20.0 * i - 10.0 * j + 5.0 * k  # differs along each axis
    values = level[..., None] * (1 + 0.01 * rng.standard_normal((*SHAPE, FRAMES)))
    return np.where(brain[..., None], values, 0).astype(np.float32)


@pytest.fixture(scope="module")
def file(stored: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As HCP leaves it, its mask beside it; the header says MNI, the name does not."""
    folder = tmp_path_factory.mktemp("hcp")
    for name, data in (("rest", stored), ("rest_mask", (stored[..., 0] != 0).astype(np.uint8))):
        image = nib.Nifti1Image(data, AFFINE)
        image.set_sform(AFFINE, code=4)
        image.header.set_xyzt_units("mm", "sec")
        if data.ndim == 4:
            image.header.set_zooms((2, 2, 2, 0.72))
        nib.save(image, folder / f"{name}.nii")
    return folder / "rest.nii"


def by_v1(stored: np.ndarray) -> np.ndarray:
    """(96, 96, 96, T): what SwiFT v1 makes of the array of a file."""
    background = stored == 0
    z = (stored - stored[~background].mean(dtype=np.float64)) / stored[~background].std(dtype=np.float64)
    z[background] = z[~background].min()
    frames = torch.from_numpy(z).float().permute(3, 0, 1, 2)
    fill = float(frames.flatten()[0])
    return pad(frames, (3, 2, -7, -6, 3, 2), value=fill).permute(1, 2, 3, 0).numpy()


def test_a_file_is_brought_to_what_v1_makes_of_it(file: Path, stored: np.ndarray) -> None:
    scan = fit(find_scans([file], CONTRACT)[0], CONTRACT, Fitting())
    clip = scan.clips([0], CPU)
    expected = by_v1(stored)
    found = clip["bold"][0, 0].numpy()
    # int16 codes of each voxel's own range are the only difference.
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_array_equal(clip["brain"][0].numpy(), expected[..., 0] != expected[0, 0, 0, 0])
    np.testing.assert_array_equal(scan.mask, clip["brain"][0].numpy())
    # Mirrored, or a voxel beside it, it is far from that.
    for wrong in (expected[::-1], np.roll(expected, 1, 0), np.roll(expected, 6, 2)):
        assert np.abs(found - wrong).max() > 0.5
    np.testing.assert_allclose(scan.affine @ [3, 0, 3, 1], [*(AFFINE @ [0, 7, 0, 1])[:3], 1])


def test_a_map_of_a_v1_model_lies_where_the_file_does(file: Path) -> None:
    scan = fit(find_scans([file], CONTRACT)[0], CONTRACT, Fitting())
    places = np.indices((96, 96, 96)).reshape(3, -1).T
    world = places @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    image = on_own_grid((world @ [1.0, 2.0, -0.5]).reshape(96, 96, 96), scan)
    np.testing.assert_allclose(image.affine, AFFINE)
    i, j, k = np.indices(SHAPE)
    inside = (j >= 7) & (j < 103)
    expected = (90 - 2 * i) + 2.0 * (2 * j - 126) - 0.5 * (2 * k - 72)
    np.testing.assert_allclose(np.asarray(image.dataobj)[inside], expected[inside], atol=1e-3)


def small(folder: Path, tr: float = 0.72) -> tuple[Contract, Path]:
    """A contract of a small grid, and a scan that is not known to lie in a template."""
    path = scans.save(folder / "a.nii.gz", scans.bold(12) + 5 * np.arange(16)[:, None, None, None], tr=tr)
    scans.save(folder / "a_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    return Contract.of(
        INPUT | {"spacing": scans.SPACING, "grid": (16, 20, 14), "frames": 6, "frame_stride": 1}, "test"
    ), path


def test_a_store_gives_the_same_as_the_file(tmp_path: Path) -> None:
    contract, path = small(tmp_path)
    ingest(find_sources([path]), tmp_path / "store", Recipe(contract.grid, scans.SPACING))
    scans_of: list[FittedScan] = [
        fit(find_scans([place], contract)[0], contract, Fitting()) for place in (path, tmp_path / "store")
    ]
    one, other = (scan.clips([0, 6], CPU) for scan in scans_of)
    for name in ("bold", "brain"):
        assert torch.equal(one[name], other[name])
    np.testing.assert_array_equal(scans_of[0].affine, scans_of[1].affine)
    # By hand, mirrored: x counts from right to left.
    data, mask = scans.bold(12) + 5 * np.arange(16)[:, None, None, None], scans.ellipsoid()
    z = (data - data[mask].mean(dtype=np.float64)) / data[mask].std(dtype=np.float64)
    expected = np.where(mask[..., None], z, z[mask].min())[::-1, :, :, :6]
    np.testing.assert_allclose(one["bold"][0, 0].numpy(), expected, atol=1e-3)
    assert any("not known to lie in MNI space" in note for note in scans_of[0].notes)


def test_another_tr_than_v1s_is_refused_unless_meant(tmp_path: Path) -> None:
    contract, path = small(tmp_path, tr=2.0)
    with pytest.raises(BadScan, match=r"TR 2 s, but the model was trained on 0.72 to 0.8 s"):
        fit(find_scans([path], contract)[0], contract, Fitting())
    assert fit(find_scans([path], contract)[0], contract, Fitting(other_tr="keep")).frames == 12


def test_a_v1_file_carries_v1s_contract(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dataclasses import replace

    cfg = load_frozen(finished, [])
    grid, frames = list(CASE.grid), CASE.frames
    (tmp_path / "run").mkdir()
    own = replace(cfg, model=CFG, data=replace(cfg.data, grid=grid, frames=frames))
    freeze(own, tmp_path / "run" / "config.yaml")
    torch.save({"state_dict": {f"model.{name}": value for name, value in v1_state().items()}}, tmp_path / "v1.ckpt")
    with caplog.at_level(logging.INFO, "swift"):
        trained = load_trained(tmp_path / "v1.ckpt", config=tmp_path / "run")
    assert trained.contract == Contract.of_swift_v1(CASE.grid, CASE.frames, cfg.data.frame_stride)
    assert "placed by SwiFT v1, orientation LAS, zscore_global, background the scan's smallest value" in caplog.text
    assert "TR 0.72 to 0.8 s" in caplog.text

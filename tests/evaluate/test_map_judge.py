"""What a judged part of maps leaves: files in the voxel order of the subject's own map, a figure of one contrast."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swift.evaluate.map_judge import leave, predictions_of, write_maps
from swift.evaluate.map_scores import correlations
from tests.cohort import SPEC
from tests.maps import map_cohort, map_data, map_file, rewrite


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort, its maps of coupling stored with x from right to left, then with y and z exchanged."""
    made = map_cohort(tmp_path_factory.mktemp("maps"))
    for subject in range(1, SPEC.n_subjects + 1):
        path = map_file(made, subject)
        image = nib.load(path)
        values, affine = np.asarray(image.dataobj)[::-1], image.affine.copy()
        affine[:3, 3] += affine[:3, 0] * (len(values) - 1)
        affine[:3, 0] *= -1
        if subject % 2:
            values, affine = values.transpose(0, 2, 1), affine[:, [0, 2, 1, 3]]
        rewrite(path, values, affine)
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path_factory.getbasetemp() / "map-judge-cache"))


def test_predictions_have_the_voxel_order_of_the_own_map(folder: Path, tmp_path: Path) -> None:
    """The true maps as predictions: every voxel of the written file is that of the file they came from."""
    data = map_data(folder)
    names = data.subjects_of("test")
    write_maps(data, names, np.stack([data.map_of(name) for name in names]), tmp_path)
    for name in names:
        own, made = (
            nib.load(map_file(folder, int(name[4:]))),
            nib.load(tmp_path / f"{name}_contrast-coupling_map.nii.gz"),
        )
        assert nib.aff2axcodes(made.affine) == nib.aff2axcodes(own.affine) != ("R", "A", "S")
        np.testing.assert_allclose(made.affine, own.affine, atol=1e-5)
        values = np.asarray(made.dataobj)
        known = np.isfinite(values)
        assert known.sum() > 200
        np.testing.assert_allclose(values[known], np.asarray(own.dataobj)[known], atol=1e-5)


def test_the_figure_is_of_the_first_contrast_alone(folder: Path, tmp_path: Path) -> None:
    for subject in range(1, SPEC.n_subjects + 1):  # both contrasts on one grid
        image = nib.load(map_file(folder, subject))
        other = np.random.default_rng(subject).normal(size=image.shape)
        rewrite(map_file(folder, subject, "unrelated"), other, image.affine)
    data = map_data(folder, "task.target.contrasts=[unrelated,coupling]")
    names = data.subjects_of("test")
    truth = np.stack([data.map_of(name) for name in names])
    rng = np.random.default_rng(0)
    said = np.nan_to_num(truth)
    said[:, 0] += rng.normal(size=said[:, 0].shape) * np.linspace(0.2, 3, len(names))[:, None]
    said[:, 1] += 3 * rng.normal(size=said[:, 1].shape)
    leave(data, names, said, predictions_of(data, names, said), tmp_path)
    known = np.isfinite(truth).all((0, 1))
    mean = data.mean[0, known]
    wanted = correlations(truth[:, 0, known] - mean, said[:, 0, known] - mean)
    with np.load(tmp_path / "figures" / "maps.npz") as file:
        assert str(file["contrast"]) == "unrelated"
        np.testing.assert_allclose(file["residual"], wanted, atol=1e-6)
        np.testing.assert_allclose(file["raw"], correlations(truth[:, 0, known], said[:, 0, known]), atol=1e-6)
        own = np.diag(wanted)
        order = np.argsort(-own)
        assert file["subjects"].tolist() == [names[order[0]], names[order[3]], names[order[-1]]]
        np.testing.assert_allclose(file["residual_r"], own[order[[0, 3, -1]]], atol=1e-6)

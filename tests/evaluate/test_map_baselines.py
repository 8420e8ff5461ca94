"""Baselines of maps on the small cohort: against slow versions, and the command that judges them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from swift.data.clips.mixture import Stores
from swift.evaluate import baselines, classical
from swift.evaluate.baselines import MAP_BASELINES, Baselines
from swift.evaluate.map_baselines import MapBaselines
from swift.utils.errors import UserError
from tests.maps import map_cohort, map_data, map_settings


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return map_cohort(tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def made(folder: Path) -> MapBaselines:
    data = map_data(folder, "task.target.contrasts=[coupling,unrelated]")
    shared = Baselines(data, False)
    return MapBaselines(data, shared.units, shared.cleaned)


def test_the_mean_and_its_multiples(made: MapBaselines) -> None:
    names = made.data.subjects_of("test")
    mean = made.data.mean
    np.testing.assert_array_equal(made.predict("mean_map", names), np.broadcast_to(mean, (6, *mean.shape)))
    scaled = made.predict("mean_amplitude", names)
    for k in range(2):
        factor = scaled[:, k] @ mean[k] / (mean[k] @ mean[k])
        np.testing.assert_allclose(scaled[:, k], factor[:, None] * mean[k], rtol=1e-4, atol=1e-5)


def test_the_nearest_subject_is_the_one_of_the_most_alike_connectome(made: MapBaselines) -> None:
    names = made.data.subjects_of("val")
    said = made.predict("nearest", names)
    train = made.train
    for name, maps in zip(names, said, strict=True):
        alike = [np.corrcoef(made._connectome[name], made._connectome[one])[0, 1] for one in train]
        wanted = made.data.map_of(train[int(np.argmax(alike))])
        np.testing.assert_allclose(maps, np.where(np.isfinite(wanted), wanted, made.data.mean), rtol=1e-4, atol=1e-5)


def test_components_by_ridge_stay_in_the_span_of_training_maps(made: MapBaselines) -> None:
    rest = made._rest.reshape(len(made.train), -1)
    said = (made.predict("fc_components", made.data.subjects_of("test")) - made.data.mean).reshape(6, -1)
    weights, *_ = np.linalg.lstsq(rest.T, said.T, rcond=None)
    np.testing.assert_allclose(rest.T @ weights, said.T, atol=1e-4)
    assert np.abs(said).max() > 0


def test_the_regression_on_connectivity_maps_against_scikit_learn(made: MapBaselines) -> None:
    """One parcel of one subject, and a map that is a sum of connectivity maps: given back but for the penalty."""
    from sklearn.linear_model import Ridge

    name = made.train[0]
    seeds, label = made._seeds(name), made.parcels.labels[made.data.space.voxels]
    (scan,) = made._scans[name]
    store = made.data.store
    whole = np.zeros((store.scans[scan].frames, int(np.prod(store.grid))))
    whole[:, store.indices(scan)] = store.read(scan, 0, store.scans[scan].frames) * 1.0
    a, b = store.normalizer(scan, "zscore_voxel")
    whole[:, store.indices(scan)] = whole[:, store.indices(scan)] * a + b
    course = whole[:, made.data.space.voxels[7]]
    if course.any():
        for parcel in range(3):
            signal = made._signals[scan][:, parcel]
            cosine = course @ signal / np.linalg.norm(course) / np.linalg.norm(signal)
            assert seeds[7, parcel] == pytest.approx(np.arctanh(cosine), abs=1e-4)
    rest = np.random.default_rng(0).normal(size=(2, len(label)))
    found = made._coefficients(name, rest, label)
    parcel = 2
    x, y = seeds[label == parcel], rest[:, label == parcel].T
    alpha = 0.1 * np.trace(x.T @ x) / x.shape[1] + 1e-9
    wanted = Ridge(alpha, fit_intercept=False).fit(x, y).coef_.T
    np.testing.assert_allclose(found[1, parcel], wanted, atol=1e-6)
    applied = made._applied(name, found, label)
    np.testing.assert_allclose(applied[1][:, label == parcel], (x @ wanted).T, atol=1e-6)


def test_with_a_budget_of_frames_seeds_are_of_the_part_that_is_left(
    folder: Path,
) -> None:
    """Against correlations over the first 16 of 24 frames."""
    data = map_data(folder, "data.max_frames=192")
    shared = Baselines(data, False)
    made = MapBaselines(data, shared.units, shared.cleaned)
    name = made.train[0]
    (scan,) = made._scans[name]
    part = made._part[scan]
    assert part.stop - part.start == 16
    signal = made._signals[scan]
    assert signal.shape == (16, made.parcels.count)
    voxel = int(np.flatnonzero(np.isin(data.space.voxels, data.store.indices(scan)))[3])
    row = int(np.flatnonzero(data.store.indices(scan) == data.space.voxels[voxel])[0])
    a, b = data.store.normalizer(scan, "zscore_voxel")
    course = data.store.read(scan, part.start, 16)[:, row].astype(np.float64) * a[row] + b[row]
    cosine = course @ signal / np.linalg.norm(course) / np.linalg.norm(signal, axis=0)
    np.testing.assert_allclose(made._seeds(name)[voxel, :-1], np.arctanh(cosine), atol=1e-4)
    assert np.isfinite(made._seeds(name)).all()


def test_denoised_scans_have_baselines_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One scan has no level to take percent of: signals of all are of standardized voxels; the mean map needs none."""
    plain = Stores.normalizer

    def centred(self: Stores, scan: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
        if kind == "percent" and scan == 3:
            raise UserError("normalization percent: the scan's mean is 0, not a positive baseline")
        return plain(self, scan, kind)

    monkeypatch.setattr(Stores, "normalizer", centred)
    data = map_data(folder)
    shared = Baselines(data, False)
    made = MapBaselines(data, shared.units, shared.cleaned)
    names = data.subjects_of("test")
    np.testing.assert_array_equal(made.predict("mean_map", names)[0], data.mean)
    assert shared.parcels is None  # nothing costly was made for it
    assert np.isfinite(made.predict("nearest", names)).all()
    assert "standardized voxels, not percent change: normalization percent: the scan's mean is 0" in caplog.text
    for scan in (3, made._scans[names[0]][0]):
        wanted = made.parcels.cleaned(data.store, scan, "zscore_voxel")
        np.testing.assert_array_equal(made._signals[scan], wanted)


def test_no_baseline_at_all_is_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def broken(*_: object) -> None:
        raise UserError("no brain voxel in common")

    monkeypatch.setattr(classical, "Parcels", broken)
    with pytest.raises(UserError, match="no baseline could be made; nearest by connectome: no brain voxel in common"):
        baselines.run_baselines(map_settings(folder, f"run_dir={tmp_path}"), ["nearest"])


@pytest.mark.slow
def test_the_command_judges_all_of_them_on_one_split(folder: Path, tmp_path: Path) -> None:
    cfg = map_settings(folder, f"run_dir={tmp_path / 'run'}")
    found = baselines.run_baselines(cfg)
    assert tuple(found) == MAP_BASELINES
    assert found["mean_map"]["scores"]["test"]["residual_r"] == 0
    assert found["mean_map"]["scores"]["test"]["identification"] == pytest.approx(1 / 6)
    said = json.loads((tmp_path / "run" / "nearest" / "summary.json").read_text())
    assert said["method"] == "nearest by connectome"
    assert said["n"] == {"train": 12, "val": 6, "test": 6}
    (image,) = (tmp_path / "run" / "mean_map" / "predictions" / "maps").glob(
        f"{map_data(folder).subjects_of('test')[0]}*"
    )
    values = np.asarray(nib.load(image).dataobj).ravel()[map_data(folder).space.voxels]
    np.testing.assert_allclose(values, map_data(folder).mean[0], rtol=1e-6)
    from swift.evaluate.downstream import results
    from swift.report.table1 import columns_of, markdown

    text = markdown(columns_of(results([tmp_path / "run"]), draws=200))
    assert "task_map, residual r (n = 12 + 6)" in text
    assert "| training mean map | 0.000 [0.000, 0.000] |" in text

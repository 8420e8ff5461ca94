"""Maps as labels: placed like scans, NaN and other people's brains left out, and what is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from swift.config.schema import TargetConfig
from swift.data.clips.mixture import Stores
from swift.data.store.format import CorruptData
from swift.data.synthetic.task_maps import subject_map
from swift.data.task_maps.store import MapStore, open_maps
from swift.evaluate.map_judge import predictions_of
from swift.utils.errors import UserError
from tests.cohort import SPEC
from tests.maps import map_cohort, map_data, map_file, rewrite


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return map_cohort(tmp_path_factory.mktemp("maps"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be spoiled, and a cache of its own."""
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made / "maps", tmp_path / "maps")
    for name in ("store", "split.json", "retest"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def opened(folder: Path, **target: object) -> MapStore:
    wanted = {"contrasts": ["coupling"], "maps": str(folder / "maps")} | target
    return open_maps(Stores([folder / "store"]), TargetConfig("map", source="nifti", **wanted))[0]


def dense(maps: MapStore, subject: str, channel: int = 0) -> np.ndarray:
    placed = maps.read(subject)
    out = np.full(int(np.prod(SPEC.grid)), np.nan)
    out[placed.index] = placed.values[channel]
    return out.reshape(SPEC.grid)


def test_a_map_on_the_stores_grid_is_not_touched(folder: Path) -> None:
    maps = opened(folder, contrasts=["unrelated", "coupling"])
    assert maps.contrasts == ["unrelated", "coupling"]
    assert len(maps.subjects) == SPEC.n_subjects
    brain = Stores([folder / "store"]).mask(2)
    for channel, contrast in enumerate(maps.contrasts):
        wanted = np.where(brain, subject_map(SPEC, 2, contrast), np.nan)
        np.testing.assert_array_equal(dense(maps, "sub-0003", channel), wanted.astype(np.float32))


def test_a_map_of_other_voxels_and_axes_lands_where_scipy_puts_it(folder: Path) -> None:
    """A linear ramp of the world's axes in LPS order and 3 mm voxels: interpolation must give it back exactly."""
    grid = nib.load(map_file(folder, 1)).affine
    affine = np.array([[-3.0, 0, 0, 40], [0, -3.0, 0, 25], [0, 0, 3.0, -40], [0, 0, 0, 1]])
    world = np.moveaxis(np.indices((30, 30, 30)), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    for subject in range(1, SPEC.n_subjects + 1):
        rewrite(map_file(folder, subject), world @ [1.0, 2.0, -0.5] + 300, affine)
    found = dense(opened(folder), "sub-0001")
    here = np.moveaxis(np.indices(SPEC.grid), 0, -1) @ grid[:3, :3].T + grid[:3, 3]
    known = np.isfinite(found)
    assert known.sum() > 200
    np.testing.assert_allclose(found[known], (here @ [1.0, 2.0, -0.5] + 300)[known], atol=1e-3)


def test_nan_is_masked_and_a_changed_file_is_read_anew(folder: Path) -> None:
    before = dense(opened(folder), "sub-0002")
    values = np.asarray(nib.load(map_file(folder, 2)).dataobj)
    hole = tuple(np.argwhere(np.isfinite(before))[40])
    values[hole] = np.nan
    rewrite(map_file(folder, 2), values)
    after = dense(opened(folder), "sub-0002")
    assert np.isnan(after[hole])
    assert np.isfinite(before).sum() - np.isfinite(after).sum() == 1
    again = ~np.isnan(after)
    np.testing.assert_array_equal(after[again], before[again])


def test_a_damaged_side_store_is_said(folder: Path) -> None:
    maps = opened(folder)
    with h5py.File(maps.path, "r+") as file:
        file[maps.subjects["sub-0001"]]["values"][0, 5] += 1
    with pytest.raises(CorruptData, match="values of subject sub-0001 differs from its checksum"):
        maps.read("sub-0001")
    maps.read("sub-0002")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda v: v * np.nan, "holds nothing but NaN and 0"),
        (lambda v: np.where(np.isfinite(v), 2.5, np.nan), "constant, 2.5 in all"),
        (lambda v: np.where(np.arange(12)[:, None, None] < 3, v, np.nan), "of the subject's brain"),
        (lambda v: v[:-1], r"shape \(11, 12, 12\) or affine differ from those of most maps"),
        (lambda v: np.stack([v, v], -1), "2 frames; a mask or a map has one volume"),
    ],
)
def test_a_map_that_cannot_be_used_is_left_out_by_name(folder: Path, spoil: object, why: str) -> None:
    path = map_file(folder, 3)
    rewrite(path, spoil(np.asarray(nib.load(path).dataobj)))  # type: ignore[operator]
    maps = opened(folder)
    assert "sub-0003" not in maps.subjects
    assert len(maps.subjects) == SPEC.n_subjects - 1
    (reason,) = maps.failed.values()
    assert path.name in reason
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(reason)


def test_maps_of_another_space_are_refused(folder: Path) -> None:
    path = map_file(folder, 3)
    path.rename(path.with_name("sub-0003_space-T1w_contrast-coupling_map.nii.gz"))
    reason = opened(folder).failed["sub-0003"]
    assert "is in the space T1w, and the scans of the store lie in MNI152" in reason
    for subject in range(1, SPEC.n_subjects + 1):
        for path in (folder / "maps").glob(f"sub-{subject:04d}*coupling*"):
            path.rename(path.with_name(f"sub-{subject:04d}_coupling.nii.gz"))
            rewrite(
                folder / "maps" / f"sub-{subject:04d}_coupling.nii.gz",
                subject_map(SPEC, subject - 1, "coupling"),
                code=1,
            )
    with pytest.raises(UserError, match=r"neither name nor header say its space; name it with task.target.space="):
        opened(folder)
    assert len(opened(folder, space="MNI152NLin6Asym").subjects) == SPEC.n_subjects


def test_a_contrast_may_hold_underscores_and_a_space_may_end_the_name(folder: Path) -> None:
    for subject in range(1, SPEC.n_subjects + 1):
        map_file(folder, subject).rename(folder / "maps" / f"sub-{subject:04d}_face_vs_house.nii.gz")
        own = map_file(folder, subject, "unrelated")
        own.rename(folder / "maps" / f"sub-{subject:04d}_contrast-face_space-MNI152NLin6Asym.nii.gz")
    maps = opened(folder, contrasts=["face", "face_vs_house"])
    assert maps.failed == {}
    brain = Stores([folder / "store"]).mask(2)
    for channel, planted in enumerate(("unrelated", "coupling")):
        wanted = np.where(brain, subject_map(SPEC, 2, planted), np.nan)
        np.testing.assert_array_equal(dense(maps, "sub-0003", channel), wanted.astype(np.float32))
    assert len(opened(folder, contrasts=["face_vs_house"]).subjects) == SPEC.n_subjects


def test_missing_contrasts_and_subjects_are_left_out_and_twins_refused(folder: Path) -> None:
    map_file(folder, 4, "unrelated").unlink()
    for path in (folder / "maps").glob("sub-0005*"):
        path.unlink()
    maps = opened(folder, contrasts=["coupling", "unrelated"])
    assert maps.failed == {"sub-0004": "subject sub-0004 has no map of unrelated"}
    assert not {"sub-0004", "sub-0005"} & set(maps.subjects)
    shutil.copy(map_file(folder, 6), folder / "maps" / "sub-0006_run-2_contrast-coupling_map.nii.gz")
    with pytest.raises(UserError, match="subject sub-0006 has two maps of coupling"):
        opened(folder)
    with pytest.raises(UserError, match=r"two maps of map: .*; name one in task.target.contrasts"):
        opened(folder, contrasts=[])


def test_folders_and_columns_that_are_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"task.target.maps=nowhere: no such folder"):
        opened(folder, maps="nowhere")
    with pytest.raises(UserError, match="no file there fits a subject of the store"):
        opened(folder, contrasts=["faces"])
    with pytest.raises(UserError, match="the manifest has no column faces with files of maps; it has age"):
        opened(folder, maps=None, contrasts=["faces"])


def test_batches_hold_deviations_from_the_training_mean(folder: Path) -> None:
    """Against a loop over subjects, cells and voxels."""
    data = map_data(folder)
    maps = opened(folder)
    train = data.subjects_of("train")
    stack = np.stack([dense(maps, name) for name in train])
    counted = np.isfinite(stack).mean(0) >= 0.9
    np.testing.assert_array_equal(np.flatnonzero(counted), data.space.voxels)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(data.mean[0], np.nanmean(stack[:, counted], axis=0), rtol=1e-5, atol=1e-6)

    def cells(values: np.ndarray) -> np.ndarray:
        out = []
        for cell in data.space.cells:
            x, y, z = (2 * place for place in np.unravel_index(cell, data.space.shape))
            box = (slice(x, x + 2), slice(y, y + 2), slice(z, z + 2))
            some = np.where(counted, values, np.nan)[box]
            out.append(some[np.isfinite(some)].mean() if np.isfinite(some).any() else np.nan)
        return np.array(out)

    mean = np.full(SPEC.grid, np.nan)
    mean[counted] = data.mean[0]
    with np.errstate(invalid="ignore"):
        each = np.stack([cells(values - mean) for values in stack])
    std = np.sqrt(np.nanmean(each**2, axis=1).mean())
    assert data.std[0] == pytest.approx(std, rel=1e-5)
    batch = data.dense(next(iter(data.train_dataloader())))
    for row, scan in enumerate(batch["scan"].tolist()):
        name = data.store.scans[scan].subject
        wanted = each[train.index(name)] / std
        np.testing.assert_allclose(batch["target"][row, 0], wanted, atol=2e-5)
        assert data.people[int(batch["subject"][row])] == name


def test_interpolation_of_cells_takes_nothing_from_outside_the_brain(folder: Path) -> None:
    data = map_data(folder)
    np.testing.assert_allclose(data.space.fine(np.full((1, len(data.space.cells)), 7.0)), 7.0, rtol=1e-6)
    assert map_data(folder, "task.map_step=1").space.fine(data.mean).shape == data.mean.shape


def test_one_subject_in_a_part_is_refused(folder: Path) -> None:
    names = map_data(folder).subjects_of("test")
    for name in names[1:]:
        map_file(folder, int(name[4:])).unlink()
    with pytest.raises(UserError, match=f"the test part has 1 subject with a map \\({names[0]}\\)"):
        map_data(folder)


def test_maps_that_are_all_alike_are_refused(folder: Path) -> None:
    for subject in range(1, SPEC.n_subjects + 1):
        rewrite(map_file(folder, subject), np.broadcast_to(np.arange(1.0, 13), SPEC.grid))
    with pytest.raises(UserError, match="training maps of coupling are alike"):
        map_data(folder)


def test_a_poor_map_that_shrinks_a_part_is_named_before_training(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of six subjects lacks a third of its map; then each of two lacks the half that the other has."""
    one = map_file(folder, 3)
    rewrite(one, np.where(np.arange(12)[:, None, None] < 4, np.nan, np.asarray(nib.load(one).dataobj)))
    data = map_data(folder)
    (part,) = (part for part in data.parts if "sub-0003" in data.subjects_of(part))
    assert part != "train"
    names = data.subjects_of(part)
    known = np.stack([np.isfinite(data.map_of(name)).all(0) for name in names])
    share = known.all(0).mean()
    assert share < 0.85 < known[[name != "sub-0003" for name in names]].all(0).mean()
    lacks = 1 - known[names.index("sub-0003")].mean()
    assert (
        f"the maps of the {part} part share {share:.0%} of the {known.shape[1]} voxels, where alone they are judged; "
        f"sub-0003 costs most and lacks {lacks:.0%}"
    ) in caplog.text
    assert caplog.text.count("costs most") == 1
    half = np.arange(known.shape[1]) % 2 == 0
    plain = data.map_of

    def halved(name: str, store: MapStore | None = None) -> np.ndarray:
        return np.where(half if name == names[0] else ~half, plain(name, store), np.nan)

    data.map_of = halved  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"the maps of the test part share 0% of .*; leave it out, or mend its map"):
        data._check_judged({"test": names[:2]})


def test_second_maps_of_some_are_enough_and_of_nobody_are_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = map_data(folder, f"task.target.retest={folder / 'retest'}")
    used = {part: data.subjects_of(part) for part in ("val", "test")}
    assert "ceiling" not in caplog.text
    assert data.retest is not None
    every = data.retest.subjects
    data.retest.subjects = {name: every[name] for name in data.subjects_of("train")}
    with pytest.raises(UserError, match="no subject of the val and test parts has a usable second map"):
        data._check_judged(used)
    data.retest.subjects = {used["test"][2]: every[used["test"][2]]}
    data._check_judged(used)
    assert "ceiling: 0 of 6 subjects of the val part have a second map" in caplog.text
    assert "ceiling: 1 of 6 subjects of the test part have a second map" in caplog.text
    maps = predictions_of(data, used["test"], np.stack([data.map_of(name) for name in used["test"]]))
    assert maps.retest is not None
    assert np.isfinite(maps.retest).all((1, 2)).tolist() == [False, False, True, False, False, False]
    assert predictions_of(data, used["val"], np.stack([data.map_of(name) for name in used["val"]])).retest is None

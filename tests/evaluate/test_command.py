"""python -m swift.baselines: files that give the printed numbers, features by hand, and nothing learned from tests."""

import json
from dataclasses import replace

import numpy as np
import pytest
from nilearn.connectome import ConnectivityMeasure
from scipy.stats import binom
from sklearn.covariance import LedoitWolf

from swift.data.labels.splits import make_split, save_splits
from swift.data.labels.subjects import people_of
from swift.data.store.reader import Store
from swift.data.synthetic import CohortSpec, write_store
from swift.data.task_module import TargetDataModule
from swift.evaluate import classical as models
from swift.evaluate.__main__ import main
from swift.evaluate.baselines import PER_FRAME, PER_SUBJECT, Baselines, run_baselines
from swift.evaluate.compare import against_labels
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import choose_threshold, scores
from swift.utils.errors import UserError
from tests.small import DATA, settings

QUIET = {"noise_white": 0.1, "noise_smooth": 0.1, "drift": 0.2, "motion": 0.3, "signal": 3.0}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A store of 40 subjects and its split."""
    folder = tmp_path_factory.mktemp("cohort")
    spec = CohortSpec(
        n_subjects=40,
        frames=60,
        grid=(12, 12, 12),
        spacing=10.0,
        seed=2,
        binary_auroc=0.99,
        amplitude_gain=0.8,
        **QUIET,
    )
    write_store(spec, folder / "store")
    split = make_split(people_of(Store(folder / "store").scans, "label_binary"), 0.2, 0.25, seed=0)
    save_splits(folder / "split.json", [split])
    return folder


def options(cohort, task, run_dir="nowhere", *more):
    data = [o for o in DATA if "spacing" not in o]
    return [
        f"task={task}", "data=store", f"data.path={cohort / 'store'}", f"data.split={cohort / 'split.json'}",
        "data.spacing=10.0", *data, f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def data_of(cohort, task):
    cfg = settings(*options(cohort, task))
    return TargetDataModule(cfg.data, cfg.task, cohort / "store", 0)


@pytest.mark.parametrize(("task", "names"), [("synthetic_binary", PER_SUBJECT), ("synthetic_frame", PER_FRAME)])
def test_files_give_the_printed_numbers(cohort, tmp_path, capsys, task, names):
    main(["--json", *options(cohort, task, tmp_path / "run")])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == list(names)
    data = data_of(cohort, task)
    for name, said in printed.items():
        folder = tmp_path / "run" / name
        assert json.loads((folder / "summary.json").read_text()) == said
        val, test = (Predictions.load(folder / "predictions" / f"{part}.csv") for part in ("val", "test"))
        assert test.subjects == data.subjects_of("test")
        assert said["threshold"] == choose_threshold(val)
        again = scores(test, said["threshold"])
        assert {k: v for k, v in said["scores"]["test"].items() if v is not None} == pytest.approx(
            {k: v for k, v in again.items() if np.isfinite(v)}, abs=1e-12
        )
        assert said["n"] == {"train": 22, "val": 8, "test": 10}
    if task == "synthetic_frame":
        assert printed["volume"]["scores"]["test"]["r"] > 0.3
        low, _ = printed["nuisance"]["intervals"]["test"]["r"]
        assert low < 0.1  # the label is a column beside the movement, and is not looked at


def test_labels_of_the_test_and_validation_play_no_part(cohort):
    made = []
    for flip in (False, True):
        data = data_of(cohort, "synthetic_binary")
        held = [s for part in ("val", "test") for s in data.parts[part].scan.tolist()]
        if flip:
            for scan in held:
                data.labels.values[scan] = 1 - data.labels.values[scan]
        made.append(Baselines(data, False).predict("fc"))
    for part in ("val", "test"):
        np.testing.assert_array_equal(made[0][part].scores, made[1][part].scores)
        np.testing.assert_array_equal(made[0][part].target, 1 - made[1][part].target)


@pytest.mark.slow
def test_labels_without_effect_stay_at_chance(cohort):
    """Of 20 labels with nothing in the scans at most as many are "found" as a level of 5 % allows."""
    data = data_of(cohort, "synthetic_null")
    made = Baselines(data, False)
    found = {"amplitude": 0, "fc": 0}
    for seed in range(20):
        labels = np.random.default_rng(seed).permutation(np.arange(40) % 2)
        made.relabel(replace(data.labels, values=[np.array(float(label)) for label in labels]))
        for name in found:
            found[name] += against_labels(made.predict(name)["test"], permutations=500).p < 0.05
    assert max(found.values()) <= binom.ppf(0.999, 20, 0.05), found


def test_other_labels_of_the_same_scans_give_what_a_fresh_start_gives(cohort):
    null, binary = data_of(cohort, "synthetic_null"), data_of(cohort, "synthetic_binary")
    made = Baselines(null, False)
    made.predict("amplitude")
    made.relabel(binary.labels)
    again, fresh = made.predict("amplitude")["test"], Baselines(binary, False).predict("amplitude")["test"]
    np.testing.assert_array_equal(again.target, fresh.target)
    np.testing.assert_allclose(again.scores, fresh.scores, atol=1e-9)
    some = [value if scan else np.array(np.nan) for scan, value in enumerate(binary.labels.values)]
    with pytest.raises(UserError, match="not there for all scans"):
        made.relabel(replace(binary.labels, values=some))


def test_a_task_that_asks_for_the_site_is_not_told_it(cohort):
    made = Baselines(data_of(cohort, "synthetic_site"), False)
    other = Baselines(data_of(cohort, "synthetic_null"), False)
    assert made._features("nuisance")["test"].shape[1] == other._features("nuisance")["test"].shape[1] - 3


def test_the_majority_is_that_of_the_training_subjects(cohort):
    data = data_of(cohort, "synthetic_binary")
    part = data.values_of("train").mean()
    made = Baselines(data, False).predict("constant")["test"]
    np.testing.assert_allclose(made.scores, np.tile([1 - part, part], (10, 1)))
    number = data_of(cohort, "synthetic_continuous")
    mean = Baselines(number, False).predict("constant")["test"].scores
    np.testing.assert_allclose(mean, np.full((10, 1), number.values_of("train").mean()))


def test_parcels_come_from_training_scans_and_their_signal_is_the_mean(cohort):
    store = Store(cohort / "store")
    parcels = models.Parcels(store, range(10), 12)
    assert sorted(set(parcels.labels)) == list(range(-1, 12))
    mask = models.common_mask(store, range(10))
    np.testing.assert_array_equal(parcels.labels >= 0, mask)
    by_hand = np.zeros((60, 12))
    values, index = store.values(30), store.indices(30)
    for p in range(12):
        inside = np.isin(index, np.flatnonzero(parcels.labels == p))
        course = values[:, inside].astype(np.float64)
        by_hand[:, p] = (100 * (course / course.mean(0) - 1)).mean(1)
    np.testing.assert_allclose(parcels.signals(store, 30), by_hand, atol=2e-3)


def test_connectomes_by_hand():
    rng = np.random.default_rng(0)
    # so long that the shrinkage of nilearn's covariance is nothing
    signals = [rng.normal(size=(20_000, 6)) @ rng.normal(size=(6, 6)) for _ in range(8)]
    got = models.connectivity(signals, np.arange(8) < 6, "correlation")
    np.testing.assert_allclose(np.tanh(got[3]), np.corrcoef(signals[3].T)[np.tril_indices(6, -1)], atol=2e-3)
    tangent = models.connectivity(signals, np.arange(8) < 6, "tangent")
    measure = ConnectivityMeasure(kind="tangent", vectorize=True, standardize=None).fit(signals[:6])
    np.testing.assert_allclose(tangent, measure.transform(signals), atol=1e-9)


def test_partial_correlations_are_those_of_the_precision_matrix():
    rng = np.random.default_rng(1)
    signals = [rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) for _ in range(3)]
    got = np.tanh(models.connectivity(signals, np.arange(3) < 2, "partial correlation"))
    lower = np.tril_indices(5, -1)
    for row, one in enumerate(signals):
        shrunk = LedoitWolf().fit((one - one.mean(0)) / one.std(0)).covariance_
        precision = np.linalg.inv(shrunk)
        size = np.sqrt(np.diag(precision))
        np.testing.assert_allclose(got[row], (-precision / np.outer(size, size))[lower], atol=1e-9)
    # The closed form, once more: what is left of two signals without the other three is as correlated.
    long = rng.normal(size=(50_000, 5)) @ rng.normal(size=(5, 5))
    others = np.column_stack([long[:, 2:], np.ones(len(long))])
    rest = long[:, :2] - others @ np.linalg.lstsq(others, long[:, :2], rcond=None)[0]
    found = np.tanh(models.connectivity([long], np.array([True]), "partial correlation"))
    assert found[0, 0] == pytest.approx(np.corrcoef(rest.T)[0, 1], abs=2e-2)


def test_the_subspace_of_co_skewness_holds_the_skewed_directions():
    """Of six sources two are skewed (exponential): in closed form the tensor is 2 (a a a + b b b) of their columns."""
    rng = np.random.default_rng(0)
    mixing = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    # Equal variances in every parcel, so that standardizing does not turn the directions.
    sources = rng.normal(size=(4, 100_000, 6))
    sources[:, :, :2] = rng.exponential(size=(4, 100_000, 2)) - 1
    signals = list(sources @ mixing.T)
    signals[3] = signals[3] + 0.5 * signals[3][:, [0]] * mixing[:, 0]  # one scan has a coupling of its own
    basis = models.coskewness_subspace(signals[:3])
    assert basis.shape == (6, 2)
    angles = np.linalg.svd(basis.T @ mixing[:, :2])[1]
    np.testing.assert_allclose(angles, 1, atol=1e-2)
    got = models.coskewness_connectivity(signals, np.arange(4) < 3)
    train = models.coskewness_subspace(signals[:3])
    unit = (signals[3] - signals[3].mean(0)) / signals[3].std(0)
    assert got.shape == (4, 1)
    assert np.tanh(got[3, 0]) == pytest.approx(
        np.corrcoef((unit @ train).T)[1, 0], abs=3e-3
    )  # nilearn shrinks a little


def test_the_co_skewness_tensor_against_loops():
    rng = np.random.default_rng(3)
    signals = [rng.exponential(size=(30, 4)) for _ in range(2)]
    tensor = np.zeros((4, 4, 4))
    for one in signals:
        unit = (one - one.mean(0)) / one.std(0)
        for i, j, k in np.ndindex(4, 4, 4):
            tensor[i, j, k] += (unit[:, i] * unit[:, j] * unit[:, k]).mean() / 2
    values, vectors = np.linalg.eigh(np.einsum("ijk,ljk->il", tensor, tensor))
    share = np.cumsum(values[::-1]) / values.sum()
    wanted = vectors[:, ::-1][:, : int((share < models.KEPT_SKEWNESS).sum()) + 1]
    found = models.coskewness_subspace(signals)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-9)


def test_movement_takes_no_other_column(cohort):
    store = Store(cohort / "store")
    table = models.movement(store, 0)
    columns = store.confounds(0)
    assert "valence" in columns
    np.testing.assert_allclose(table[:, 0], columns["trans_x"])
    np.testing.assert_allclose(table[:, 6], columns["framewise_displacement"])
    assert table.shape == (60, 7)


def test_a_linear_effect_is_found_and_numbers_come_back_in_their_unit():
    rng = np.random.default_rng(0)
    n = 200
    x = rng.normal(size=(n, 5)) * [1, 100, 0.01, 1, 1]
    y = 50 + 7 * x[:, 0] + 0.05 * x[:, 1] + 0.5 * rng.normal(size=n)
    units = models.Units(
        np.arange(n),
        np.array([f"s{i // 2:03d}" for i in range(n)]),
        np.full(n, -1),
        np.zeros(n, int),
        np.ones(n, int),
        y,
    )
    model = models.fitted(x, units, "regression")
    got = models.predicted(model, x, units, "regression", 0)[:, 0]
    assert np.sqrt(np.mean((got - y) ** 2)) < 0.6
    three = replace(units, target=(y > 45).astype(float) + (y > 55))
    p = models.predicted(models.fitted(x, three, "multiclass"), x, three, "multiclass", 4)
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p[:, 3] == 0).all()  # a class that training never saw
    assert (p.argmax(1) == three.target).mean() > 0.85


def test_few_components_are_the_whole_volume():
    """Ridge on all principal components of n rows predicts what ridge on all voxels does."""
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(1)
    x, other, y = rng.normal(size=(30, 400)), rng.normal(size=(7, 400)), rng.normal(size=30)
    a, b = models.components(x, other)
    factor = np.linalg.norm(x - x.mean(0)) / np.linalg.norm(a)
    want = Ridge(10.0).fit(x - x.mean(0), y).predict(other - x.mean(0))
    np.testing.assert_allclose(Ridge(10.0 / factor**2).fit(a, y).predict(b), want, atol=1e-8)


def test_what_cannot_be_done_is_said(cohort, tmp_path, capsys):
    cfg = settings(*options(cohort, "pretrain"))
    with pytest.raises(UserError, match="has no target"):
        run_baselines(cfg)
    with pytest.raises(SystemExit) as stop:
        main(["--only", "volume", *options(cohort, "synthetic_binary", tmp_path)])
    assert stop.value.code == 2
    assert "--only volume: legal for task=synthetic_binary are constant, nuisance" in capsys.readouterr().err
    one = models.Units(
        *(np.zeros(4, int) for _ in range(1)), np.array(["a"] * 4), -np.ones(4, int), *(np.zeros(4),) * 3
    )
    with pytest.raises(UserError, match="1 training subject:"):
        models.fitted(np.eye(4), one, "regression")
    two = replace(one, subject=np.array(["a", "b"]))
    with pytest.raises(UserError, match=r"2 training subjects.*at least 3 are needed"):
        models.fitted(np.eye(2), two, "regression")
    three = replace(one, subject=np.array(["a", "b", "c"]), target=np.ones(3))
    with pytest.raises(UserError, match="3 training units do not do for a baseline's folds"):
        models.fitted(np.eye(3), three, "binary")


def test_tasks_of_ones_own_and_settings_after_options(cohort, tmp_path, capsys):
    (tmp_path / "conf" / "task").mkdir(parents=True)
    text = "defaults: [_common, _target, _self_]\nname: mine\nloss: cross_entropy\ntarget:\n  kind: binary\n"
    text += '  column: label_binary\n  classes: ["0", "1"]\n'
    (tmp_path / "conf" / "task" / "mine.yaml").write_text(text)
    before, after = options(cohort, "mine", tmp_path / "run"), ["model.patch_size=[99,99,99,1]", "seed=3"]
    main([*before, "--only", "constant", "--json", "--config-dir", str(tmp_path / "conf"), *after])
    found = json.loads(capsys.readouterr().out)
    assert (found["constant"]["task"], found["constant"]["seed"]) == ("mine", 3)
    with pytest.raises(SystemExit):
        main([*before, "--config-dir", str(tmp_path / "none")])
    assert "none: no such folder" in capsys.readouterr().err

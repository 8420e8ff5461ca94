"""Scores against torchmetrics, intervals against a bootstrap written out with scikit-learn, thresholds by hand."""

import json

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
from sklearn import metrics

from swift.evaluate.predictions import Predictions
from swift.evaluate.resampling import block_length, bootstrap, clusters, draw_weights, weighted_scores
from swift.evaluate.scores import choose_threshold, decide, judge, need_classes, resampled, scores
from swift.utils.errors import UserError


def made(kind, n=60, seed=0, frames=1, ties=False):
    """n subjects with `frames` units each."""
    rng = np.random.default_rng(seed)
    total = n * frames
    subject = np.repeat([f"s{i:03d}" for i in range(n)], frames)
    scan = np.where(frames > 1, np.char.add(subject, "_run"), "")
    frame = np.tile(np.arange(frames), n) if frames > 1 else np.full(n, -1)
    if kind == "regression":
        target = rng.normal(100, 15, total)
        return Predictions(kind, [], subject, scan, frame, target, 0.5 * target + rng.normal(50, 10, total))
    count = 2 if kind == "binary" else 3
    target = rng.integers(count, size=total)
    logits = rng.normal(0, 1, (total, count)) + 1.2 * np.eye(count)[target]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if ties:
        p = np.round(p * 4) / 4
        p[:, -1] = 1 - p[:, :-1].sum(1)
        p = np.abs(p) / np.abs(p).sum(1, keepdims=True)
    return Predictions(kind, ["a", "b", "c"][:count], subject, scan, frame, target, p)


@pytest.mark.parametrize("ties", [False, True])
def test_binary_scores_are_those_of_torchmetrics(ties):
    some = made("binary", ties=ties)
    p, target = torch.tensor(some.scores[:, 1]), torch.tensor(some.target).long()
    said = (p >= 0.4).long()
    expected = {
        "auroc": tm.auroc(p, target, task="binary"),
        "balanced_accuracy": tm.accuracy(said, target, task="multiclass", num_classes=2, average="macro"),
        "f1": tm.f1_score(said, target, task="binary"),
        "average_precision": tm.average_precision(p, target, task="binary"),
        "accuracy": tm.accuracy(said, target, task="binary"),
    }
    assert scores(some, 0.4) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)


def test_scores_of_several_classes_are_those_of_torchmetrics():
    some = made("multiclass")
    p, target = torch.tensor(some.scores), torch.tensor(some.target).long()
    how = {"task": "multiclass", "num_classes": 3, "average": "macro"}
    expected = {
        "auroc": tm.auroc(p, target, **how),
        "balanced_accuracy": tm.accuracy(p, target, **how),
        "f1": tm.f1_score(p, target, **how),
        "average_precision": tm.average_precision(p, target, **how),
        "accuracy": tm.accuracy(p, target, **(how | {"average": "micro"})),
    }
    assert scores(some) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)


def test_scores_of_values_are_those_of_torchmetrics():
    some = made("regression")
    value, target = torch.tensor(some.scores[:, 0]), torch.tensor(some.target)
    expected = {
        "mae": tm.mean_absolute_error(value, target),
        "rmse": tm.mean_squared_error(value, target, squared=False),
        "r": tm.pearson_corrcoef(value, target),
        "r2": tm.r2_score(value, target),
    }
    assert scores(some) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-6)


def test_a_brute_force_count_from_the_saved_file_gives_the_numbers(tmp_path):
    some = made("binary")
    path = some.save(tmp_path / "test.csv")
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    ill = [float(r[5]) for r in rows if r[3] == "b"]
    well = [float(r[5]) for r in rows if r[3] == "a"]
    auroc = sum((i > w) + 0.5 * (i == w) for i in ill for w in well) / len(ill) / len(well)
    found, spared = sum(p >= 0.3 for p in ill) / len(ill), sum(p < 0.3 for p in well) / len(well)
    told = sum(float(r[5]) >= 0.3 for r in rows)
    got = scores(Predictions.load(path), 0.3)
    assert got["auroc"] == pytest.approx(auroc, abs=1e-12)
    assert got["balanced_accuracy"] == pytest.approx((found + spared) / 2, abs=1e-12)
    assert got["f1"] == pytest.approx(2 * sum(p >= 0.3 for p in ill) / (told + len(ill)), abs=1e-12)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("ties", [False, True])
def test_weighted_scores_are_those_of_the_repeated_units(kind, ties):
    some = made(kind, ties=ties)
    weights = np.random.default_rng(3).integers(0, 4, (5, len(some)))
    got = weighted_scores(some, decide(some, 0.4), weights)
    for draw, w in enumerate(weights):
        rows = np.repeat(np.arange(len(some)), w)
        again = Predictions(
            kind, some.classes, [str(i) for i in range(len(rows))], [""] * len(rows), [-1] * len(rows),
            some.target[rows], some.scores[rows],
        )  # fmt: skip
        assert {k: v[draw] for k, v in got.items()} == pytest.approx(scores(again, 0.4), abs=1e-10)


def test_intervals_are_those_of_a_bootstrap_written_out():
    some = made("binary", n=40, frames=5)
    _, cluster = clusters(some)
    values = []
    for weights in draw_weights(cluster, 7, 200):
        for w in weights:
            assert all(len(set(w[cluster == c])) == 1 for c in range(3))
            values.append(metrics.roc_auc_score(some.target, some.scores[:, 1], sample_weight=w))
    low, high = np.quantile(values, [0.025, 0.975])
    assert resampled(some, 0.5, seed=7, draws=200).intervals["auroc"] == pytest.approx((low, high), abs=1e-10)


def test_the_interval_of_a_mean_has_the_width_theory_gives():
    """MAE is a mean: its 95 % interval is 2 x 1.96 x sd / sqrt(n) wide; over subjects when these are alike inside."""
    n, frames = 400, 4
    some = made("regression", n=n)
    error = np.abs(some.scores[:, 0] - some.target)
    low, high = resampled(some, seed=1).intervals["mae"]
    assert (high - low) == pytest.approx(2 * 1.96 * error.std() / n**0.5, rel=0.08)
    rows = np.repeat(np.arange(n), frames)  # every frame of a subject the same: no more information than one
    many = Predictions(
        "regression", [], some.subject[rows], some.subject[rows], np.tile(np.arange(frames), n),
        some.target[rows], some.scores[rows],
    )  # fmt: skip
    assert resampled(many, seed=1).intervals["mae"] == pytest.approx((low, high), abs=1e-9)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """AUROC of two normals d' apart is known; of 200 samples of 80 subjects about 95 % of the intervals hold it."""
    from scipy.stats import norm

    truth, held = norm.cdf(1.5 / 2**0.5), 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        target = np.arange(80) % 2
        x = rng.normal(size=80) + 1.5 * target
        p = 1 / (1 + np.exp(-x))
        some = Predictions("binary", ["n", "y"], [str(i) for i in range(80)], [""] * 80, [-1] * 80, target,
                           np.stack([1 - p, p], 1))  # fmt: skip
        low, high = resampled(some, 0.5, seed, draws=400).intervals["auroc"]
        held += low <= truth <= high
    assert 178 <= held <= 198


def test_one_subject_is_resampled_in_blocks_of_its_time():
    one = made("binary", n=1, frames=103)
    method, block = clusters(one)
    length = block_length(103)
    assert (method, length) == ("blocks", 10)
    np.testing.assert_array_equal(block, np.minimum(np.arange(103) // 10, 9))
    result = resampled(one, draws=100)
    assert (result.method, result.clusters) == ("blocks", 10)


def test_draws_without_a_class_are_left_out_and_counted():
    target = np.array([1] + [0] * 9)
    p = np.linspace(0.1, 0.9, 10)[::-1]
    some = Predictions("binary", ["n", "y"], [f"s{i}" for i in range(10)], [""] * 10, [-1] * 10, target,
                       np.stack([1 - p, p], 1))  # fmt: skip
    result = bootstrap(some, decide(some), 0, 4000)
    expected = 4000 * 0.9**10  # the only positive is not drawn
    assert result.skipped["auroc"] == pytest.approx(expected, abs=4 * (expected * (1 - 0.9**10)) ** 0.5)
    assert result.skipped["accuracy"] == 0
    assert np.isnan(result.intervals["auroc"]).all()  # 1.0 in every draw: ten subjects are too few to say so
    assert "auroc" in result.too_few


def test_the_threshold_is_the_best_of_all_and_of_equals_the_nearest_to_one_half():
    p = np.array([0.05, 0.1, 0.15, 0.3, 0.2, 0.35, 0.6])
    target = np.array([0, 0, 0, 0, 1, 1, 1])
    val = Predictions("binary", ["n", "y"], list("abcdefg"), [""] * 7, [-1] * 7, target, np.stack([1 - p, p], 1))
    threshold = choose_threshold(val)
    best = max(metrics.balanced_accuracy_score(target, p >= t) for t in np.linspace(0, 1, 1001))
    assert metrics.balanced_accuracy_score(target, p >= threshold) == best
    assert threshold == pytest.approx(0.175)
    separated = val.take(np.array([0, 1, 6]))
    assert choose_threshold(separated) == pytest.approx(0.35)


def test_a_class_missing_in_a_part_is_named():
    some = made("binary", n=20)
    only = some.take(some.target == 0)
    with pytest.raises(UserError, match="class 'b' has no unit in validation"):
        choose_threshold(only)
    with pytest.raises(UserError, match="class 'b' has no unit in test"):
        need_classes(only, "test")
    assert np.isnan(scores(only)["auroc"])


def test_a_constant_prediction_has_no_correlation_and_chance_auroc():
    some = made("regression", n=10)
    flat = Predictions("regression", [], some.subject, some.scan, some.frame, some.target, np.full(10, 100.0))
    got = scores(flat)
    assert np.isnan(got["r"])
    assert got["r2"] <= 0
    assert np.isnan(resampled(flat).intervals["r"]).all()
    coin = made("binary", n=10)
    coin = Predictions("binary", coin.classes, coin.subject, coin.scan, coin.frame, coin.target, np.full((10, 2), 0.5))
    assert scores(coin)["auroc"] == 0.5


def test_the_judgement_is_json_and_takes_the_threshold_from_validation():
    val, test = made("binary", seed=1), made("binary", seed=2)
    said = judge(val, test, seed=0, draws=100)
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["threshold"] == choose_threshold(val)
    assert said["scores"]["test"] == scores(test, said["threshold"])
    assert said["subjects"] == {"val": 60, "test": 60}
    assert said["bootstrap"]["over"] == "subjects"

"""Scores of maps against scipy and closed forms; neither the mean map nor the outside of the brain wins them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from swift.evaluate.map_scores import (
    MapPredictions,
    correlations,
    dice,
    intervals_of,
    judge,
    judge_contrast,
    judged,
    permuted,
    scores_of,
)
from swift.evaluate.resampling import draw_weights
from swift.utils.errors import UserError

N, V = 9, 60


def maps_of(seed: int = 0, skill: float = 0.7, contrasts: int = 1) -> MapPredictions:
    rng = np.random.default_rng(seed)
    mean = rng.normal(0, 3, (contrasts, V))
    own = rng.normal(size=(N, contrasts, V))
    said = mean + skill * own + 0.3 * rng.normal(size=own.shape)
    names = [f"s{i}" for i in range(N)]
    retest = mean + own + 0.5 * rng.normal(size=own.shape)
    return MapPredictions.shared(names, [f"c{k}" for k in range(contrasts)], mean + own, said, mean, retest)


def test_every_score_against_scipy() -> None:
    maps = maps_of()
    truth, said, mean = maps.truth[:, 0], maps.predicted[:, 0], maps.mean[0]
    assert maps.retest is not None
    found = judge_contrast(truth, said, mean, maps.retest[:, 0])
    c = np.array([[stats.pearsonr(t, p).statistic for p in said] for t in truth])
    rest = np.array([[stats.pearsonr(t - mean, p - mean).statistic for p in said] for t in truth])
    np.testing.assert_allclose(found.raw, c, atol=1e-12)
    np.testing.assert_allclose(found.residual, rest, atol=1e-12)
    for j in range(N):
        others = np.delete(c[:, j], j)
        assert found.values["r"][j] == pytest.approx(c[j, j])
        assert found.values["residual_r"][j] == pytest.approx(rest[j, j])
        assert found.values["identification"][j] == (c[:, j].argmax() == j)
        assert found.values["rank"][j] == pytest.approx((stats.rankdata(c[:, j])[j] - 1) / (N - 1))
        assert found.values["diagonality"][j] == pytest.approx(c[j, j] - others.mean())
        again = maps.retest[j, 0]
        assert found.values["ceiling_r"][j] == pytest.approx(stats.pearsonr(truth[j], again).statistic)
        wanted = stats.pearsonr(truth[j] - mean, again - mean).statistic
        assert found.values["ceiling_residual_r"][j] == pytest.approx(wanted)
        for share, value in zip(range(5, 55, 5), found.dice[:, j], strict=True):
            count = round(share / 100 * V)
            a, b = (set(np.argsort(one[j])[-count:].tolist()) for one in (truth, said))
            assert value == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    centred = [(x - mean) - (x - mean).mean(1, keepdims=True) for x in (truth, said)]
    wanted = stats.linregress(centred[1].ravel(), centred[0].ravel()).slope
    assert scores_of(found)["slope"] == pytest.approx(wanted)


def test_the_mean_map_has_a_high_r_and_nothing_else() -> None:
    """What most published figures are: r 0.9 and no knowledge of anybody."""
    maps = maps_of()
    said = np.broadcast_to(maps.mean, maps.truth.shape)
    found = scores_of(judge_contrast(maps.truth[:, 0], said[:, 0], maps.mean[0]))
    assert found["r"] > 0.9
    assert found["residual_r"] == 0
    assert found["identification"] == pytest.approx(1 / N, abs=1e-12)
    assert found["rank"] == pytest.approx(0.5)
    assert found["diagonality"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(found["slope"])
    # Nor by its size alone.
    scaled = scores_of(judge_contrast(maps.truth[:, 0], 1.7 * said[:, 0], maps.mean[0]))
    assert scaled["identification"] == pytest.approx(1 / N, abs=1e-12)


def test_a_prediction_pulled_to_zero_outside_the_brain_gains_nothing() -> None:
    """The released code correlates over the whole box, where zeros of both sides agree."""
    maps = maps_of(skill=0.0)
    box = 5 * V
    truth, said = np.full((N, 1, box), np.nan), np.zeros((N, 1, box))
    truth[..., :V], said[..., :V] = maps.truth, maps.predicted
    mean = np.zeros((1, box))
    mean[:, :V] = maps.mean
    inside = MapPredictions.shared(maps.subjects, maps.contrasts, truth, said, mean)
    ours, plain = (
        scores_of(judged(inside)[0]),
        scores_of(judge_contrast(maps.truth[:, 0], maps.predicted[:, 0], maps.mean[0])),
    )
    assert ours == pytest.approx(plain)
    shifted = 4 + np.nan_to_num(truth[:, 0], nan=-4.0)  # activation that is positive in the brain
    naive = correlations(shifted, np.where(np.arange(box) < V, 4.0, 0.0)[None])
    assert naive.min() > 0.5  # a mask has that "skill"


def test_perfect_predictions() -> None:
    maps = maps_of()
    found = scores_of(judge_contrast(maps.truth[:, 0], maps.truth[:, 0], maps.mean[0]))
    assert {name: found[name] for name in ("r", "residual_r", "identification", "rank", "dice", "slope")} == (
        pytest.approx(dict.fromkeys(("r", "residual_r", "identification", "rank", "dice", "slope"), 1.0))
    )


def test_scale_and_unit_do_not_matter_but_for_the_slope() -> None:
    maps = maps_of()
    truth, said, mean = maps.truth[:, 0], maps.predicted[:, 0], maps.mean[0]
    plain = scores_of(judge_contrast(truth, mean + (said - mean), mean))
    wide = scores_of(judge_contrast(truth * 1e4, 1e4 * (mean + 2 * (said - mean)), mean * 1e4))
    assert wide["residual_r"] == pytest.approx(plain["residual_r"])
    assert wide["slope"] == pytest.approx(plain["slope"] / 2)


def test_intervals_are_those_of_drawn_subjects() -> None:
    """Against NumPy's own draws of subjects: the same quantiles up to chance, and exact for a constant."""
    one, _ = judged(maps_of(contrasts=2))
    found = intervals_of(one, 0, 4000)
    rng = np.random.default_rng(1)
    rows = rng.integers(0, N, (20000, N))
    for name in ("residual_r", "identification", "dice"):
        wanted = np.quantile(one.values[name][rows].mean(1), [0.025, 0.975])
        np.testing.assert_allclose(found[name], wanted, atol=0.01)
    slopes = one.slope[0][rows].sum(1) / one.slope[1][rows].sum(1)
    np.testing.assert_allclose(found["slope"], np.quantile(slopes, [0.025, 0.975]), atol=0.01)


def test_several_contrasts_are_averaged() -> None:
    maps = maps_of(contrasts=3)
    whole, each = judged(maps)
    for name, value in scores_of(whole).items():
        if name != "slope":
            assert value == pytest.approx(np.mean([scores_of(one)[name] for one in each.values()]))
    assert scores_of(whole)["slope"] == pytest.approx(np.mean([scores_of(one)["slope"] for one in each.values()]))


def test_p_is_that_of_all_permutations() -> None:
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(5, 5)) + 0.8 * np.eye(5)
    every = [matrix[list(order), range(5)].mean() for order in itertools.permutations(range(5))]
    wanted = np.mean(np.array(every) >= np.trace(matrix) / 5 - 1e-12)
    assert permuted(matrix, 0, 20000) == pytest.approx(wanted, abs=0.01)


def test_p_holds_its_level_where_cells_of_c_are_dependent() -> None:
    """Without any relation p is uniform; a t-test of diagonal against the rest would not be with so few subjects."""
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=20)
        truth, said = (shared + rng.normal(size=(8, 20)) for _ in range(2))
        p.append(permuted(correlations(truth, said), seed, 199))
    assert stats.kstest(p, "uniform").pvalue > 0.05


def test_dice_of_disjoint_and_equal_tops() -> None:
    ramp = np.arange(40.0)[None]
    assert dice(ramp, ramp).ravel() == pytest.approx(1)
    assert dice(ramp, -ramp).ravel() == pytest.approx(0)


def test_the_summary_names_chance_and_the_units() -> None:
    maps = maps_of(contrasts=2)
    said = judge(maps, maps, 0, 200)
    assert said["chance"]["identification"] == 1 / N
    assert said["units"] == {"val": N, "test": N}
    assert set(said["contrasts"]) == {"c0", "c1"}
    assert said["p"]["residual_r"] == pytest.approx(1 / 2001)
    assert said["scores"]["test"]["residual_r"] == pytest.approx(scores_of(judged(maps)[0])["residual_r"])


def test_the_ceiling_is_of_those_who_have_a_second_map() -> None:
    whole = maps_of(contrasts=2)
    assert whole.retest is not None
    some = whole.retest.copy()
    some[[1, 4]] = np.nan
    maps = MapPredictions.shared(whole.subjects, whole.contrasts, whole.truth, whole.predicted, whole.mean, some)
    assert maps.truth.shape == whole.truth.shape  # who has none costs no voxel
    found, all_ = judged(maps)[0], judged(whole)[0]
    has = np.delete(np.arange(N), [1, 4])
    for name in ("ceiling_r", "ceiling_residual_r"):
        assert scores_of(found)[name] == pytest.approx(all_.values[name][has].mean())
    assert scores_of(found)["residual_r"] == scores_of(all_)["residual_r"]
    weights = next(iter(draw_weights(np.arange(N), 0, 500)))
    drawn = [(w[has] @ all_.values["ceiling_r"][has]) / w[has].sum() for w in weights]
    np.testing.assert_allclose(intervals_of(found, 0, 500)["ceiling_r"], np.quantile(drawn, [0.025, 0.975]))
    assert judge(whole, maps, 0, 100)["retest"] == {"val": N, "test": N - 2}
    some[:] = np.nan
    nobody = MapPredictions.shared(whole.subjects, whole.contrasts, whole.truth, whole.predicted, whole.mean, some)
    assert nobody.retest is None


def test_one_subject_and_twins_are_refused() -> None:
    maps = maps_of()
    with pytest.raises(UserError, match=r"maps of 1 subject \(s0\)"):
        MapPredictions.shared(["s0"], ["c"], maps.truth[:1], maps.predicted[:1], maps.mean)
    with pytest.raises(UserError, match="maps of subject s1: twice"):
        MapPredictions.shared(["s1", "s1"], ["c"], maps.truth[:2], maps.predicted[:2], maps.mean)
    truth = maps.truth[:2].copy()
    truth[0, :, ::2], truth[1, :, 1::2] = np.nan, np.nan
    with pytest.raises(UserError, match="no voxel in common"):
        MapPredictions.shared(["a", "b"], ["c"], truth, maps.predicted[:2], maps.mean)

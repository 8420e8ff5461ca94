"""Tests of differences: closed forms, statsmodels and scipy, and the level under the null by simulation."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from swift.evaluate.compare import (
    against_labels,
    corrected_t,
    holm,
    main_score,
    need_same_units,
)
from swift.evaluate.downstream import Result, compare
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import scores
from swift.utils.errors import UserError


def values(target, value, frames=1):
    n = len(target) // frames
    subject = np.repeat([f"s{i:03d}" for i in range(n)], frames)
    frame = np.tile(np.arange(frames), n) if frames > 1 else np.full(n, -1)
    scan = subject if frames > 1 else np.full(n, "")
    return Predictions("regression", [], subject, scan, frame, target, value)


def chances(target, p):
    n = len(target)
    return Predictions(
        "binary", ["n", "y"], [f"s{i:03d}" for i in range(n)], [""] * n, [-1] * n, target, np.stack([1 - p, p], 1)
    )


def paired_bootstrap(a, b, score, seed=0, draws=2000):
    """What a table makes of two methods, each (predictions, threshold) a training seed, on one split."""
    runs = [
        [
            Result(Path(), method, "task", number, "split", found, at, 100, {}, scores(found, at))
            for number, (found, at) in enumerate(given)
        ]
        for method, given in (("a", a), ("b", b))
    ]
    return compare(*runs, score, seed, draws)


def test_the_corrected_t_is_the_formula_and_without_overlap_the_plain_test():
    d = [0.02, 0.05, -0.01, 0.04, 0.03]
    got = corrected_t(d, 80, 20)
    t = np.mean(d) / np.sqrt((1 / 5 + 0.25) * np.var(d, ddof=1))
    assert got.p == pytest.approx(2 * stats.t.sf(t, 4))
    assert got.low == pytest.approx(np.mean(d) - stats.t.ppf(0.975, 4) * np.mean(d) / t)
    assert corrected_t(d, 1e12, 1).p == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    assert corrected_t([0.0, 0.0], 8, 2).p == 1
    assert corrected_t([0.1, 0.1], 8, 2).p == 0
    with pytest.raises(UserError, match="at least 2"):
        corrected_t([0.1], 8, 2)


def test_the_corrected_t_holds_its_level_over_random_splits_and_the_plain_one_does_not():
    """Two learners that are equally good: least squares on one of two equally informative features."""
    rng = np.random.default_rng(0)
    plain = corrected = 0
    repeats, n, tested = 300, 60, 20
    for _ in range(repeats):
        y = rng.normal(size=n)
        x = y[:, None] + rng.normal(size=(n, 2))
        differences = []
        for _ in range(10):
            order = rng.permutation(n)
            test, train = order[:tested], order[tested:]
            errors = []
            for k in range(2):
                slope, cut = np.polyfit(x[train, k], y[train], 1)
                errors.append(np.abs(slope * x[test, k] + cut - y[test]).mean())
            differences.append(errors[0] - errors[1])
        plain += stats.ttest_1samp(differences, 0).pvalue < 0.05
        corrected += corrected_t(differences, n - tested, tested).p < 0.05
    assert corrected <= stats.binom.ppf(0.999, repeats, 0.05)
    assert plain / repeats > 0.2


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_tests_on_one_test_set_hold_their_level(kind):
    """Two methods that see the truth through noise of equal size: about 5 % are found different."""
    found = 0
    repeats = 150
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        n = 60
        target = (np.arange(n) % 2).astype(float) if kind == "binary" else rng.normal(size=n)
        seen = target[:, None] + rng.normal(size=n)[:, None] + 0.7 * rng.normal(size=(n, 2))
        if kind == "binary":
            a, b = (chances(target, 1 / (1 + np.exp(-s * seen[:, i]))) for i, s in enumerate((1.0, 3.0)))
        else:
            a, b = values(target, seen[:, 0]), values(target, 5 * seen[:, 1] + 2)
        score = "auroc" if kind == "binary" else "r"
        found += paired_bootstrap([(a, 0.5)], [(b, 0.5)], score, seed, 300).p < 0.05
    assert stats.binom.ppf(0.001, repeats, 0.03) <= found <= stats.binom.ppf(0.999, repeats, 0.07)


def test_a_real_difference_is_found_with_its_size_and_seeds_are_averaged():
    rng = np.random.default_rng(5)
    target = rng.normal(size=100)
    good, bad = values(target, target + 0.3 * rng.normal(size=100)), values(target, target + 2 * rng.normal(size=100))
    test = paired_bootstrap([(good, 0.5)], [(bad, 0.5)], "r")
    assert test.difference == pytest.approx(scores(good)["r"] - scores(bad)["r"])
    assert test.low > 0
    assert test.p == pytest.approx(2 / 2001)
    both = paired_bootstrap([(good, 0.5), (bad, 0.5)], [(bad, 0.5)], "r")
    assert both.difference == pytest.approx(test.difference / 2)
    same = paired_bootstrap([(good, 0.5)], [(good, 0.5)], "mae")
    assert (same.difference, same.p) == (0, 1)


@pytest.mark.parametrize("subjects", [2, 4, 8])
def test_a_handful_of_subjects_is_never_sure(subjects):
    """One method right about everybody, the other wrong: no draw differs, yet p is that of swapping signs."""
    target = np.arange(subjects) % 2
    right, wrong = chances(target, target * 0.8 + 0.1), chances(target, 0.9 - target * 0.8)
    test = paired_bootstrap([(right, 0.5)], [(wrong, 0.5)], "auroc")
    assert test.difference == 1
    assert test.p == pytest.approx(2 / 2**subjects)


def test_permutation_of_labels_is_the_exact_test_for_few_subjects():
    """All 20 ways to place three labels, by hand: p approaches the exact one."""
    target, p = np.array([0, 0, 0, 1, 1, 1.0]), np.array([0.1, 0.5, 0.2, 0.4, 0.9, 0.8])
    observed = scores(chances(target, p))["auroc"]
    every = []
    for ones in itertools.combinations(range(6), 3):
        label = np.isin(np.arange(6), ones)
        every.append(np.mean([(i > j) for i in p[label] for j in p[~label]]))
    exact = np.mean(np.array(every) >= observed - 1e-12)
    assert against_labels(chances(target, p), permutations=4000).p == pytest.approx(exact, abs=0.03)


def test_shifted_frames_hold_the_level_where_shuffled_frames_would_not():
    repeats, found, naive = 150, 0, 0
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        courses = np.cumsum(rng.normal(size=(2, 160)), 1)
        courses = np.stack([np.convolve(c - c.mean(), np.ones(5) / 5, "same") for c in courses])
        courses -= np.array([np.polyval(np.polyfit(np.arange(160), c, 1), np.arange(160)) for c in courses])
        found += against_labels(values(courses[0], courses[1], frames=160), seed, 100).p < 0.05
        naive += stats.pearsonr(courses[0], courses[1], alternative="greater").pvalue < 0.05
    assert found <= stats.binom.ppf(0.999, repeats, 0.06)
    assert naive / repeats > 0.25


def test_the_main_score_is_the_printed_one():
    rng = np.random.default_rng(2)
    target, p = rng.integers(3, size=40), rng.dirichlet([1, 1, 1], 40)
    some = Predictions("multiclass", list("abc"), [str(i) for i in range(40)], [""] * 40, [-1] * 40, target, p)
    assert float(main_score(some.kind, some.target, some.scores)) == pytest.approx(scores(some)["auroc"], abs=1e-12)
    number = values(rng.normal(size=9), rng.normal(size=9))
    assert float(main_score("regression", number.target, number.scores)) == pytest.approx(scores(number)["r"])


def test_holm_is_that_of_statsmodels():
    p = [0.04, 0.001, 0.03, 0.5, 0.012]
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    assert holm([]) == []


def test_methods_on_different_subjects_are_not_compared():
    target = np.arange(6.0)
    a = values(target, target)
    with pytest.raises(UserError, match=r"has \('s005', '', -1\).*same split"):
        need_same_units(a, a.take(np.arange(5)))
    with pytest.raises(UserError, match="other targets"):
        need_same_units(a, values(target[::-1], target))
    with pytest.raises(UserError, match="cannot be compared"):
        need_same_units(a, chances(target % 2, target / 6))
    with pytest.raises(UserError, match="constant target"):
        against_labels(values(np.ones(4), np.arange(4.0)))

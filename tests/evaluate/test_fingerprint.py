"""Identification and reliability against loops and the analysis of variance written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from swift.evaluate.fingerprint import fingerprint, icc, identified
from swift.evaluate.resampling import wilson
from swift.utils.errors import UserError


def cohort(noise: float, scans: int = 3, people: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    subjects = np.repeat([f"s{i}" for i in range(people)], scans)
    return np.repeat(rng.normal(size=(people, 40)), scans, axis=0) + noise * rng.normal(
        size=(len(subjects), 40)
    ), subjects


def test_identified_is_the_nearest_by_correlation():
    features, subjects = cohort(2.0)
    z = (features - features.mean(0)) / features.std(0)
    hits = []
    for i in range(len(z)):
        r = [np.corrcoef(z[i], z[j])[0, 1] if j != i else -2 for j in range(len(z))]
        hits.append(subjects[int(np.argmax(r))] == subjects[i])
    assert identified(features, subjects).tolist() == hits
    assert 0.1 < np.mean(hits) < 1


def test_icc_is_that_of_the_analysis_of_variance():
    features, subjects = cohort(1.0)
    people, k = 12, 3
    for feature, value in zip(features.T, icc(features, subjects)):
        groups = feature.reshape(people, k)
        f = stats.f_oneway(*groups).statistic
        assert value == pytest.approx((f - 1) / (f + k - 1))


def test_icc_of_unequal_groups_finds_the_planted_reliability():
    rng = np.random.default_rng(1)
    counts = rng.integers(2, 5, 3000)
    subjects = np.repeat(np.arange(3000), counts)
    values = rng.normal(size=3000)[subjects] + 0.5 * rng.normal(size=len(subjects))
    assert icc(values[:, None], subjects)[0] == pytest.approx(1 / 1.25, abs=0.02)
    assert np.isnan(icc(np.ones((6, 1)), np.repeat([0, 1], 3))[0])


def test_fingerprint_says_all():
    features, subjects = cohort(0.01)
    lonely = np.concatenate([features, features[:1] + 9]), np.concatenate([subjects, ["alone"]])
    found = fingerprint(*lonely)
    assert (found["scans"], found["subjects"], found["left_out"]) == (36, 12, 1)
    assert (found["identified"], found["subjects_identified"]) == (1, 1)
    assert found["chance"] == pytest.approx(2 / 35)
    assert found["interval"] == pytest.approx(list(stats.binomtest(12, 12).proportion_ci(method="wilson")))
    assert found["icc"]["median"] > 0.99
    with pytest.raises(UserError, match="1 of 2 subjects have two scans or more"):
        fingerprint(features[:4], subjects[:4])


def test_wilson_is_scipys():
    for hits, count in ((0, 5), (3, 8), (40, 41)):
        assert wilson(hits, count) == pytest.approx(tuple(stats.binomtest(hits, count).proportion_ci(method="wilson")))

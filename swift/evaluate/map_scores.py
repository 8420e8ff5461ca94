"""How good predicted maps are, with scores that a group's mean map cannot win.

A group's mean map correlates highly with everybody's map, so the correlation says little. What counts is what is left
without the training mean (`residual_r`), and whether a prediction is more like its own subject's map than another's.

Shapes: N subjects, K contrasts, V voxels. C (N, N): Pearson's r over voxels of true map i and predicted map j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from swift.evaluate.predictions import Predictions, finite
from swift.evaluate.resampling import LEVEL, draw_weights
from swift.utils.errors import UserError

DRAWS, PERMUTATIONS = 2000, 2000
TOPS = tuple(share / 100 for share in range(5, 55, 5))
"""Parts of the voxels, the largest ones, whose overlap is measured."""
CONSTANT = 1e-6
"""A map that varies by less than this part of the mean map does is constant: its correlations count as 0."""
SCORES = ("residual_r", "r", "identification", "rank", "diagonality", "dice")
"""Means over subjects of one value a subject; higher is better."""
CEILINGS = ("ceiling_r", "ceiling_residual_r")
"""What a second measurement reaches, of the subjects that have one."""


@dataclass(frozen=True)
class MapPredictions:
    """Maps of the subjects of one part of a split, at voxels where all of them have a value.

    Attributes:
        subjects: (N,) names.
        contrasts: (K,) names.
        truth, predicted: (N, K, V).
        mean: (K, V) of the training subjects.
        retest: (N, K, V) a second measurement, NaN for a subject without one; None: nobody has one.
    """

    subjects: list[str]
    contrasts: list[str]
    truth: np.ndarray
    predicted: np.ndarray
    mean: np.ndarray
    retest: np.ndarray | None = None

    @staticmethod
    def shared(
        subjects: list[str],
        contrasts: list[str],
        truth: np.ndarray,
        predicted: np.ndarray,
        mean: np.ndarray,
        retest: np.ndarray | None = None,
    ) -> MapPredictions:
        """Leave out the voxels where a true map has no value (NaN): outside the brain nobody is right or wrong.

        Args:
            subjects, contrasts, truth, predicted, mean: Of all voxels.
            retest: NaN all over for a subject without a second map.

        Raises:
            UserError: fewer than 2 subjects, a subject twice, no voxel in common.
        """
        if len(subjects) < 2:
            raise UserError(f"maps of {len(subjects)} subject ({', '.join(subjects)}): to tell them apart needs 2")
        twice = sorted({name for name in subjects if subjects.count(name) > 1})
        if twice:
            raise UserError(f"maps of subject {twice[0]}: twice; every subject must be there exactly once")
        known = np.isfinite(truth).all((0, 1))
        if retest is not None:
            has = np.isfinite(retest).any((1, 2))
            known &= np.isfinite(retest[has]).all((0, 1))
            retest = retest if has.any() else None
        if not known.any():
            raise UserError("the maps have no voxel in common")
        again = None if retest is None else retest[..., known]
        return MapPredictions(
            list(subjects), list(contrasts), truth[..., known], predicted[..., known], mean[..., known], again
        )


def correlations(truth: np.ndarray, predicted: np.ndarray, least: float = 0.0) -> np.ndarray:
    """(N, V), (M, V) -> (N, M) Pearson's r; 0 where one of both varies by no more than `least` (standard deviation)."""

    def unit(maps: np.ndarray) -> np.ndarray:
        rest = maps.astype(np.float64) - maps.mean(1, keepdims=True, dtype=np.float64)
        norm = np.linalg.norm(rest, axis=1, keepdims=True)
        flat = norm <= max(least, 1e-12) * np.sqrt(maps.shape[1])
        return np.where(flat, 0.0, rest / np.where(flat, 1.0, norm))

    return unit(truth) @ unit(predicted).T


@dataclass(frozen=True)
class Judged:
    """What is known of one contrast, or of the mean of several.

    Attributes:
        values: Score -> (N,) one value a subject; ceilings are NaN for a subject without a second map.
        slope: (2, N): products of true and predicted residual, and squares of the predicted; their sums' ratio is the
            calibration slope.
        dice: (10, N) overlap at each of TOPS.
        raw, residual: (N, N) C of the maps, and of what is left without the training mean.
        hits: (N, N) whether true map i is the one most like predicted map j; ties share.
    """

    values: dict[str, np.ndarray]
    slope: np.ndarray
    dice: np.ndarray
    raw: np.ndarray
    residual: np.ndarray
    hits: np.ndarray


def judge_contrast(
    truth: np.ndarray, predicted: np.ndarray, mean: np.ndarray, retest: np.ndarray | None = None
) -> Judged:
    """Scores of one contrast: truth, predicted and retest (N, V), mean (V,)."""
    n = len(truth)
    least = CONSTANT * float(mean.std())
    raw = correlations(truth, predicted)
    true_rest, said_rest = truth - mean, predicted - mean
    residual = correlations(true_rest, said_rest, least)
    own = np.diag(raw)
    others = ~np.eye(n, dtype=bool)
    top = raw.max(0)
    first = raw >= top - 1e-12
    hits = first / first.sum(0)
    below = (raw < own) + 0.5 * (raw == own)
    overlap = dice(truth, predicted)
    values = {
        "residual_r": np.diag(residual),
        "r": own,
        "identification": np.diag(hits),
        "rank": (below * others).sum(0) / (n - 1),
        "diagonality": own - (raw * others).sum(0) / (n - 1),
        "dice": overlap.mean(0),
    }
    if retest is not None:
        has = np.isfinite(retest).all(1)
        for name in CEILINGS:
            values[name] = np.full(n, np.nan)
        values["ceiling_r"][has] = np.diag(correlations(truth[has], retest[has]))
        values["ceiling_residual_r"][has] = np.diag(correlations(true_rest[has], retest[has] - mean, least))
    a, b = (rest - rest.mean(1, keepdims=True) for rest in (true_rest, said_rest))
    b = np.where(said_rest.std(1, keepdims=True) <= max(least, 1e-12), 0.0, b)
    slope = np.stack([(a * b).sum(1, dtype=np.float64), (b * b).sum(1, dtype=np.float64)])
    return Judged(values, slope, overlap, raw, residual, hits)


def dice(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(10, N) Dice overlap of the largest TOPS of the voxels of two sets of maps (N, V)."""
    size = truth.shape[1]

    def place(maps: np.ndarray) -> np.ndarray:
        return np.argsort(np.argsort(-maps, axis=1, kind="stable"), axis=1, kind="stable")

    first, second = place(truth), place(predicted)
    counts = [max(1, round(share * size)) for share in TOPS]
    return np.stack([((first < count) & (second < count)).sum(1) / count for count in counts])


def judged(maps: MapPredictions) -> tuple[Judged, dict[str, Judged]]:
    """The mean over contrasts, and each of them."""
    each = {
        name: judge_contrast(
            maps.truth[:, k], maps.predicted[:, k], maps.mean[k], None if maps.retest is None else maps.retest[:, k]
        )
        for k, name in enumerate(maps.contrasts)
    }
    some = list(each.values())
    values = {name: np.mean([one.values[name] for one in some], axis=0) for name in some[0].values}
    # Contrasts have units of their own: each counts alike in the slope.
    slope = np.sum([one.slope / max(float(one.slope[1].sum()), 1e-300) for one in some], axis=0)
    arrays = [np.mean([getattr(one, name) for one in some], axis=0) for name in ("dice", "raw", "residual", "hits")]
    return Judged(values, slope, *arrays), each


def slope_of(slope: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """Calibration slope: of the true residual on the predicted one, all subjects together; NaN without predictions.

    1: as large as it should be; below 1: predictions differ too much from the mean map.
    """
    above, below = slope.sum(1) if weights is None else slope @ weights.T
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)


def scores_of(one: Judged) -> dict[str, float]:
    """Means over subjects, and the slope."""
    return {name: float(np.nanmean(values)) for name, values in one.values.items()} | {
        "slope": float(slope_of(one.slope))
    }


def intervals_of(one: Judged, seed: int, draws: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of `scores_of` by a bootstrap over subjects; whom a map is told from stays as it is."""
    names = list(one.values)
    table = np.stack([one.values[name] for name in names])
    has = np.isfinite(table)
    table = np.where(has, table, 0)
    parts, slopes = [], []
    for weights in draw_weights(np.arange(table.shape[1]), seed, draws):
        count = has @ weights.T
        parts.append(np.divide(table @ weights.T, count, out=np.full(count.shape, np.nan), where=count > 0))
        slopes.append(slope_of(one.slope, weights))
    drawn = dict(zip(names, np.concatenate(parts, axis=1), strict=True)) | {"slope": np.concatenate(slopes)}
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    found = {}
    for name, values in drawn.items():
        good = values[np.isfinite(values)]
        low, high = np.quantile(good, ends) if len(good) >= draws / 2 else (np.nan, np.nan)
        found[name] = (float(low), float(high))
    return found


def permuted(matrix: np.ndarray, seed: int, permutations: int = PERMUTATIONS) -> float:
    """One-sided p that subjects' true and predicted maps belong together: how often shuffled subjects do as well.

    Cells of C are not independent of each other, so that no test on its cells holds; subjects are exchangeable.

    Args:
        matrix: (N, N), true map i and predicted map j; the mean of the diagonal is tested.
        seed: Of the shuffles.
        permutations: Their number.
    """
    n = len(matrix)
    rng = np.random.Generator(np.random.PCG64(seed))
    own = np.trace(matrix) / n
    at = np.arange(n)
    drawn = np.array([matrix[rng.permutation(n), at].mean() for _ in range(permutations)])
    return float((1 + (drawn >= own - 1e-12).sum()) / (1 + permutations))


def table_of(maps: MapPredictions, one: Judged) -> Predictions:
    """One row a subject with its own scores, as tables of several methods want them."""
    columns = [name for name in SCORES if name in one.values]
    blank = np.full(len(maps.subjects), "", np.str_)
    frame = np.full(len(maps.subjects), -1)
    scores = np.stack([one.values[name] for name in columns], 1)
    return Predictions("map", columns, np.array(maps.subjects), blank, frame, np.ones(len(frame)), scores)


def _contrast(one: Judged, seed: int, draws: int) -> dict[str, Any]:
    """Scores of one contrast in the test part, their intervals, and p of residual r and identification."""
    ranges = intervals_of(one, seed, draws)
    return {
        "scores": {name: finite(value) for name, value in scores_of(one).items()},
        "intervals": {name: [finite(low), finite(high)] for name, (low, high) in ranges.items()},
        "p": {"residual_r": permuted(one.residual, seed), "identification": permuted(one.hits, seed)},
    }


def judge(val: MapPredictions, test: MapPredictions, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """What summary.json says of predicted maps, in the form of `swift.evaluate.scores.judge`."""
    of_val, _ = judged(val)
    of_test, each = judged(test)
    ranges = intervals_of(of_test, seed, draws)
    n = {"val": len(val.subjects), "test": len(test.subjects)}
    again = {
        part: 0 if maps.retest is None else int(np.isfinite(maps.retest).any((1, 2)).sum())
        for part, maps in (("val", val), ("test", test))
    }
    return {
        "kind": "map",
        "per": "subject",
        "classes": [],
        "threshold": 0.5,
        "scores": {
            part: {name: finite(value) for name, value in scores_of(one).items()}
            for part, one in (("val", of_val), ("test", of_test))
        },
        "intervals": {"test": {name: [finite(low), finite(high)] for name, (low, high) in ranges.items()}},
        "chance": {"identification": 1 / n["test"], "rank": 0.5, "residual_r": 0.0, "diagonality": 0.0},
        "p": {
            "residual_r": permuted(of_test.residual, seed),
            "identification": permuted(of_test.hits, seed),
            "permutations": PERMUTATIONS,
        },
        "contrasts": {name: _contrast(one, seed, draws) for name, one in each.items()},
        "dice": {f"{share:.2f}": float(row.mean()) for share, row in zip(TOPS, of_test.dice, strict=True)},
        "retest": again,
        "voxels": {"val": val.mean.shape[1], "test": test.mean.shape[1]},
        "bootstrap": {
            "level": LEVEL,
            "draws": draws,
            "seed": seed,
            "over": "subjects",
            "clusters": n["test"],
            "skipped": {},
        },
        "units": n,
        "subjects": n,
        "prevalence": {"val": {}, "test": {}},
    }

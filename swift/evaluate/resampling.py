"""Bootstrap over subjects: the scores of many resamplings at once, as scores with integer weights.

A draw gives each unit a weight (how often its subject was drawn), so that one sort serves all draws. D draws, N units,
K classes. The weighted scores equal scikit-learn's with `sample_weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from swift.evaluate.predictions import Predictions

LEVEL = 0.95
"""Part of the draws that an interval holds, in the middle."""
LEAST_USED = 0.5
"""An interval from fewer usable draws than this part is not given."""
POINT = 1e-9
"""A narrower interval of predictions that vary says that the units are too few, not that the score is sure."""
CELLS = 4_000_000
"""Weights held at once."""


@dataclass(frozen=True)
class Bootstrap:
    """Attributes:
    intervals: Score -> low, high; NaN where it is undefined in more than half of the draws, or of too few units.
    too_few: Scores whose interval, NaN now, would be a point though predictions vary, or of a single cluster.
    skipped: Score -> draws in which it is undefined (a class without units, a constant target).
    draws: Draws made.
    method: subjects, or blocks where all units are of one subject.
    clusters: Subjects or blocks that are drawn.
    """

    intervals: dict[str, tuple[float, float]]
    skipped: dict[str, int]
    draws: int
    method: str
    clusters: int
    too_few: tuple[str, ...] = ()


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, doi 10.1080/01621459.1927.10502953); never a single point."""
    z = 1.959963984540054
    share = hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


# ------------------------------------------------------------------------------------------------- weighted scores
def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)


def _ranked(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D,) AUROC and average precision of one class against the others; ties count half in the AUROC.

    Args:
        positive: (N,) bool.
        score: (N,) higher for positive.
        weights: (D, N).
    """
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    first = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    ours = np.add.reduceat(weights[:, order] * positive[order], first, axis=1)
    others = np.add.reduceat(weights[:, order] * ~positive[order], first, axis=1)
    hits, misses = ours.cumsum(1), others.cumsum(1)
    total, rest = hits[:, -1], misses[:, -1]
    below = rest[:, None] - misses
    auroc = _divide((ours * (below + others / 2)).sum(1), total * rest)
    found = hits + misses
    precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
    average = _divide((ours * precision).sum(1), np.where(rest > 0, total, 0))
    return auroc, average


def _classified(target: np.ndarray, said: np.ndarray, count: int, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """(D,) accuracy, (D, K) recall of each class and F1 of each class (0 where nothing was said or found)."""
    hit = said == target
    table = np.stack([target == k for k in range(count)], 1).astype(np.float64)  # (N, K)
    told = np.stack([said == k for k in range(count)], 1).astype(np.float64)
    true = weights @ (table * hit[:, None])
    are, say = weights @ table, weights @ told
    both = are + say
    f1 = np.divide(2 * true, both, out=np.zeros_like(true), where=both > 0)
    f1[(are == 0).any(1)] = np.nan  # as all scores but accuracy where a class has no unit
    return _divide(weights @ hit, weights.sum(1)), _divide(true, are), f1


def _regressed(target: np.ndarray, value: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    total = weights.sum(1)
    error = value - target
    center_t = _divide(weights @ target, total)
    center_v = _divide(weights @ value, total)
    # deviations from fixed numbers keep the second moments from cancelling
    t, v = target - target.mean(), value - value.mean()
    shift_t, shift_v = center_t - target.mean(), center_v - value.mean()
    spread_t = np.maximum(_divide(weights @ t**2, total) - shift_t**2, 0)
    spread_v = np.maximum(_divide(weights @ v**2, total) - shift_v**2, 0)
    spread_t[spread_t < 1e-12 * max(t.var(), 1e-300)] = 0
    spread_v[spread_v < 1e-12 * max(v.var(), 1e-300)] = 0
    together = _divide(weights @ (t * v), total) - shift_t * shift_v
    squared = _divide(weights @ error**2, total)
    return {
        "mae": _divide(weights @ np.abs(error), total),
        "rmse": np.sqrt(squared),
        "r": np.clip(_divide(together, np.sqrt(spread_t * spread_v)), -1, 1),
        "r2": 1 - _divide(squared, spread_t),
    }


def weighted_scores(predictions: Predictions, said: np.ndarray | None, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of `swift.evaluate.scores.scores` for many weightings of the units.

    Args:
        predictions: N units.
        said: (N,) class that is decided for; None for regression.
        weights: (D, N), 0 or more.

    Returns:
        Score -> (D,) float64; NaN where it is undefined under these weights.
    """
    weights = np.asarray(weights, np.float64)
    if predictions.kind == "map":
        means = _divide(weights @ predictions.scores, weights.sum(1)[:, None])
        return dict(zip(predictions.classes, means.T, strict=True))
    if predictions.kind == "regression":
        return _regressed(predictions.target, predictions.scores[:, 0], weights)
    assert said is not None
    count = len(predictions.classes)
    accuracy, recall, f1 = _classified(predictions.target, said, count, weights)
    classes = [1] if predictions.kind == "binary" else list(range(count))
    ranked = [_ranked(predictions.target == k, predictions.scores[:, k], weights) for k in classes]
    return {
        "auroc": np.mean([auroc for auroc, _ in ranked], axis=0),
        "balanced_accuracy": recall.mean(1),
        "f1": f1[:, 1] if predictions.kind == "binary" else f1.mean(1),
        "average_precision": np.mean([average for _, average in ranked], axis=0),
        "accuracy": accuracy,
    }


# ----------------------------------------------------------------------------------------------------------- draws
def block_length(units: int) -> int:
    """Frames of a block of the block bootstrap: the root of the number of frames, at least 2."""
    return max(2, round(units**0.5))


def clusters(predictions: Predictions) -> tuple[str, np.ndarray]:
    """What is drawn together.

    Returns:
        "subjects" and the (N,) number of each unit's subject; where all are of one subject, "blocks" and (N,) number of
        its block of `block_length` contiguous frames of a scan.
    """
    names, subject = np.unique(predictions.subject, return_inverse=True)
    if len(names) > 1 or predictions.per == "subject":
        return "subjects", subject
    length = block_length(len(predictions))
    block = np.empty(len(predictions), np.int64)
    used = 0
    for scan in sorted(set(predictions.scan.tolist())):
        rows = np.flatnonzero(predictions.scan == scan)
        rows = rows[np.argsort(predictions.frame[rows], kind="stable")]
        number = np.arange(len(rows)) // length
        # a short rest joins the block before it
        last = max(len(rows) // length - 1, 0)
        block[rows] = used + np.minimum(number, last)
        used += last + 1
    return "blocks", block


def draw_weights(cluster: np.ndarray, seed: int, draws: int) -> Iterator[np.ndarray]:
    """Weights of the units, (d, N) at a time: clusters drawn with replacement, as many as there are."""
    count = int(cluster.max()) + 1
    rng = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, CELLS // len(cluster))
    for begin in range(0, draws, at_once):
        size = min(at_once, draws - begin)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size)[:, cluster].astype(np.float64)


def drawn_scores(predictions: Predictions, said: np.ndarray | None, seed: int, draws: int) -> dict[str, np.ndarray]:
    """Score -> (draws,) values under a bootstrap over `clusters`; the same units and seed give the same draws."""
    _, cluster = clusters(predictions)
    parts = [weighted_scores(predictions, said, weights) for weights in draw_weights(cluster, seed, draws)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def bootstrap(predictions: Predictions, said: np.ndarray | None, seed: int, draws: int) -> Bootstrap:
    """Percentile intervals (`LEVEL`) of every score.

    Frames of a subject are drawn together. With one subject, blocks of contiguous frames are: this tells how the score
    varies over the time of that subject, nothing of other people.
    """
    method, cluster = clusters(predictions)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    intervals, skipped = {}, {}
    for name, values in drawn_scores(predictions, said, seed, draws).items():
        good = values[np.isfinite(values)]
        skipped[name] = int(draws - len(good))
        low, high = np.quantile(good, ends) if len(good) >= LEAST_USED * draws else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    few = []
    count = int(cluster.max()) + 1
    for name, (low, high) in intervals.items():
        if not np.isfinite(low) or (count > 1 and (high - low > POINT or not np.ptp(predictions.scores, axis=0).any())):
            continue
        if name == "accuracy" and said is not None and count == len(predictions):
            intervals[name] = wilson(int((said == predictions.target).sum()), count)
        else:
            intervals[name] = (np.nan, np.nan)
            few.append(name)
    return Bootstrap(intervals, skipped, draws, method, count, tuple(few))

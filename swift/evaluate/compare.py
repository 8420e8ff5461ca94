"""Is a difference real? Tests between two methods on the same subjects, of one method against chance, and Holm's rule.

Which test fits: over several splits `corrected_t`; on one test set `from_draws`, a paired bootstrap; against chance
`against_labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swift.evaluate.predictions import Predictions
from swift.evaluate.resampling import CELLS, LEVEL
from swift.utils.errors import UserError

PERMUTATIONS = 2000


@dataclass(frozen=True)
class Test:
    """Result of a test. `low`, `high`: 95 % interval of the difference; NaN where the test has none."""

    difference: float
    p: float
    low: float = float("nan")
    high: float = float("nan")


def corrected_t(differences: Sequence[float], train: float, test: float) -> Test:
    """Corrected resampled paired t-test: repeats share training subjects, so a plain t-test finds too much.

    The variance of the mean of J differences is (1/J + test/train) * s^2 instead of s^2 / J, with J - 1 degrees of
    freedom (Nadeau and Bengio 2003, Machine Learning 52:239-281).

    Args:
        differences: (J,) score of one method minus the other's, a repeat (split) each.
        train: Units trained on in a repeat.
        test: Units tested on.

    Returns:
        Two-sided; p is 1 where all differences are 0, and 0 where they are all the same but not 0.

    Raises:
        UserError: Fewer than 2 repeats.
    """
    from scipy import stats

    d = np.asarray(differences, np.float64)
    if len(d) < 2 or train <= 0 or test <= 0:
        raise UserError(f"a t-test over splits needs at least 2 of them, got {len(d)} (train {train}, test {test})")
    mean = float(d.mean())
    error = float(np.sqrt((1 / len(d) + test / train) * d.var(ddof=1)))
    if error <= 1e-15 * max(1.0, abs(mean)):
        return Test(mean, float(mean == 0), mean, mean)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(d) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(d) - 1))
    return Test(mean, p, mean - half, mean + half)


def need_same_units(a: Predictions, b: Predictions) -> None:
    """Refuse to compare predictions of different units or with different targets.

    Raises:
        UserError: Names the first unit that differs.
    """
    if a.kind != b.kind or a.classes != b.classes:
        raise UserError(f"{a.name} and {b.name}: {a.kind} {a.classes} and {b.kind} {b.classes} cannot be compared")
    keys = [list(zip(x.subject.tolist(), x.scan.tolist(), x.frame.tolist(), strict=True)) for x in (a, b)]
    if keys[0] == keys[1] and np.array_equal(a.target, b.target):
        return
    for x, y, mine, other in ((a, b, keys[0], keys[1]), (b, a, keys[1], keys[0])):
        alone = sorted(set(mine) - set(other))
        if alone:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise UserError(f"{x.name} has {alone[0]}{more}, {y.name} has not: compare methods on the same split")
    raise UserError(f"{a.name} and {b.name}: the same units in another order, or with other targets")


def from_draws(difference: float, drawn: np.ndarray, subjects: int) -> Test:
    """The paired bootstrap from its draws.

    Args:
        difference: On all units.
        drawn: (D,) differences under the same draws of both methods; those that are not finite are left out.
        subjects: That were drawn from (blocks of time where there is one subject). A handful repeat themselves in all
            draws and would seem sure.

    Returns:
        The percentile interval, and a two-sided p: at least 2 / (draws + 1), and at least 2 / 2^subjects, the smallest
        that swapping the two methods for some subjects could give.

    Raises:
        UserError: Nothing is left.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not np.isfinite(difference):
        raise UserError("the score is undefined here: nothing to compare")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, max(2 * (tail + 1) / (len(drawn) + 1), 2.0 ** (1 - subjects)))
    return Test(difference, p, float(low), float(high))


# ------------------------------------------------------------------------------------------------------- permutations
def main_score(kind: str, target: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """AUROC (several classes: mean of each against the others) or Pearson r for a stack of targets.

    Args:
        kind: Of the predictions.
        target: (..., N).
        scores: (N, K).

    Returns:
        (...); r is 0 where a side is constant.
    """
    from scipy.stats import rankdata

    if kind == "regression":
        a, b = target - target.mean(-1, keepdims=True), scores[:, 0] - scores[:, 0].mean()
        spread = np.sqrt((a**2).sum(-1) * (b**2).sum())
        return np.divide((a * b).sum(-1), spread, out=np.zeros(spread.shape), where=spread > 0)
    each = []
    for k in [1] if kind == "binary" else range(scores.shape[1]):
        # from ranks (Mann-Whitney); ties count half
        positive, ranks = target == k, rankdata(scores[:, k])
        count = positive.sum(-1)
        above = (ranks * positive).sum(-1) - count * (count + 1) / 2
        each.append(above / (count * (len(scores) - count)))
    return np.asarray(np.mean(each, axis=0))


def _chunks(total: int, units: int) -> list[int]:
    """Sizes that sum to `total`, so that a chunk times `units` fits in memory."""
    size = max(1, CELLS // units)
    return [min(size, total - begin) for begin in range(0, total, size)]


def against_labels(some: Predictions, seed: int = 0, permutations: int = PERMUTATIONS) -> Test:
    """Main score of one method against shuffled labels, to see whether it is above chance.

    Labels of subjects are shuffled. Those of frames are shifted in a circle within each scan by a random number of
    frames, which keeps their autocorrelation: shuffled frames would find too much.

    Returns:
        One-sided (larger is better); the difference is from the mean of the shuffled labels.

    Raises:
        UserError: A class without units, or a constant target.
    """
    if len(np.unique(some.target)) < max(2, len(some.classes)):
        raise UserError(f"{some.name}: a class without units, or a constant target; nothing to test")
    observed = float(main_score(some.kind, some.target, some.scores))
    rng = np.random.Generator(np.random.PCG64(seed))
    scans = []
    if some.per == "frame":
        for scan in sorted(set(some.scan.tolist())):
            rows = np.flatnonzero(some.scan == scan)
            scans.append(rows[np.argsort(some.frame[rows], kind="stable")])
    parts = []
    for size in _chunks(permutations, len(some)):
        target = rng.permuted(np.tile(some.target, (size, 1)), axis=1)
        for rows in scans:
            turned = (np.arange(len(rows)) - rng.integers(len(rows), size=(size, 1))) % len(rows)
            target[:, rows] = some.target[rows][turned]
        parts.append(main_score(some.kind, target, some.scores))
    found = np.concatenate(parts)
    p = (int((found >= observed - 1e-12).sum()) + 1) / (permutations + 1)
    return Test(observed - float(found.mean()), p)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of several tests: the chance of any false finding among them stays below the level (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = largest
    return adjusted

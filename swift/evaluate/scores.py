"""How good predictions are: scores, their intervals, and the threshold, which only validation may choose."""

from __future__ import annotations

from typing import Any

import numpy as np

from swift.evaluate.predictions import Predictions, finite, prevalence
from swift.evaluate.resampling import LEVEL, Bootstrap, bootstrap
from swift.utils.errors import UserError

CLASSIFIED = ("auroc", "balanced_accuracy", "f1", "average_precision", "accuracy")
REGRESSED = ("mae", "rmse", "r", "r2")
MAIN = {"binary": "auroc", "multiclass": "auroc", "regression": "r", "map": "residual_r"}
"""The score that tables show first."""
LOWER_IS_BETTER = ("mae", "rmse")
DRAWS = 2000


def need_classes(predictions: Predictions, part: str) -> None:
    """Refuse a part of a split in which a class has no unit: its AUROC is undefined.

    Raises:
        UserError: Names the part and the class.
    """
    missing = [name for name, count in prevalence(predictions).items() if not count]
    if missing:
        raise UserError(f"class {missing[0]!r} has no unit in {part}: {prevalence(predictions)}; make another split")


def choose_threshold(val: Predictions) -> float:
    """The threshold on the positive class's probability that gives the best balanced accuracy in validation.

    Candidates lie in the middle between neighbouring probabilities; of equally good ones the nearest to 0.5 wins.

    Returns:
        t: positive is predicted where p >= t. 0.5 for other kinds than binary, where it is not used.

    Raises:
        UserError: Validation lacks a class.
    """
    if val.kind != "binary":
        return 0.5
    need_classes(val, "validation")
    p, positive = val.scores[:, 1], val.target == 1
    levels = np.unique(p)
    candidates = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.nextafter(levels[-1], 2)]])
    ours, others = np.sort(p[positive]), np.sort(p[~positive])
    found = 1 - np.searchsorted(ours, candidates) / len(ours)
    spared = np.searchsorted(others, candidates) / len(others)
    value = (found + spared) / 2
    best = np.flatnonzero(value >= value.max() - 1e-12)
    return float(candidates[best[np.argmin(np.abs(candidates[best] - 0.5))]])


def decide(predictions: Predictions, threshold: float = 0.5) -> np.ndarray | None:
    """(N,) class that each unit is put into: by the threshold, or the most probable; None without classes."""
    if predictions.kind in ("regression", "map"):
        return None
    if predictions.kind == "binary":
        return (predictions.scores[:, 1] >= threshold).astype(np.int64)
    return predictions.scores.argmax(1)


def scores(predictions: Predictions, threshold: float = 0.5) -> dict[str, float]:
    """The scores of some predictions, by scikit-learn.

    Args:
        predictions: N units.
        threshold: Of the positive class, for binary; from `choose_threshold` on validation.

    Returns:
        auroc, balanced_accuracy, f1, average_precision, accuracy (several classes: mean over classes, each against the
        others), or mae, rmse, r (Pearson), r2. NaN where one is undefined: a class without units, constant values.
    """
    from sklearn import metrics

    target = predictions.target
    if predictions.kind == "map":
        return dict(zip(predictions.classes, predictions.scores.mean(0).tolist(), strict=True))
    if predictions.kind == "regression":
        value = predictions.scores[:, 0]
        vary = len(target) > 1 and np.ptp(target) > 0
        return {
            "mae": float(metrics.mean_absolute_error(target, value)),
            "rmse": float(metrics.root_mean_squared_error(target, value)),
            "r": float(np.corrcoef(target, value)[0, 1]) if vary and np.ptp(value) > 0 else np.nan,
            "r2": float(metrics.r2_score(target, value)) if vary else np.nan,
        }
    said = decide(predictions, threshold)
    labels = list(range(len(predictions.classes)))
    truth = target.astype(np.int64)
    accuracy = float(metrics.accuracy_score(truth, said))
    if len(np.unique(truth)) < len(labels):
        return {name: accuracy if name == "accuracy" else np.nan for name in CLASSIFIED}
    if predictions.kind == "binary":
        p = predictions.scores[:, 1]
        auroc, average = metrics.roc_auc_score(truth, p), metrics.average_precision_score(truth, p)
        f1 = metrics.f1_score(truth, said, zero_division=0)
    else:
        one = np.eye(len(labels))[truth]
        auroc = metrics.roc_auc_score(one, predictions.scores, average="macro")
        average = metrics.average_precision_score(one, predictions.scores, average="macro")
        f1 = metrics.f1_score(truth, said, labels=labels, average="macro", zero_division=0)
    return {
        "auroc": float(auroc),
        "balanced_accuracy": float(metrics.balanced_accuracy_score(truth, said)),
        "f1": float(f1),
        "average_precision": float(average),
        "accuracy": accuracy,
    }


def resampled(predictions: Predictions, threshold: float = 0.5, seed: int = 0, draws: int = DRAWS) -> Bootstrap:
    """95 % intervals of `scores` by a bootstrap over subjects (blocks of frames where there is one subject)."""
    return bootstrap(predictions, decide(predictions, threshold), seed, draws)


def interval_text(summary: dict[str, Any], score: str, digits: int = 3) -> str:
    """The test's interval of a score as summary.json has it, "too few" where the units are, "" where it has none."""
    low, high = summary["intervals"]["test"].get(score, (None, None))
    if low is not None:
        return f"[{low:.{digits}f}, {high:.{digits}f}]"
    return "too few" if score in summary.get("bootstrap", {}).get("too_few", ()) else ""


def judge(val: Predictions, test: Predictions, seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """What summary.json says of a fitted model: threshold from validation, scores of both, intervals of the test.

    Args:
        val: Validation.
        test: Test; read here and nowhere else.
        seed: Of the bootstrap.
        draws: Of the bootstrap.

    Returns:
        JSON-ready: threshold, scores {val, test}, intervals {test}, bootstrap {...}, units and subjects of val and
        test. None stands for a score that is undefined.
    """
    threshold = choose_threshold(val)
    result = resampled(test, threshold, seed, draws)
    return {
        "kind": test.kind,
        "per": test.per,
        "classes": test.classes,
        "threshold": threshold,
        "scores": {
            part: {name: finite(value) for name, value in scores(some, threshold).items()}
            for part, some in (("val", val), ("test", test))
        },
        "intervals": {"test": {name: [finite(low), finite(high)] for name, (low, high) in result.intervals.items()}},
        "bootstrap": {
            "level": LEVEL,
            "draws": draws,
            "seed": seed,
            "over": result.method,
            "clusters": result.clusters,
            "too_few": list(result.too_few),
            "skipped": {name: count for name, count in result.skipped.items() if count},
        },
        "units": {"val": len(val), "test": len(test)},
        "subjects": {"val": len(val.subjects), "test": len(test.subjects)},
        "prevalence": {"val": prevalence(val), "test": prevalence(test)},
    }

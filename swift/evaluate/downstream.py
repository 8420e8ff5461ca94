"""Fine-tuned runs and baselines read from their files, and put into cells of methods and tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from swift.evaluate.compare import Test, corrected_t, from_draws, holm, need_same_units
from swift.evaluate.predictions import Predictions
from swift.evaluate.resampling import LEVEL, POINT, clusters, drawn_scores
from swift.evaluate.scores import DRAWS, LOWER_IS_BETTER, MAIN, decide, scores
from swift.utils.errors import UserError

SUMMARY, TEST_FILE = "summary.json", Path("predictions") / "test.csv"
ADAPT = ("linear", "attentive", "last_block", "lora", "full")
BASELINES = (
    "majority / mean",
    "motion and site",
    "connectome (correlation)",
    "connectome (partial correlation)",
    "connectome (tangent)",
    "connectome (co-skewness subspace)",
    "fluctuation of parcels",
    "volumes",
    "training mean map",
    "mean map, fitted amplitude",
    "connectivity maps, linear",
    "connectome to map components",
    "nearest by connectome",
)
"""Rows of a table from the top: baselines, random weights, from scratch, pre-trained."""
CHANCE = {"auroc": 0.5, "r": 0.0, "r2": 0.0, "residual_r": 0.0, "rank": 0.5, "diagonality": 0.0}
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Result:
    """One run that was judged on its test part.

    Attributes:
        path: Its folder.
        method: Row of the table.
        task: Column.
        seed: Of the training.
        split: Hash of the split; "" where it was held out in time.
        predictions: Of the test part.
        threshold: Chosen in validation.
        train: Training subjects.
        summary: summary.json.
        values: Test scores, computed anew.
    """

    path: Path
    method: str
    task: str
    seed: int
    split: str
    predictions: Predictions
    threshold: float
    train: int
    summary: dict[str, Any] = field(repr=False)
    values: dict[str, float] = field(repr=False)
    kept: dict[tuple[int, int], dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    def drawn(self, seed: int, draws: int) -> dict[str, np.ndarray]:
        """Scores under a bootstrap over subjects, (draws,) each; runs on the same units get the same draws."""
        if (seed, draws) not in self.kept:
            said = decide(self.predictions, self.threshold)
            self.kept[seed, draws] = drawn_scores(self.predictions, said, seed, draws)
        return self.kept[seed, draws]


@dataclass(frozen=True)
class Cell:
    """A method on a task.

    Attributes:
        mean, sd: Over all runs (seeds and splits); sd is NaN for one run.
        low, high: 95 % interval of the mean: over subjects of the one test set (seeds averaged in every draw), or over
            splits (corrected t).
        over: subjects, blocks or splits.
        runs, seeds, splits: How many.
        train, test: Subjects, of the first split.
        p: Of the difference from the task's best method, adjusted for all of the task (Holm); NaN for the best itself
            and where the two share no split.
        best: The best of its task, and really: different from every other method at the level 5 %.
        leading: Has the best mean.
    """

    mean: float
    sd: float
    low: float
    high: float
    over: str
    runs: int
    seeds: int
    splits: int
    train: int
    test: int
    p: float = math.nan
    best: bool = False
    leading: bool = False


# ------------------------------------------------------------------------------------------------------------ reading
def find(paths: Iterable[Path]) -> list[Path]:
    """Folders of judged runs: those given, or all below (a multirun, the baselines of a run).

    Raises:
        UserError: no such folder, or none below it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        below = sorted({file.parent.parent for file in path.rglob(str(TEST_FILE))})
        below = [folder for folder in below if (folder / SUMMARY).is_file()]
        if not below:
            raise UserError(
                f"{path}: no run with {SUMMARY} and {TEST_FILE} in or below it; give runs of swift.train with a task "
                "that predicts something, or of swift.baselines"
            )
        found += [folder for folder in below if folder not in found]
    return found


def method_of(summary: dict[str, Any]) -> str:
    """Name of a run's method in a table."""
    if summary.get("method"):
        return str(summary["method"])
    adapt = str(summary.get("adapt") or "scratch")
    if adapt == "scratch":
        return "scratch"
    return f"{'pre-trained' if summary.get('init') else 'random weights'}, {adapt}"


def load(path: Path) -> Result:
    """Read one run; its printed scores are computed anew from the predictions and compared.

    Raises:
        UserError: damaged files, or scores that the predictions do not give.
    """
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        said, seed, task = summary["scores"]["test"], int(summary["seed"]), str(summary["task"])
        threshold, train = float(summary["threshold"]), int(summary["n"]["train"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / SUMMARY}: not that of a judged run ({error!r})") from error
    predictions = Predictions.load(path / TEST_FILE)
    again = scores(predictions, threshold)
    for name, value in said.items():
        if predictions.kind == "map" and name not in again:
            continue  # slope and ceiling are of all subjects together
        ours = again.get(name, math.nan)
        undefined = not isinstance(value, (int, float))
        if math.isfinite(ours) == undefined or (not undefined and abs(ours - value) > TOLERANCE):
            raise UserError(f"{path}: {SUMMARY} says {name} {value}, {TEST_FILE} gives {ours:.6g}: changed since")
    split = str(summary.get("split_hash") or "")
    return Result(path, method_of(summary), task, seed, split, predictions, threshold, train, summary, again)


def results(paths: Iterable[Path]) -> list[Result]:
    """All judged runs in and below some folders.

    Raises:
        UserError: two of them with the same method, task, split and seed.
    """
    found = [load(path) for path in find(paths)]
    seen: dict[tuple[str, str, str, int], Result] = {}
    for result in found:
        twin = seen.setdefault((result.method, result.task, result.split, result.seed), result)
        if twin is not result:
            raise UserError(
                f"{twin.path} and {result.path}: both are {result.method} on {result.task} with seed {result.seed} on "
                "the same split; give one of them (other numbers of training subjects belong into another table)"
            )
    return found


def place(method: str) -> tuple[int, int, str]:
    """Sort key that puts methods in the order of a table's rows."""
    if method in BASELINES:
        return 0, BASELINES.index(method), method
    family, _, adapt = method.partition(", ")
    order = {"random weights": 1, "scratch": 2, "pre-trained": 3}
    return order.get(family, 4), ADAPT.index(adapt) if adapt in ADAPT else len(ADAPT), method


# -------------------------------------------------------------------------------------------------------------- cells
def score_name(runs: Sequence[Result], score: str | None) -> str:
    """The score of a task: `score` if its kind has it, else the main one."""
    return score if score and score in runs[0].values else MAIN[runs[0].predictions.kind]


def _by_split(runs: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for run in runs:
        found.setdefault(run.split, []).append(run)
    return found


def _interval(runs: Sequence[Result], score: str, seed: int, draws: int) -> tuple[float, float, str]:
    splits = _by_split(runs)
    if len(splits) > 1:
        means = [float(np.mean([run.values[score] for run in some])) for some in splits.values()]
        test = corrected_t(means, runs[0].train, len(runs[0].predictions.subjects))
        return test.low, test.high, "splits"
    over, _ = clusters(runs[0].predictions)
    values = _mean_drawn(runs, score, seed, draws)
    values = values[np.isfinite(values)]
    if len(values) < draws / 2:
        return math.nan, math.nan, over
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if high - low <= POINT and any(_differ(run.predictions) for run in runs):
        return math.nan, math.nan, over  # too few subjects to tell
    return float(low), float(high), over


def _differ(predictions: Predictions) -> bool:
    """Whether units are predicted differently.

    A table of maps holds scores in place of predictions: dice and r differ even where everybody is given the training
    mean, but then residual r is exactly 0 for all.
    """
    scores_ = predictions.scores
    if predictions.kind == "map":
        scores_ = scores_[:, [predictions.classes.index("residual_r")]]
    return bool(np.ptp(scores_, axis=0).any())


def _mean_drawn(runs: Sequence[Result], score: str, seed: int, draws: int) -> np.ndarray:
    """(draws,) mean score of runs on the same units.

    Raises:
        UserError: their units differ.
    """
    for run in runs[1:]:
        need_same_units(runs[0].predictions, run.predictions)
    return np.asarray(np.mean([run.drawn(seed, draws)[score] for run in runs], axis=0))


def cell(runs: Sequence[Result], score: str, seed: int = 0, draws: int = DRAWS) -> Cell:
    """One method on one task."""
    values = np.array([run.values[score] for run in runs])
    low, high, over = _interval(runs, score, seed, draws)
    splits = _by_split(runs)
    return Cell(
        mean=float(values.mean()),
        sd=float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        low=low,
        high=high,
        over=over,
        runs=len(runs),
        seeds=len({run.seed for run in runs}),
        splits=len(splits),
        train=runs[0].train,
        test=len(runs[0].predictions.subjects),
    )


def compare(a: Sequence[Result], b: Sequence[Result], score: str, seed: int = 0, draws: int = DRAWS) -> Test | None:
    """Two methods on one task, over the splits that both have; seeds of a split are averaged first.

    Returns:
        Over several splits the corrected t-test, on one the paired bootstrap over its subjects; None if they share no
        split or the score is undefined.
    """
    ours, theirs = _by_split(a), _by_split(b)
    shared = [split for split in ours if split in theirs]
    if not shared:
        return None
    differences = [
        float(np.mean([r.values[score] for r in ours[s]]) - np.mean([r.values[score] for r in theirs[s]]))
        for s in shared
    ]
    if not np.isfinite(differences).all():
        return None
    if len(shared) > 1:
        return corrected_t(differences, a[0].train, len(a[0].predictions.subjects))
    need_same_units(ours[shared[0]][0].predictions, theirs[shared[0]][0].predictions)
    drawn = [_mean_drawn(runs[shared[0]], score, seed, draws) for runs in (ours, theirs)]
    _, cluster = clusters(ours[shared[0]][0].predictions)
    return from_draws(differences[0], drawn[0] - drawn[1], int(cluster.max()) + 1)


def column(runs: Sequence[Result], score: str, seed: int = 0, draws: int = DRAWS) -> dict[str, Cell]:
    """All methods on one task: method -> cell, in the order of rows, the best marked where the tests support it."""
    methods: dict[str, list[Result]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    found = {name: cell(methods[name], score, seed, draws) for name in sorted(methods, key=place)}
    sign = -1 if score in LOWER_IS_BETTER else 1
    defined = [name for name in found if math.isfinite(found[name].mean)]
    if not defined:
        return found
    first = max(defined, key=lambda name: sign * found[name].mean)
    others = [name for name in defined if name != first]
    tests = {name: compare(methods[first], methods[name], score, seed, draws) for name in others}
    tested = [name for name in others if tests[name] is not None]
    adjusted = dict(zip(tested, holm([tests[name].p for name in tested]), strict=True))  # type: ignore[union-attr]
    best = bool(others) and all(adjusted.get(name, 1.0) < 1 - LEVEL for name in others)
    return {
        name: replace(one, p=adjusted.get(name, math.nan), best=best and name == first, leading=name == first)
        for name, one in found.items()
    }

"""Reads run directories: metrics.jsonl, summary.json, config.yaml. Imports neither torch nor lightning."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from swift.evaluate.scores import LOWER_IS_BETTER, MAIN, interval_text
from swift.utils import jsonl
from swift.utils.errors import UserError

UNITS = {
    "zscore_voxel": "SD of each voxel",
    "zscore_global": "SD of the scan",
    "percent": "% signal change",
    "minmax": "range of the scan",
    "robust": "IQR units",
    "none": "scanner units",
}
"""data.normalization -> unit of the normalized signal."""
LOSSES = {"l1": "L1", "smooth_l1": "smooth L1", "l2": "squared error", "cross_entropy": "cross entropy"}
"""task.loss -> its name."""


@dataclass
class Run:
    """What a run directory says.

    Attributes:
        path: The directory.
        records: Lines of metrics.jsonl, in order.
        summary: summary.json, or {} before the run has ended.
        settings: config.yaml, or {}.
    """

    path: Path
    records: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.resolve().name

    @property
    def unit(self) -> str:
        """Unit of the signal and of an L1 error."""
        return UNITS.get(str(self.setting("data.normalization")), "normalized units")

    @property
    def loss(self) -> str:
        """task.loss; l1 where the run does not say."""
        return str(self.setting("task.loss") or "l1")

    @property
    def target(self) -> str | None:
        """Name of the task, if it has a target; None of pre-training."""
        return str(self.setting("task.name")) if self.setting("task.target") else None

    @property
    def axis(self) -> str:
        """What the axis of its losses says: what is measured, and in which unit."""
        if self.target is None:
            return f"mean absolute error at masked voxels\n({self.unit})"
        if self.loss == "cross_entropy":
            return "cross entropy; validation: of the averaged predictions"
        return f"{LOSSES.get(self.loss, self.loss)}, SD of the training labels; validation: of the averaged predictions"

    @property
    def score(self) -> str | None:
        """Name of the score that a task is judged by: the kind's main one where the run has ended, else task.select."""
        if self.target is None:
            return None
        if self.summary.get("kind") in MAIN:
            return MAIN[self.summary["kind"]]
        return str(self.setting("task.select") or "loss")

    @property
    def val_key(self) -> str:
        """What is compared with the baselines: val/l1, or val/loss where that is missing and the loss is L1.

        Of a task with a target: val/loss, of averaged predictions.
        """
        if self.target:
            return "val/loss"
        has_l1 = any("val/l1" in record for record in self.records)
        return "val/l1" if has_l1 or self.loss != "l1" else "val/loss"

    @property
    def baselines(self) -> dict[str, float]:
        """Name -> L1 of the baselines on the same validation clips; {} before the run has ended."""
        return {name: float(value) for name, value in (self.summary.get("baselines") or {}).items()}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (int, increasing) and values of a metric; of several values at one step the last."""
        found = {
            int(r["step"]): float(r[key])
            for r in self.records
            if r.get("step") is not None and isinstance(r.get(key), (int, float))
        }
        steps = sorted(found)
        return np.array(steps, dtype=np.int64), np.array([found[step] for step in steps], dtype=np.float64)

    def setting(self, name: str) -> Any:
        """A value of config.yaml by its full name, such as "data.grid"; None where it is not there."""
        value: Any = self.settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def load_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: No such directory, no metrics.jsonl in it or nothing in that, or a damaged file.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file() and judged_below(path):
        raise UserError(f"{path}: results of swift.baselines, not a run; swift.report html and table1 show them")
    if not metrics.is_file():
        raise UserError(f"{path}: no metrics.jsonl in it; give the directory of a run (run_dir= of swift.train)")
    records = jsonl.read(metrics)
    if not records:
        raise UserError(f"{metrics}: empty; the run has not logged anything yet")
    return Run(path, records, _mapping(path / "summary.json"), _mapping(path / "config.yaml"))


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def describe(run: Run) -> dict[str, Any]:
    """One row of the table of runs, JSON-ready; None where the run does not say.

    Returns:
        "run", "model", "parameters", "steps", "train_loss" (last), "val_l1" (best), "val_l1_step" (of the best),
        "val_l1_last", "unit", "baselines" (name -> L1), "beats" (names of the baselines above the last val L1).
        Of a task with a target instead of val_l1 and unit: "task", "score" (its name), "val_score" (best),
        "val_score_step", "test_score", "test_interval" (text).
    """
    if run.target is not None:
        return _described_task(run)
    steps, train = run.series("train/loss")
    val_steps, val = run.series(run.val_key)
    finite = np.flatnonzero(np.isfinite(val))
    best = int(finite[np.argmin(val[finite])]) if len(finite) else None
    last = run.summary.get("val_l1", float(val[-1]) if len(val) else None)
    beats = None
    if run.baselines and isinstance(last, (int, float)):
        beats = [name for name, value in run.baselines.items() if math.isfinite(last) and last < value]
    return {
        "run": run.name,
        "model": run.summary.get("model") or (run.settings.get("model") or {}).get("name"),
        "parameters": run.summary.get("parameters"),
        "steps": run.summary.get("steps", max([*steps.tolist(), *val_steps.tolist()], default=None)),
        "train_loss": jsonl.plain(train[-1]) if len(train) else None,
        "val_l1": None if best is None else float(val[best]),
        "val_l1_step": None if best is None else int(val_steps[best]),
        "val_l1_last": None if last is None else jsonl.plain(last),
        "unit": run.unit,
        "baselines": run.baselines or None,
        "beats": beats,
    }


def _described_task(run: Run) -> dict[str, Any]:
    """`describe` of a task with a target."""
    steps, train = run.series("train/loss")
    score = run.score or "loss"
    val_steps, val = run.series(f"val/{score}")
    finite = np.flatnonzero(np.isfinite(val))
    choose = np.argmin if score in (*LOWER_IS_BETTER, "loss") else np.argmax
    best = int(finite[choose(val[finite])]) if len(finite) else None
    tested = "scores" in run.summary
    return {
        "run": run.name,
        "task": run.target,
        "model": run.summary.get("model") or (run.settings.get("model") or {}).get("name"),
        "parameters": run.summary.get("parameters"),
        "steps": run.summary.get("steps", max([*steps.tolist(), *val_steps.tolist()], default=None)),
        "train_loss": jsonl.plain(train[-1]) if len(train) else None,
        "loss": LOSSES.get(run.loss, run.loss),
        "score": score,
        "val_score": None if best is None else float(val[best]),
        "val_score_step": None if best is None else int(val_steps[best]),
        "test_score": run.summary["scores"]["test"].get(score) if tested else None,
        "test_interval": interval_text(run.summary, score) if tested else "",
        "baselines": None,
        "beats": None,
    }


def judged_below(path: Path) -> list[Path]:
    """Folders with summary.json and predictions but no metrics, at `path` or right below: of swift.baselines."""
    places = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    return [
        place
        for place in places
        if (place / "summary.json").is_file()
        and (place / "predictions" / "test.csv").is_file()
        and not (place / "metrics.jsonl").is_file()
    ]

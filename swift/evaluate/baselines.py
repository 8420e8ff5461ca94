"""What a task's model must beat, on the same split: majority, motion, connectomes.

Takes the settings of swift.train (task, data, run_dir, seed) and writes RUN/NAME/predictions/{val,test}.csv and
RUN/NAME/summary.json for every baseline, in the form of a fine-tuned run. The encoder with random weights is a run of
its own: swift.train with task.adapt=linear and no init=.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swift.config.schema import Config
from swift.data.clips.chosen import told
from swift.evaluate import classical as models
from swift.evaluate.classical import Units
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import interval_text, judge
from swift.utils.errors import UserError

log = logging.getLogger("swift.baselines")

CONNECTOMES = {"fc": "correlation", "fc_partial": "partial correlation", "fc_tangent": "tangent"}
"""Baseline -> kind of connectome."""
PER_SUBJECT = ("constant", "nuisance", *CONNECTOMES, "fc_coskewness", "amplitude")
PER_FRAME = ("constant", "nuisance", "volume")
MAP_BASELINES = ("mean_map", "mean_amplitude", "connectivity", "fc_components", "nearest")
SAID = {
    "constant": "majority / mean",
    "nuisance": "motion and site",
    "fc": "connectome (correlation)",
    "fc_partial": "connectome (partial correlation)",
    "fc_tangent": "connectome (tangent)",
    "fc_coskewness": "connectome (co-skewness subspace)",
    "amplitude": "fluctuation of parcels",
    "volume": "volumes",
    "mean_map": "training mean map",
    "mean_amplitude": "mean map, fitted amplitude",
    "connectivity": "connectivity maps, linear",
    "fc_components": "connectome to map components",
    "nearest": "nearest by connectome",
}
"""Baseline -> what tables call it."""


def units_of(data: Any, part: str) -> Units:
    """The units of a part, exactly those that a model is judged on.

    Args:
        data: `swift.data.task_module.TargetDataModule`.
        part: train | val | test.
    """
    index, labels, scans = data.parts[part], data.labels, data.store.scans
    rows: list[tuple[int, str, int, int, int, float]] = []
    if labels.per == "subject":
        for scan, first, length in zip(index.scan.tolist(), index.first.tolist(), index.length.tolist(), strict=True):
            rows.append((scan, scans[scan].subject, -1, first, length, float(labels.values[scan])))
    else:
        place, start = index.locate(np.arange(len(index)))
        steps = np.arange(data.spec.frames) * data.spec.frame_stride
        pairs = np.stack([np.repeat(place, len(steps)), (start[:, None] + steps).ravel()], 1)
        for scan, frame in np.unique(pairs, axis=0).tolist():
            value = float(labels.values[scan][frame])
            if np.isfinite(value):
                rows.append((scan, scans[scan].subject, frame, 0, scans[scan].frames, value))
    scan_, subject, frame_, first_, length_, target = zip(*rows, strict=True)
    return Units(*(np.array(c) for c in (scan_, subject, frame_, first_, length_, target)))


class Baselines:
    """The baselines of one task on one split; what they share (parcels, signals) is made once.

    Args:
        data: `swift.data.task_module.TargetDataModule`.
        balance: Weigh classes.
    """

    def __init__(self, data: Any, balance: bool) -> None:
        self.data, self.balance = data, balance
        self.kind, self.classes = data.labels.kind, list(data.labels.classes)
        self.units = {part: units_of(data, part) for part in ("train", "val", "test")}
        self._signals: list[np.ndarray] | None = None
        self._kept: dict[str, dict[str, np.ndarray]] = {}
        self.parcels: models.Parcels | None = None
        self.maps: Any = None

    def relabel(self, labels: Any) -> None:
        """Go on with other labels of the same scans; features, which no label has touched, are kept.

        Raises:
            UserError: they label other scans.
        """
        before = self.units
        self.data.labels = labels
        self.kind, self.classes = labels.kind, list(labels.classes)
        self.units = {part: units_of(self.data, part) for part in before}
        for part, units in self.units.items():
            if not (np.array_equal(units.scan, before[part].scan) and np.isfinite(units.target).all()):
                raise UserError(f"the new labels are not there for all scans of {part}")

    @property
    def names(self) -> tuple[str, ...]:
        """Those that fit the task."""
        if self.kind == "map":
            return MAP_BASELINES
        return PER_FRAME if self.data.labels.per == "frame" else PER_SUBJECT

    def predict(self, name: str) -> dict[str, Predictions]:
        """Val and test predictions of a baseline.

        Raises:
            UserError: It cannot be made from these data; says why.
        """
        train = self.units["train"]
        if name == "constant":
            made = {
                part: models.constant(train.target, len(self.units[part]), self.kind, len(self.classes))
                for part in ("val", "test")
            }
        else:
            if name not in self._kept:
                self._kept[name] = self._features(name)
            features = self._kept[name]
            model = models.fitted(features["train"], train, self.kind, self.balance, standardize=name != "volume")
            made = {
                part: models.predicted(model, features[part], train, self.kind, len(self.classes))
                for part in ("val", "test")
            }
        return {part: self._gather(part, scores) for part, scores in made.items()}

    def _gather(self, part: str, scores: np.ndarray) -> Predictions:
        """Scans of a subject are averaged."""
        units = self.units[part]
        frames = units.frame if self.data.labels.per == "frame" else None
        names = [self.data.store.scans[scan].scan_id for scan in units.scan.tolist()]
        start = np.zeros(len(units), np.int64)
        return Predictions.from_clips(
            self.kind, self.classes, units.subject, names, start, units.target, scores, frames
        )

    def _features(self, name: str) -> dict[str, np.ndarray]:
        store, train = self.data.store, self.units["train"]
        if name == "nuisance":
            # of a task that asks for the site it would be the answer
            known = self.data.target.column != "site"
            sites = sorted({store.scans[scan].site for scan in train.scan.tolist()}) if known else []
            found = {part: models.nuisance_features(store, units, sites) for part, units in self.units.items()}
            if not np.ptp(found["train"], axis=0).any():
                raise UserError("the store keeps no movement, and all training scans are alike in site, TR and length")
            return found
        if name == "volume":
            self._check_one_space("a baseline on volumes")
            mask = models.common_mask(store, sorted(set(train.scan.tolist())))
            whole = [models.volumes(store, units, mask) for units in self.units.values()]
            return dict(zip(self.units, models.components(*whole), strict=True))
        signals = self._cleaned()
        counts = [len(units) for units in self.units.values()]
        if name == "amplitude":
            values = np.log(np.stack([s.std(0) for s in signals]) + 1e-6)
        else:
            mine = np.arange(sum(counts)) < counts[0]
            if name == "fc_coskewness":
                values = models.coskewness_connectivity(signals, mine)
            else:
                values = models.connectivity(signals, mine, CONNECTOMES[name])
        return dict(zip(self.units, np.split(values, np.cumsum(counts)[:-1]), strict=True))

    def _check_one_space(self, what: str) -> None:
        used = {int(scan) for units in self.units.values() for scan in units.scan.tolist()}
        self.data.store.check_one_space(used, what)

    def cleaned(self) -> tuple[models.Parcels, list[np.ndarray]]:
        """Parcels of the training scans, and (T, P) of every unit: train, then val, then test."""
        signals = self._cleaned()
        assert self.parcels is not None
        return self.parcels, signals

    def _cleaned(self) -> list[np.ndarray]:
        """(T, P) of every unit: train, then val, then test. Parcels are those of the training scans."""
        if self._signals is None:
            self._check_one_space("a baseline on parcels")
            train = sorted(set(self.units["train"].scan.tolist()))
            if self.parcels is None:
                self.parcels = models.Parcels(self.data.store, train)
            used = {int(scan) for units in self.units.values() for scan in units.scan.tolist()}
            kind = models.unit_of_change(self.data.store, sorted(used))
            signals = []
            for units in self.units.values():
                for scan, first, length in zip(units.scan.tolist(), units.first.tolist(), units.length.tolist()):
                    signals.append(self.parcels.cleaned(self.data.store, scan, kind)[first : first + length])
            self._signals = signals
        return self._signals


def summary_of(cfg: Config, data: Any, name: str, made: dict[str, Predictions], seconds: float) -> dict[str, Any]:
    """Content of summary.json, in the form of a fine-tuned run."""
    judged = judge(made["val"], made["test"], cfg.seed)
    used = _used(cfg, data, name, judged["subjects"])
    return {**used, **judged, **told(data.left_out), "seconds": round(seconds, 2)}


def _used(cfg: Config, data: Any, name: str, subjects: dict[str, int]) -> dict[str, Any]:
    """What a summary says of the settings."""
    return {
        "task": cfg.task.name,
        "method": SAID[name],
        "baseline": name,
        "adapt": None,
        "init": None,
        "seed": cfg.seed,
        "split": cfg.data.split,
        "split_hash": data.split_hash,
        "n": {"train": len(data.subjects_of("train")), **subjects},
    }


def run_baselines(cfg: Config, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Fit, predict and judge the baselines of a task.

    Args:
        cfg: Settings, as of a fine-tuning; task.adapt, model and trainer play no part.
        names: Of `PER_SUBJECT` or `PER_FRAME`; None: all that fit the task.

    Returns:
        Baseline -> what its summary.json says. One that these data do not allow is left out and named in the log.

    Raises:
        UserError: The task has no target, an unknown baseline, or no baseline that these data allow.
    """
    if cfg.task.target is None:
        raise UserError(f"task={cfg.task.name}: has no target; baselines are for tasks that predict something")
    from swift.data.locate import store_path
    from swift.data.task_maps.module import MapDataModule
    from swift.data.task_module import TargetDataModule

    kind = MapDataModule if cfg.task.target.kind == "map" else TargetDataModule
    data = kind(cfg.data, cfg.task, store_path(cfg.data, cfg.seed), cfg.seed)
    all_ = Baselines(data, cfg.task.balance)
    wrong = [name for name in names or () if name not in all_.names]
    if wrong:
        raise UserError(f"--only {wrong[0]}: legal for task={cfg.task.name} are {', '.join(all_.names)}")
    found: dict[str, dict[str, Any]] = {}
    reasons = []
    for name in names or all_.names:
        begin = time.perf_counter()
        try:
            if isinstance(data, MapDataModule):
                found[name] = _judge_maps(cfg, data, all_, name, begin)
                continue
            made = all_.predict(name)
        except UserError as error:
            log.warning("%s left out: %s", SAID[name], error)
            reasons.append(f"{SAID[name]}: {error}")
            continue
        summary = summary_of(cfg, data, name, made, time.perf_counter() - begin)
        leave(Path(cfg.run_dir) / name, made, summary)
        found[name] = summary
    if not found:
        raise UserError(f"no baseline could be made; {reasons[0]}")
    return found


def _judge_maps(cfg: Config, data: Any, all_: Baselines, name: str, begin: float) -> dict[str, Any]:
    """Predict, judge and write one baseline of maps."""
    from swift.evaluate import map_judge
    from swift.evaluate.map_baselines import MapBaselines
    from swift.evaluate.map_scores import judge as judge_maps

    if all_.maps is None:
        all_.maps = MapBaselines(data, all_.units, all_.cleaned)
    folder = Path(cfg.run_dir) / name
    made = {part: all_.maps.predict(name, data.subjects_of(part)) for part in ("val", "test")}
    val, test = (map_judge.predictions_of(data, data.subjects_of(part), made[part]) for part in made)
    map_judge.leave(data, data.subjects_of("test"), made["test"], test, folder)
    judged = judge_maps(val, test, cfg.seed)
    summary = _used(cfg, data, name, judged["subjects"]) | judged | told(data.left_out)
    summary["seconds"] = round(time.perf_counter() - begin, 2)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return summary


def leave(folder: Path, made: dict[str, Predictions], summary: dict[str, Any]) -> None:
    """Write predictions/{val,test}.csv and summary.json."""
    for part, predictions in made.items():
        predictions.save(folder / "predictions" / f"{part}.csv")
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The test scores with their intervals, a line a baseline."""
    lines = []
    for summary in summaries.values():
        cells = []
        for name, value in summary["scores"]["test"].items():
            shown = "-" if value is None else f"{value:.3f}"
            cells.append(f"{name} {shown} {interval_text(summary, name)}".rstrip())
        lines.append(f"{summary['method']:<26} " + "  ".join(cells))
    return "\n".join(lines)

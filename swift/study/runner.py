"""Runs the points of a study that are not finished, describes and probes them, and makes the study's figures."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.study.file import Study, cohort_store, point_name
from swift.utils import jsonl
from swift.utils.entry import STOPPED_STATUS
from swift.utils.errors import UserError

if TYPE_CHECKING:
    from swift.config.schema import Config

log = logging.getLogger("swift.study")


def finished(run_dir: Path, cfg: Config) -> bool:
    """Whether a point needs nothing more.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    from swift.config.compose import FROZEN, as_begun, differences, load_frozen

    summary = run_dir / "summary.json"
    if not summary.is_file() or not (run_dir / FROZEN).is_file():
        return False
    changed = differences(
        replace(load_frozen(run_dir, []), run_dir=cfg.run_dir), replace(as_begun(cfg, run_dir), resume=None)
    )
    changed = [name for name in changed if not name.startswith("launcher")]
    if changed:
        raise UserError(f"{run_dir} holds a run with other settings ({', '.join(changed)}): move it away, or its study")
    try:
        return int(json.loads(summary.read_text())["steps"]) >= cfg.trainer.max_steps
    except (ValueError, KeyError) as error:
        raise UserError(f"{summary}: damaged ({error})") from error


def run_points(study: Study, runs: Path, settings: Sequence[str]) -> tuple[list[Path], int, int]:
    """Run what is not finished.

    Returns:
        Run directories, how many were run now, and how many are still to come from a batch system.

    Raises:
        UserError: a point that cannot be run.
    """
    from swift.config.compose import composed

    made, done, jobs = [], 0, []
    names = [point_name(point) for point in study.points]
    if len(set(names)) < len(names):
        raise UserError(f"{study.path}: two points are called {max(names, key=names.count)}")
    shared = []
    if study.cohort is not None:
        shared = [f"data.path={cohort_store(study.cohort, study.path, runs / 'cohort')}"]
    for index, (name, point) in enumerate(zip(names, study.points, strict=True), start=1):
        run_dir = runs / name
        made.append(run_dir)
        overrides = [*study.base, *point, *shared, *settings, f"run_dir={run_dir}"]
        began = time.monotonic()
        if study.kind == "throughput":
            from swift.study.throughput import measured

            ran = measured(overrides, run_dir)
        else:
            cfg, _ = composed(overrides)
            ran = not finished(run_dir, cfg)
            if ran:
                stop = None if (run_dir / "metrics.jsonl").is_file() else study.interrupt.get(name)
                submitted = _train(overrides) if stop is None else _train_stopped_once(overrides, run_dir, stop)
                jobs += submitted
        what = "submitted" if jobs and ran else f"{time.monotonic() - began:.0f} s" if ran else "finished before"
        log.info("%s %d/%d %s: %s", study.name, index, len(names), name, what)
        done += ran
    if jobs:
        from swift.cluster.submit import submit

        submit(jobs)
    return made, done, len(jobs)


def listed(study: Study, runs: Path) -> list[str]:
    """A line a point: finished, begun (it would go on) or to do."""
    lines = []
    for point in study.points:
        folder = runs / point_name(point)
        ended = (folder / "summary.json").is_file() or (folder / "throughput.json").is_file()
        state = "finished" if ended else "begun" if (folder / "config.yaml").is_file() else "to do"
        lines.append(f"{state:<9} {folder}  {' '.join(point)}")
    return lines


def _train(overrides: list[str]) -> list[Any]:
    """Train one point here, or make it ready to be submitted."""
    from hydra import compose, initialize_config_dir

    from swift.config.compose import conf_dir
    from swift.train.__main__ import run

    with initialize_config_dir(str(conf_dir()), version_base=None):
        tree = compose("config", overrides)
    jobs: list[Any] = []
    run(tree, overrides, jobs)
    return jobs


def _train_stopped_once(overrides: list[str], run_dir: Path, step: int) -> list[Any]:
    """Train one point here, ask it to stop when it has logged `step`, and go on from what it has saved."""
    ended, asked = threading.Event(), threading.Event()

    def ask() -> None:
        metrics = run_dir / "metrics.jsonl"
        while not ended.wait(0.05):
            try:
                reached = metrics.is_file() and any((r.get("step") or 0) >= step for r in jsonl.read(metrics))
            except UserError:  # a line that is being written
                continue
            if reached:
                asked.set()
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    watcher = threading.Thread(target=ask, daemon=True)
    # A signal that comes after the last step must not end the study; while steps are made the run takes it.
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    watcher.start()
    try:
        return _train(overrides)
    except SystemExit as stopped:
        if stopped.code != STOPPED_STATUS or not asked.is_set():
            raise
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)
    return _train(overrides)


def describe_series(study: Study, run_dirs: Sequence[Path]) -> None:
    """RUN/temporal.json of every run that has none: of the store that it was trained on."""
    from swift.config.compose import load_frozen
    from swift.data.locate import store_path
    from swift.report.temporal import FILE
    from swift.study.series import write_series

    wanted = {"count": 0, "frames": 400, "lag": 60.0, **(study.series or {})}
    for run_dir in run_dirs:
        if not (run_dir / FILE).is_file():
            cfg = load_frozen(run_dir, [])
            store = store_path(cfg.data, cfg.seed)
            write_series(run_dir, [store], int(wanted["count"]), int(wanted["frames"]), float(wanted["lag"]), 0)
            log.info("%s: series of %s described", study.name, run_dir.name)


def write_probe(run_dir: Path, store: Path, column: str) -> float:
    """RUN/probe.json: Pearson r of a per-frame column with what a ridge on frozen features makes of it.

    The features of all layers, averaged over the brain, a row a frame; every subject is predicted from the others.

    Returns:
        The mean r over subjects.

    Raises:
        UserError: no such column, or fewer than three subjects.
    """
    import numpy as np
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from swift.data.store.reader import Store
    from swift.inference.embedding import Embedding
    from swift.inference.fit_scan import find_scans
    from swift.inference.model import load_trained
    from swift.report.ablation import PROBE

    trained = load_trained(run_dir)
    embedding, opened = Embedding(trained, "all", "frame"), Store(store)
    rows: dict[str, list[tuple[Any, Any]]] = {}
    for scan in find_scans([store], trained.contract):
        table = opened.confounds(opened.find(scan.scan_id))
        if column not in table:
            raise UserError(
                f"probe: {column}: scan {scan.scan_id} has no such column, only {', '.join(table) or 'none'}"
            )
        made = embedding(scan)
        target, features = table[column][made.rows], np.concatenate(list(made.values.values()), axis=1)
        known = np.isfinite(target)
        rows.setdefault(scan.subject, []).append((features[known], target[known]))
    subjects = {name: [np.concatenate(part) for part in zip(*parts, strict=True)] for name, parts in rows.items()}
    if len(subjects) < 3:
        raise UserError(f"probe: {len(subjects)} subjects in {store}; leaving one out needs at least three")
    found = []
    for name, (features, target) in subjects.items():
        others = [pair for other, pair in subjects.items() if other != name]
        ridge = make_pipeline(StandardScaler(), RidgeCV(np.geomspace(1, 1e5, 11)))
        ridge.fit(np.concatenate([x for x, _ in others]), np.concatenate([y for _, y in others]))
        found.append(float(np.corrcoef(ridge.predict(features), target)[0, 1]))
    result = {"column": column, "scores": {f"probe r ({column})": float(np.mean(found))}, "subjects": found}
    (run_dir / PROBE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return float(np.mean(found))


def probe(study: Study, run_dirs: Sequence[Path]) -> None:
    """RUN/probe.json of every run that has none."""
    from swift.config.compose import load_frozen
    from swift.data.locate import store_path
    from swift.report.ablation import PROBE

    for run_dir in run_dirs:
        if not (run_dir / PROBE).is_file():
            cfg = load_frozen(run_dir, [])
            score = write_probe(run_dir, store_path(cfg.data, cfg.seed), str(study.probe))
            log.info("%s: %s: probe of %s %.3f", study.name, run_dir.name, study.probe, score)


def run_study(study: Study, runs: Path, out: Path, settings: Sequence[str]) -> int:
    """Run what is left of a study, then make its figures.

    Returns:
        0, or what the report has ended with.
    """
    from swift.report import __main__ as report

    run_dirs, done, waiting = run_points(study, runs, settings)
    log.info("%s: %d points, %d of them run now", study.name, len(run_dirs), done)
    if waiting:
        log.info("%s: %d points are submitted; the same command draws when they have ended", study.name, waiting)
        return 0
    if study.series is not None:
        describe_series(study, run_dirs)
    if study.probe is not None:
        probe(study, run_dirs)
    status = 0
    for line in study.report:
        words = [word.replace("{runs}", str(runs)).replace("{out}", str(out)) for word in line]
        words = [word.replace("{study}", str(study.path.parent)) for word in words]
        log.info("python -m swift.report %s", " ".join(words))
        status = max(status, report.main(words))
    return status

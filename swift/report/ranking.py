"""The ablation: settings of pre-training (mask ratio, patch size, ...) ranked by the sum of z-scores over tasks.

Points are pre-trainings that differ in some settings; each is judged by runs fine-tuned from it (init=). Of every task
the points' main scores (mean over seeds and splits) become z-scores over the points, higher being better; the table is
ranked by their sum. Losses of the pre-trainings themselves are not compared: a larger mask ratio is a harder problem.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from swift.evaluate.downstream import Result, score_name
from swift.evaluate.scores import LOWER_IS_BETTER
from swift.utils.errors import UserError

IGNORED = ("run_dir", "seed", "init", "resume", "launcher", "trainer", "parallel", "guard")
"""Settings that make no point of an ablation."""


def flat(tree: Any, name: str = "") -> dict[str, str]:
    """Nested settings -> dotted name: text of the value, without those that make no point of an ablation."""
    if isinstance(tree, dict):
        found: dict[str, str] = {}
        for key, value in tree.items():
            if not (name == "" and key in IGNORED):
                found |= flat(value, f"{name}.{key}" if name else str(key))
        return found
    return {name: json.dumps(tree, separators=(",", ":")).strip('"')}


def _settings(folder: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder}/config.yaml: cannot be read ({error}); the ablation needs it") from error
    return content if isinstance(content, dict) else {}


def pretraining_of(result: Result) -> Path:
    """Folder of the run that a fine-tuning began from.

    Raises:
        UserError: it began from none, or from something that is no run's folder.
    """
    init = result.summary.get("init")
    if not init:
        raise UserError(
            f"{result.path}: {result.method} began from no pre-training (init=); leave it out of the ranking"
        )
    folder = Path(str(init))
    places = [folder, *folder.parents, result.path / folder, result.path.parent / folder]
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise UserError(f"{result.path}: init={init} is no run's folder (any more): its settings are not known")


def points_of(found: Sequence[Result]) -> tuple[list[str], dict[tuple[str, ...], list[Result]]]:
    """The settings that differ between the pre-trainings, and the runs of each combination of their values.

    Raises:
        UserError: fewer than two points.
    """
    settings: dict[Path, dict[str, str]] = {}
    homes = [pretraining_of(result).resolve() for result in found]
    for home in homes:
        if home not in settings:
            settings[home] = flat(_settings(home))
    names = sorted({name for one in settings.values() for name in one})
    differ = [name for name in names if len({one.get(name, "-") for one in settings.values()}) > 1]
    points: dict[tuple[str, ...], list[Result]] = {}
    for home, result in zip(homes, found, strict=True):
        points.setdefault(tuple(settings[home].get(name, "-") for name in differ), []).append(result)
    if len(points) < 2:
        raise UserError("all runs began from pre-trainings with the same settings: there is nothing to rank")
    return differ, points


def z_scores(values: np.ndarray) -> np.ndarray:
    """(points, tasks), higher is better -> z-scores over the points (sd of n - 1); 0 where all are equal."""
    spread = values.std(0, ddof=1)
    return np.asarray((values - values.mean(0)) / np.where(spread > 1e-12, spread, np.inf))


def rank(found: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows, best first: rank, settings {name: value}, scores {task: mean}, z {task: z}, sum_z, runs.

    Raises:
        UserError: fewer than two points, a task that a point lacks, or an undefined score.
    """
    differ, points = points_of(found)
    tasks = sorted({run.task for run in found})
    names = {task: score_name([run for run in found if run.task == task], None) for task in tasks}
    table = np.empty((len(points), len(tasks)))
    for row, (values, runs) in enumerate(points.items()):
        for place, task in enumerate(tasks):
            mine = [run.values[names[task]] for run in runs if run.task == task]
            if not mine or not np.isfinite(mine).all():
                shown = ", ".join(f"{name}={value}" for name, value in zip(differ, values, strict=True))
                what = "an undefined score" if mine else "no run"
                raise UserError(f"{shown}: {what} on {task}; every point needs every task")
            table[row, place] = np.mean(mine)
    sign = np.array([-1 if names[task] in LOWER_IS_BETTER else 1 for task in tasks])
    z = z_scores(table * sign)
    rows: list[dict[str, Any]] = []
    for row in np.argsort(-z.sum(1), kind="stable").tolist():
        values, runs = list(points.items())[row]
        rows.append(
            {
                "rank": len(rows) + 1,
                "settings": dict(zip(differ, values, strict=True)),
                "scores": {f"{task} ({names[task]})": float(v) for task, v in zip(tasks, table[row], strict=True)},
                "z": {task: float(v) for task, v in zip(tasks, z[row], strict=True)},
                "sum_z": float(z[row].sum()),
                "runs": len(runs),
            }
        )
    return rows


def csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a ranking with its settings, scores and z-scores as columns of their own."""
    z = {f"z {name}": value for name, value in row["z"].items()}
    nested = {"settings": row["settings"], "scores": {**row["scores"], **z}}
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name != "z":
            found |= nested.get(name, {name: value})
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The ranked table."""
    head = ["rank", *rows[0]["settings"], *rows[0]["scores"], "sum of z"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            f"{value:.3f} (z {z:+.2f})" for value, z in zip(row["scores"].values(), row["z"].values(), strict=True)
        ]
        lines.append(
            "| " + " | ".join([str(row["rank"]), *row["settings"].values(), *cells, f"{row['sum_z']:+.2f}"]) + " |"
        )
    note = "z: over the points of a task, higher is better. A ranking is no test: points one run apart may be equal."
    return "\n".join([*lines, "", note]) + "\n"

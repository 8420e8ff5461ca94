"""Ablation of pre-training: settings ranked by the sum of z-scores of reconstruction and of a probe.

Reconstruction is judged as skill, 1 - L1 of the model / L1 of the best baseline on the same hidden voxels, since the
raw loss of different mask ratios, clips and patches measures problems of different difficulty. Probes are scores of
frozen features (RUN/probe.json), where a run has them. Runs that were fine-tuned are ranked by `python -m swift.report
ranking`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from swift.report.output import aligned
from swift.report.points import Point
from swift.report.ranking import flat, z_scores
from swift.utils.errors import UserError

PROBE = "probe.json"


def factors(points: Sequence[Point]) -> dict[str, list[str]]:
    """Setting -> its value in each run, of the settings that differ.

    Raises:
        UserError: none does, or two runs have the same.
    """
    settings = [flat(p.run.settings) for p in points]
    names = sorted({name for one in settings for name in one})
    found = {name: [one.get(name, "-") for one in settings] for name in names}
    found = {name: values for name, values in found.items() if len(set(values)) > 1}
    if not found:
        raise UserError(f"{len(points)} runs of the same settings: an ablation needs runs that differ in some")
    # Of two settings that always change together one says it all.
    kept: dict[str, list[str]] = {}
    for name, values in found.items():
        labels = [values.index(value) for value in values]
        if not any(labels == [other.index(value) for value in other] for other in kept.values()):
            kept[name] = values
    return kept


def skill(p: Point) -> float:
    """1 - L1 / L1 of the best baseline. Above 0 the model beats all baselines.

    Raises:
        UserError: the run's summary has no baselines.
    """
    baselines = [value for value in p.run.baselines.values() if np.isfinite(value)]
    if not baselines:
        raise UserError(f"{p.run.path}/summary.json: no baselines; the skill of a reconstruction is measured by them")
    return 1 - p.loss / min(baselines)


def probes(p: Point) -> dict[str, float]:
    """Scores of RUN/probe.json, higher is better; {} where there is none."""
    file = p.run.path / PROBE
    if not file.is_file():
        return {}
    try:
        return {str(name): float(value) for name, value in json.loads(file.read_text())["scores"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error})") from error


def rank(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows, best first: "rank", "run", "settings", "val_l1", "scores", "z", "sum_z".

    Raises:
        UserError: fewer than two runs, or a probe that only some of them have.
    """
    if len(points) < 2:
        raise UserError(f"{len(points)} finished run{'s' * (len(points) != 1)}: a ranking needs at least two")
    differ = factors(points)
    scores = [{"skill": skill(p), **probes(p)} for p in points]
    for p, own in zip(points, scores, strict=True):
        if own.keys() != scores[0].keys():
            odd = sorted(own.keys() ^ scores[0].keys())[0]
            raise UserError(f"{odd}: only one of {points[0].name} and {p.name} has it; every run needs every score")
    names = list(scores[0])
    z = z_scores(np.array([[own[name] for name in names] for own in scores]))
    rows: list[dict[str, Any]] = []
    for index in np.argsort(-z.sum(1), kind="stable").tolist():
        rows.append(
            {
                "rank": len(rows) + 1,
                "run": points[index].name,
                "settings": {name: values[index] for name, values in differ.items()},
                "val_l1": points[index].loss,
                "scores": scores[index],
                "z": dict(zip(names, z[index].tolist(), strict=True)),
                "sum_z": float(z[index].sum()),
            }
        )
    return rows


def effects(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, int, float]]]:
    """Setting -> value -> (mean sum of z over the runs that have it, how many, standard error: nan of a single one)."""
    found: dict[str, dict[str, tuple[float, int, float]]] = {}
    for name in rows[0]["settings"]:
        values = sorted({row["settings"][name] for row in rows})
        means = {v: [row["sum_z"] for row in rows if row["settings"][name] == v] for v in values}
        found[name] = {
            value: (
                float(np.mean(z)),
                len(z),
                float(np.std(z, ddof=1) / np.sqrt(len(z))) if len(z) > 1 else float("nan"),
            )
            for value, z in means.items()
        }
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The ranking and the effect of each value, as text."""
    names, scores = list(rows[0]["settings"]), list(rows[0]["scores"])
    lines = [["rank", *names, "val L1", *scores, "sum of z"]]
    for row in rows:
        numbers = [f"{row['scores'][s]:+.3f} (z {row['z'][s]:+.2f})" for s in scores]
        own = [row["settings"][name] for name in names]
        lines.append([str(row["rank"]), *own, f"{row['val_l1']:.4f}", *numbers, f"{row['sum_z']:+.2f}"])
    text = aligned(lines)
    text.append("mean sum of z by value:")
    for name, values in effects(rows).items():
        text.append(f"  {name}: " + ", ".join(f"{v} {mean:+.2f} (se {se:.2f})" for v, (mean, _, se) in values.items()))
    text.append("one run a row: neighbours in the ranking may be equal")
    return "\n".join(text)

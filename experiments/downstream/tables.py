"""Tables and figures of the downstream study from what is finished in its folder of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

FULL = "pre-trained, full"
WITH_MAPS = ", maps"
"""After the name of a method whose head gets the courses of maps too."""
SHOWN = (
    "scratch",
    "pre-trained, linear",
    FULL,
    "random weights, linear" + WITH_MAPS,
    "pre-trained, linear" + WITH_MAPS,
    FULL + WITH_MAPS,
    "connectome (correlation)",
    "fluctuation of parcels",
)
"""Methods in the figure of the learning curve; summary.json has them all."""


def planted(out: Path) -> dict[str, float]:
    """Scores of the truth itself on the test subjects: nobody can do better but by luck.

    Returns:
        AUROC and r of the true latents, r of the driven network's true course with the valence over all frames.
    """
    from sklearn.metrics import roc_auc_score

    from swift.data.labels.splits import load_split
    from swift.data.synthetic import load_truth
    from swift.data.synthetic.maps import DRIVEN

    test = set(load_split(str(out / "split.json")).parts["test"])
    truth = load_truth(out / "store")
    rows = [row for row in truth["subjects"] if f"sub-{row['subject']}" in test]
    kinds = ("latent_binary", "label_binary", "latent_continuous", "label_continuous")
    numbers = {kind: np.array([float(row[kind]) for row in rows]) for kind in kinds}
    courses, valence = [], []
    for row in rows:
        (path,) = (out / "store" / "truth").glob(f"sub-{row['subject']}*.npz")
        with np.load(path) as scan:
            courses.append(scan["courses"][:, DRIVEN])
            valence.append(scan["valence_bold"])
    return {
        "synthetic_binary": float(roc_auc_score(numbers["label_binary"], numbers["latent_binary"])),
        "synthetic_continuous": float(np.corrcoef(numbers["latent_continuous"], numbers["label_continuous"])[0, 1]),
        "synthetic_frame": float(np.corrcoef(np.concatenate(courses), np.concatenate(valence))[0, 1]),
    }


def curve(out: Path, to: Path, task: str, sizes: Sequence[int], truth: float) -> dict[str, Any]:
    """Score against training subjects: the figure, and for summary.json cells and paired tests.

    Args:
        out: Folder of the runs.
        to: Folder of the figure.
        task: Two classes.
        sizes: Training subjects; with the largest the runs are the table's own.
        truth: AUROC of the true latent.
    """
    from swift.evaluate.downstream import Cell, cell, compare, results
    from swift.report.figures.table1 import learning_curve

    curves: dict[str, list[tuple[int, Cell]]] = {}
    gains: dict[str, dict[str, Any]] = {}
    for n in sizes:
        folder = out / (f"curve/{n}" if n < max(sizes) else f"table/{task}")
        if not folder.is_dir():
            continue
        found = results([folder])
        if (out / f"maps/{n}").is_dir():
            found += [replace(run, method=run.method + WITH_MAPS) for run in results([out / f"maps/{n}"])]
        runs = {name: [run for run in found if run.method == name] for name in {run.method for run in found}}
        for name, mine in runs.items():
            curves.setdefault(name, []).append((n, cell(mine, "auroc")))
            test = compare(runs[FULL], mine, "auroc") if FULL in runs and name != FULL else None
            if test:
                row = {"difference": test.difference, "low": test.low, "high": test.high, "p": test.p}
                gains.setdefault(name, {})[str(n)] = row
    learning_curve({m: c for m, c in curves.items() if m in SHOWN}, "auroc", to / "learning_curve.png", truth)
    for other in ("scratch", FULL + WITH_MAPS):
        for n, row in gains.get(other, {}).items():
            interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{n:>4} subjects: {FULL} minus {other} {row['difference']:+.3f} {interval}, paired p {row['p']:.4f}")
    cells = {
        name: {str(n): {"mean": c.mean, "sd": c.sd, "low": c.low, "high": c.high} for n, c in some}
        for name, some in sorted(curves.items())
    }
    return {"auroc": cells, f"{FULL} minus": gains}


def nulls(out: Path) -> dict[str, Any]:
    """How many of the labels without effect each method "finds": interval above 0.5, and permutation p below 0.05."""
    from swift.evaluate.compare import against_labels
    from swift.evaluate.downstream import cell, results

    counts: dict[str, dict[str, Any]] = {}
    for folder in sorted((out / "null").glob("*")):
        for result in results([folder]):
            if result.method == "majority / mean":
                continue
            empty = {"labels": 0, "interval_above": 0, "interval_off": 0, "p_below": 0, "auroc": []}
            one = counts.setdefault(result.method, empty)
            got = cell([result], "auroc")
            one["labels"] += 1
            one["interval_above"] += got.low > 0.5
            one["interval_off"] += got.low > 0.5 or got.high < 0.5
            constant = np.ptp(result.predictions.scores[:, 1]) == 0
            one["p_below"] += not constant and against_labels(result.predictions).p < 0.05
            one["auroc"].append(round(got.mean, 4))
    for method, row in counts.items():
        found = f"{row['interval_above']}/{row['labels']} intervals above 0.5, {row['p_below']} p < 0.05"
        print(f"{method:<26} {found}")
    return counts


def write_report(out: Path, to: Path, task: str, sizes: Sequence[int], about: dict[str, Any]) -> None:
    """Table, curve, null labels and ranking, of whatever is finished.

    Args:
        out: Folder of the runs.
        to: Folder of tables and figures.
        task: Of the learning curve.
        sizes: Its training subjects.
        about: The cohort, for summary.json.
    """
    from swift.report.__main__ import main

    to.mkdir(parents=True, exist_ok=True)
    truth = planted(out)
    print("scores of the truth itself on the test subjects:", ", ".join(f"{k} {v:.3f}" for k, v in truth.items()))
    summary: dict[str, Any] = {"cohort": about, "planted": truth}
    if (out / "table").is_dir():
        main(["table1", str(out / "table"), "--out", str(to)])
    if (out / "curve").is_dir():
        summary["learning_curve"] = curve(out, to, task, sizes, truth[task])
    if (out / "null").is_dir():
        summary["null"] = nulls(out)
    if (out / "ablation").is_dir():
        main(["ranking", str(out / "ablation"), "--out", str(to)])
    (to / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

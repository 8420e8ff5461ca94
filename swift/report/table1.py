"""The downstream table: methods by tasks, mean and interval, the best marked only where the tests support it.

From the files of fine-tuned runs and of swift.baselines alone: every score is computed anew from the predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from swift.evaluate.compare import against_labels
from swift.evaluate.downstream import Cell, Result, column, place, score_name
from swift.evaluate.predictions import finite
from swift.evaluate.scores import DRAWS

LABELS = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "mae": "MAE",
    "rmse": "RMSE",
    "r": "r",
    "r2": "R²",
    "residual_r": "residual r",
    "identification": "identification",
    "rank": "rank of the own map",
    "diagonality": "diagonality",
    "dice": "Dice",
}
Columns = dict[str, tuple[str, dict[str, Cell]]]
"""Task -> score, method -> cell."""


def columns_of(found: Sequence[Result], score: str | None = None, seed: int = 0, draws: int = DRAWS) -> Columns:
    """All tasks, in the order of their names."""
    columns: Columns = {}
    for task in sorted({run.task for run in found}):
        runs = [run for run in found if run.task == task]
        name = score_name(runs, score)
        columns[task] = name, column(runs, name, seed, draws)
    return columns


def methods_of(columns: Columns) -> list[str]:
    """Rows: baselines, random weights, scratch, pre-trained."""
    return sorted({method for _, cells in columns.values() for method in cells}, key=place)


# --------------------------------------------------------------------------------------------------------------- text
def permuted(found: Sequence[Result], seed: int, permutations: int) -> str:
    """Each run against shuffled test labels, as Markdown: how often chance does as well."""
    lines = [
        f"\n| task | method | seed | p, one-sided, of {permutations} shuffles of the test labels |",
        "|---|---|---|---|",
    ]
    for run in sorted(found, key=lambda one: (one.task, place(one.method), one.seed)):
        if run.predictions.kind == "map":
            p = float(run.summary["p"]["residual_r"])  # subjects shuffled where the maps still were
        else:
            p = against_labels(run.predictions, seed, permutations).p
        lines.append(f"| {run.task} | {run.method} | {run.seed} | {p:.4f} |")
    return "\n".join(lines)


def heading(task: str, score: str, cells: dict[str, Cell]) -> str:
    """Task, its score and the subjects that trained and were tested."""
    one = next(iter(cells.values()))
    return f"{task}, {LABELS[score]} (n = {one.train} + {one.test})"


def numbers(one: Cell | None) -> tuple[str, str]:
    """Mean with sd, and interval, as text; "-" where undefined."""
    if one is None or not math.isfinite(one.mean):
        return "-", ""
    digits = 3 if abs(one.mean) < 10 else 1
    mean = f"{one.mean:.{digits}f}" + (f" ± {one.sd:.{digits}f}" if math.isfinite(one.sd) else "")
    interval = f"[{one.low:.{digits}f}, {one.high:.{digits}f}]" if math.isfinite(one.low) else "(too few)"
    return mean, interval


def notes(columns: Columns) -> list[str]:
    """What a reader must know about the numbers: one sentence a line."""
    cells = [one for _, column_ in columns.values() for one in column_.values()]
    over = sorted({one.over for one in cells})
    said = {
        "subjects": "a bootstrap over the test subjects (seeds averaged in every draw)",
        "blocks": "a bootstrap over blocks of frames of one subject, which says nothing of other people",
        "splits": "the corrected resampled t over splits (Nadeau and Bengio 2003)",
    }
    lines = [
        "Mean ± standard deviation over seeds and splits; n: training + test subjects.",
        f"Brackets: 95 % interval by {'; '.join(said[name] for name in over)}.",
        "Bold: better than every other method of its column (paired tests on the same subjects, Holm, 5 %). "
        "Without bold no method is shown to be the best.",
    ]
    random = {name: one for _, c in columns.values() for name, one in c.items() if name.startswith("random weights")}
    if random:
        alone = sorted(name for name, one in random.items() if one.seeds < 2)
        lines.append(
            "Random weights: ± is over random encoders, one a seed; a gain within it is noise."
            if not alone
            else f"One random encoder only, so no band of its noise: {'; '.join(alone)}. Repeat it with seed=1, 2, ..."
        )
    unequal = [task for task, (_, c) in columns.items() if len({(x.train, x.test) for x in c.values()}) > 1]
    if unequal:
        lines.append(f"Methods differ in their numbers of subjects in: {', '.join(unequal)}.")
    return lines


def markdown(columns: Columns) -> str:
    """A table in Markdown, with its notes."""
    heads = [heading(task, score, cells) for task, (score, cells) in columns.items()]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for method in methods_of(columns):
        texts = []
        for _, cells in columns.values():
            one = cells.get(method)
            mean, interval = numbers(one)
            shown = f"**{mean}**" if one is not None and one.best else mean
            texts.append(f"{shown} {interval}".strip())
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", *notes(columns)]) + "\n"


def _tex(text: str) -> str:
    """Text with what LaTeX takes for commands written out."""
    special = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "²": r"$^2$", "$": r"\$"}
    return "".join(special.get(letter, letter) for letter in text)


def latex(columns: Columns) -> str:
    """A tabular with booktabs' rules."""
    heads = [_tex(heading(task, score, cells)) for task, (score, cells) in columns.items()]
    lines = [r"\begin{tabular}{l" + "c" * len(heads) + "}", r"\toprule", "method & " + " & ".join(heads) + r" \\"]
    lines.append(r"\midrule")
    for method in methods_of(columns):
        texts = []
        for _, cells in columns.values():
            one = cells.get(method)
            mean, interval = (_tex(text) for text in numbers(one))
            texts.append((rf"\textbf{{{mean}}}" if one is not None and one.best else mean) + (f" {interval}").rstrip())
        lines.append(f"{_tex(method)} & " + " & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {line}" for line in notes(columns))]) + "\n"


def rows(columns: Columns) -> list[dict[str, Any]]:
    """A row for every cell, JSON-ready."""
    found = []
    for task, (score, cells) in columns.items():
        for method, one in cells.items():
            values = {key: finite(v) if isinstance(v, float) else v for key, v in one.__dict__.items()}
            found.append({"task": task, "method": method, "score": score, **values})
    return found

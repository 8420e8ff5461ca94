"""One self-contained page of runs and studies: figures, tables, settings and provenance, to be sent to a colleague.

Everything is in the one file: figures as embedded images, no script, nothing fetched. A run directory gives its
summary, figures, settings and provenance; any other folder (of a study) its figures (*.png) and tables (*.csv).
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from swift.evaluate.scores import interval_text
from swift.report.output import say
from swift.report.points import point
from swift.report.runs import Run, describe, judged_below, load_run
from swift.utils.errors import UserError
from swift.utils.page import check_name, document, write

MOST_ROWS = 60
LARGEST = 5 << 20
"""Bytes of a figure that is still embedded."""

CAPTIONS = {
    "loss": "Training and held-out error over optimizer steps; dashed: baselines on the same held-out clips.",
    "reconstruction": "A held-out clip, what was hidden of it, and the reconstruction.",
    "performance": "Speed and load over the run.",
    "pretraining": "Error against what was seen and computed; thin: training, dots: held out, dotted: restarts.",
    "scaling_laws": "Loss against size, data and compute; lines: fitted laws, bands: 95 % bootstrap intervals.",
    "scaling_model": "Rates beside the ideal line (dashed) and the fitted model of step time; open: predicted points.",
    "temporal": "Autocorrelation of BOLD and of every layer; bands: 95 % over scans; right: frames shuffled.",
    "ablation": "Runs ranked by the sum of z-scores, and the mean of every value of every setting.",
    "throughput": "Step time against model FLOPs, and peak memory beside the plan's.",
    "mu_transfer": "Held-out loss against the learning rate at several widths, with muP and without.",
    "coord_check": "Size of activations against width, a line a step.",
}


def embedded(path: Path) -> str:
    """An image as a figure with its caption.

    Raises:
        UserError: it is no PNG, or too large to send.
    """
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise UserError(f"{path}: is no PNG")
    if len(content) > LARGEST:
        raise UserError(f"{path}: {len(content) >> 20} MiB; figures of a page may have {LARGEST >> 20} MiB")
    data = base64.b64encode(content).decode()
    caption = CAPTIONS.get(path.stem, path.stem.replace("_", " "))
    picture = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as a table that scrolls by itself on a narrow screen."""

    def cell(value: Any) -> str:
        if value is None:
            value = "–"
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if isinstance(value, float):
            value = f"{value:.5g}"
        if isinstance(value, int):
            value = f"{value:,}"
        text = str(value)
        number = text.replace(",", "").replace(".", "").replace("e", "").replace("-", "").replace("+", "").isdigit()
        return f"<td{' class=number' if number else ''}>{escape(text)}</td>"

    lines = ["<tr>" + "".join(f"<th scope=col>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    return '<div class="wide"><table>' + "".join(lines) + "</table></div>"


def folded(title: str, text: str) -> str:
    """Text that is shown on demand."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def overview(runs: Sequence[Run]) -> str:
    """Table of all runs, and their curves in one figure where they are at most twelve."""
    head = ("run", "model", "parameters", "steps", "train loss", "best val L1", "last val L1", "unit", "beats")
    rows = []
    tasks = [run for run in runs if run.target is not None]
    runs = [run for run in runs if run.target is None]
    text = _tasks(tasks) if tasks else ""
    if not runs:
        return text
    for run in runs:
        d = describe(run)
        beats = None if d["beats"] is None else f"{len(d['beats'])} of {len(d['baselines'])}"
        keys = ("run", "model", "parameters", "steps", "train_loss", "val_l1", "val_l1_last", "unit")
        rows.append([*(d[key] for key in keys), beats])
    text = table(head, rows) + text
    if not 2 <= len(runs) <= 12:
        return text
    from swift.report.figures.pretraining import draw, notes

    try:
        points = [point(run.path) for run in runs]
        with tempfile.TemporaryDirectory() as folder:
            draw(points, ("steps", "flops"), Path(folder) / "pretraining.png")
            text += embedded(Path(folder) / "pretraining.png")
    except UserError as error:
        # A run of before perf/* was logged, or a fine-tuning: the table stands alone.
        return text + f"<p>No common curves: {escape(str(error))}</p>"
    return text + "".join(f"<p>{escape(note)}</p>" for note in notes(points))


def _tasks(runs: Sequence[Run]) -> str:
    """Table of runs with a target."""
    head = ("run", "task", "model", "parameters", "steps", "train loss", "score", "best val", "test", "95 %")
    rows = []
    for run in runs:
        d = describe(run)
        loss = "–" if d["train_loss"] is None else f"{d['train_loss']} ({d['loss']})"
        loss = f"{d['train_loss']:.4g} ({d['loss']})" if isinstance(d["train_loss"], float) else loss
        keys = ("run", "task", "model", "parameters", "steps")
        more = (d["score"], d["val_score"], d["test_score"], d["test_interval"] or None)
        rows.append([*(d[key] for key in keys), loss, *more])
    return table(head, rows)


def scores_table(summary: dict[str, Any]) -> str:
    """Scores of validation and test with the test's intervals, of a run or a baseline that was judged."""
    told = summary["scores"]
    rows = [
        [name, told["val"].get(name), value, interval_text(summary, name) or None]
        for name, value in told["test"].items()
    ]
    subjects = summary.get("subjects", {})
    note = f"<p>Subjects: {subjects['val']} val, {subjects['test']} test.</p>" if subjects else ""
    return table(("score", "val", "test", "95 % interval of test"), rows) + note


def baselines_section(folder: Path) -> str:
    """Results of `swift.baselines`: a table a method."""
    parts = []
    for place in judged_below(folder):
        summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
        parts.append(f"<h3>{escape(str(summary.get('method') or place.name))}, {escape(str(summary.get('task')))}</h3>")
        parts.append(scores_table(summary))
    return "".join(parts)


def run_section(run: Run) -> str:
    """Figures, scores, settings and provenance of one run."""
    parts = []
    if run.summary:
        plain = {k: v for k, v in run.summary.items() if not isinstance(v, (dict, list))}
        parts.append(table(list(plain), [list(plain.values())]))
    else:
        parts.append("<p>Not finished: no summary yet.</p>")
    if "scores" in run.summary:
        parts += ["<h3>Scores</h3>", scores_table(run.summary)]
    if run.baselines:
        rows = sorted([*run.baselines.items(), ("this run", run.summary.get("val_l1"))], key=lambda row: str(row[1]))
        parts += ["<h3>Held-out error beside the baselines</h3>", table(["", f"L1 ({run.unit})"], rows)]
    parts += [embedded(path) for path in sorted((run.path / "figures").glob("*.png"))]
    for name, title in (
        ("summary.json", "Summary"),
        ("config.yaml", "Settings"),
        ("overrides.json", "Overrides"),
        ("provenance.json", "Provenance: code, packages, machine, restarts"),
    ):
        file = run.path / name
        if file.is_file():
            parts.append(folded(f"{title} ({name})", file.read_text(encoding="utf-8", errors="replace")))
    return "".join(parts)


def verdict(folder: Path) -> str:
    """What a study checked by itself: a failed check stands before its figures, so that none passes for a result."""
    try:
        told = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(told, dict) or not isinstance(told.get("passed"), bool):
        return ""
    checks = told.get("checks")
    items = (
        [f"{'passed' if ok else 'FAILED'}: {name}" for name, ok in checks.items()] if isinstance(checks, dict) else []
    )
    head = (
        "Checks of this study passed." if told["passed"] else "CHECK FAILED: what follows does not show what it claims."
    )
    return f"<p><strong>{escape(head)}</strong></p>" + "".join(f"<p>{escape(item)}</p>" for item in items)


def study_section(folder: Path) -> str:
    """Figures and tables of a folder that is no run."""
    parts = [verdict(folder)]
    parts += [embedded(path) for path in sorted(folder.glob("*.png"))]
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8", errors="replace") as stream:
            rows = list(csv.reader(stream))
        if rows:
            parts += [f"<h3>{escape(path.name)}</h3>", table(rows[0], rows[1 : MOST_ROWS + 1])]
        if len(rows) > MOST_ROWS + 1:
            parts.append(f"<p>{len(rows) - 1 - MOST_ROWS} further rows are left out.</p>")
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size < 200_000:
            parts.append(folded(path.name, path.read_text(encoding="utf-8", errors="replace")))
    return "".join(parts)


def sort_places(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Run directories (also those one level below a folder of runs), and study folders.

    Raises:
        UserError: a place that is neither.
    """
    runs: list[Path] = []
    studies: list[Path] = []
    for path in paths:
        inside = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        if (path / "metrics.jsonl").is_file():
            runs.append(path)
        elif path.is_dir() and judged_below(path):
            studies.append(path)
            runs += inside
        elif any(path.glob("*.png")) or any(path.glob("*.csv")):
            studies.append(path)
        elif inside:
            runs += inside
        else:
            raise UserError(f"{path}: neither a run directory nor a folder with figures (*.png) or tables (*.csv)")
    return list(dict.fromkeys(runs)), list(dict.fromkeys(studies))


def page(paths: Sequence[Path], title: str) -> str:
    """The page.

    Raises:
        UserError: a place without anything to show, or a damaged run.
    """
    run_paths, studies = sort_places(paths)
    runs = [load_run(path) for path in run_paths]
    sections: list[tuple[str, str, str]] = []
    if runs:
        sections.append(("runs", "Runs", overview(runs)))
    for i, folder in enumerate(studies):
        text = (baselines_section(folder) if judged_below(folder) else "") + study_section(folder)
        sections.append((f"study-{i}", folder.resolve().name, text))
    sections += [(f"run-{i}", f"Run {run.name}", run_section(run)) for i, run in enumerate(runs)]
    links = "".join(f'<li><a href="#{key}">{escape(name)}</a></li>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{text}</section>' for key, name, text in sections)
    counts = f"{len(runs)} run{'s' * (len(runs) != 1)}, {len(studies)} stud{'ies' if len(studies) != 1 else 'y'}"
    return document(title, counts, f"<nav><ul>{links}</ul></nav><main>{body}</main>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report html`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", type=Path, help="run directories, folders of some, or folders of studies"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="the page")
    parser.add_argument("--title", default="swift: runs and studies", help="title of the page")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    check_name(args.out)
    say([write(args.out, page(args.runs, args.title))])
    return 0

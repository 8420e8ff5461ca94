"""`python -m swift.report RUN_DIR...`: redraw the figures of runs and print a table of them, from their files only.

`python -m swift.report NAME ...` makes one figure or table of the report. NAME: a module of swift.report.figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift.report.output import aligned
from swift.report.runs import Run, describe, load_run
from swift.utils.errors import UserError

COMMANDS = {
    name: f"swift.report.figures.{name}"
    for name in (
        "ablation",
        "html",
        "pretraining",
        "ranking",
        "scaling_laws",
        "scaling_model",
        "strong_scaling",
        "table1",
        "temporal",
        "throughput",
    )
}
"""Subcommand -> module with `add_arguments(parser)` and `run(args) -> int`; the first line of its docstring is the
help."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m swift.report",
        description="Redraw the figures of runs (RUN_DIR/figures/{loss,reconstruction,performance}.png) and print a "
        "table of them.",
        epilog="One figure or table of the report: python -m swift.report NAME --help, where NAME is one of "
        f"{', '.join(COMMANDS)}. (A run directory of such a name is given as ./NAME.)"
        if COMMANDS
        else None,
    )
    made.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", type=Path, help="directory of a run (run_dir= of swift.train)"
    )
    made.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    made.add_argument(
        "--compare", type=Path, metavar="PNG", help="also draw the loss curves of all runs into one figure"
    )
    made.add_argument("--no-figures", action="store_true", help="draw nothing, only print")
    return made


def draw(run: Run) -> list[Path]:
    """Draw the figures of one run; the reconstruction and the speed only if their data is there.

    Returns:
        The files written.
    """
    # matplotlib takes a second that --no-figures need not wait
    from swift.report.figures.loss import loss_curve
    from swift.report.figures.performance import has_performance, performance
    from swift.report.figures.reconstruction import reconstruction

    folder = run.path / "figures"
    loss_curve([run.path], folder / "loss.png")
    written = [folder / "loss.png"]
    data = folder / "reconstruction.npz"
    if data.is_file():
        reconstruction(data, folder / "reconstruction.png")
        written.append(folder / "reconstruction.png")
    if has_performance(run):
        performance(run.path, folder / "performance.png")
        written.append(folder / "performance.png")
    return written


def _number(value: Any, digits: int = 4) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}" if isinstance(value, float) and math.isfinite(value) else str(value or "-")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `swift.report.runs.describe` as text: a line a run, then its baselines and which it beats."""
    head = (
        "run",
        "model",
        "parameters",
        "steps",
        "train loss (last)",
        "val L1 (best)",
        "at step",
        "val L1 (last)",
        "beats",
    )
    tasks = [row for row in rows if "task" in row]
    rows = [row for row in rows if "task" not in row]
    if tasks:
        below = _task_table(tasks)
        return "\n".join([table(rows), "", below]) if rows else below
    lines: list[Sequence[str]] = [head]
    for row in rows:
        beats = "-" if row["beats"] is None else f"{len(row['beats'])} of {len(row['baselines'])}"
        numbers = [
            _number(row[key]) for key in ("parameters", "steps", "train_loss", "val_l1", "val_l1_step", "val_l1_last")
        ]
        lines.append((row["run"], row["model"] or "-", *numbers, beats))
    text = aligned(lines, left=2)
    for row in rows:
        if row["baselines"]:
            text += ["", f"{row['run']}: baselines on the same held-out clips (L1, {row['unit']})"]
            for name, value in row["baselines"].items():
                verdict = "" if row["beats"] is None else ("  beaten" if name in row["beats"] else "  not beaten")
                text.append(f"  {value:.4f}  {name}{verdict}")
    return "\n".join(text)


def _task_table(rows: Sequence[dict[str, Any]]) -> str:
    """Runs with a target: each with its own score."""
    head = (
        "run",
        "task",
        "model",
        "parameters",
        "steps",
        "train loss (last)",
        "score",
        "val (best)",
        "at step",
        "test",
    )
    lines: list[Sequence[str]] = [(*head, "95 %")]
    for row in rows:
        loss = f"{_number(row['train_loss'])} {row['loss']}"
        numbers = [_number(row[key]) for key in ("val_score", "val_score_step", "test_score")]
        first = [row["run"], row["task"], row["model"] or "-", _number(row["parameters"]), _number(row["steps"]), loss]
        lines.append([*first, row["score"], *numbers, row["test_interval"] or "-"])
    return "\n".join(aligned(lines, left=3))


def _command(name: str, given: Sequence[str]) -> int:
    """Run one subcommand: 0, or 2 for a user's mistake (one line on standard error)."""
    module = importlib.import_module(COMMANDS[name])
    made = argparse.ArgumentParser(prog=f"python -m swift.report {name}", description=module.__doc__)
    module.add_arguments(made)
    try:
        return int(module.run(made.parse_args(given)))
    except UserError as error:
        print(f"swift.report {name}: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, or 2 for a user's mistake (one line on standard error).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        return _command(given[0], given[1:])
    args = parser().parse_args(given)
    try:
        runs = [load_run(path) for path in args.runs]
        rows = [describe(run) for run in runs]
        written = [] if args.no_figures else [path for run in runs for path in draw(run)]
        if args.compare is not None:
            from swift.report.figures.loss import loss_curve

            loss_curve(args.runs, args.compare)
            written.append(args.compare)
    except UserError as error:
        print(f"swift.report: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

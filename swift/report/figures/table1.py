"""The downstream table: methods by tasks, mean and interval, the best marked only where the tests support it.

From the files of fine-tuned runs and of swift.baselines alone: every score is computed anew from the predictions.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from swift.evaluate.downstream import CHANCE, Cell, Result, place, results, score_name
from swift.evaluate.map_scores import SCORES as MAPPED
from swift.evaluate.scores import CLASSIFIED, DRAWS, REGRESSED
from swift.report.output import write_csv
from swift.report.style import BLUE, COLOURS, GREEN, HIDDEN, ORANGE, VERMILION, WIDTH, figure
from swift.report.table1 import LABELS, Columns, columns_of, latex, markdown, permuted, rows
from swift.utils.errors import UserError

FAMILIES = {0: ("baselines", HIDDEN), 1: ("random weights", ORANGE), 2: ("from scratch", VERMILION),
            3: ("pre-trained", BLUE), 4: ("other", GREEN)}  # fmt: skip
ACROSS = 3
ROW = 0.19


def forest(columns: Columns, out: str | Path) -> None:
    """A panel a task: a dot and its 95 % interval for every method; a ring where the best is really the best.

    Args:
        columns: Task -> score, method -> cell.
        out: PNG.

    Raises:
        UserError: The file cannot be written.
    """
    methods = sorted({m for _, cells in columns.values() for m in cells}, key=place)
    across = min(ACROSS, len(columns))
    down = -(-len(columns) // across)
    with figure(down * (ROW * len(methods) + 0.8) + 0.3, out) as fig:
        axes = fig.subplots(down, across, sharey=True, squeeze=False)
        for number, (task, (score, cells)) in enumerate(columns.items()):
            axis = axes[number // across][number % across]
            if score in CHANCE:
                axis.axvline(CHANCE[score], color="0.7", linewidth=0.8, zorder=0)
            for row, method in enumerate(methods):
                one = cells.get(method)
                if one is None or not math.isfinite(one.mean):
                    continue
                colour = FAMILIES[place(method)[0]][1]
                if method.startswith("random weights") and one.seeds > 1 and math.isfinite(one.sd):
                    band = one.mean - 2 * one.sd, one.mean + 2 * one.sd
                    axis.axvspan(*band, color=colour, alpha=0.12, linewidth=0, zorder=0, gid=f"noise of {method}")
                if math.isfinite(one.low):
                    axis.plot([one.low, one.high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
                axis.plot(one.mean, row, "o", color=colour, markersize=4.5)
                if one.best:
                    axis.plot(one.mean, row, "o", markersize=9, markerfacecolor="none", markeredgecolor="0.2")
            axis.set_title(task)
            axis.set_xlabel(LABELS[score])
            axis.set_yticks(range(len(methods)), methods)
            axis.set_ylim(len(methods) - 0.4, -0.6)
            axis.tick_params(axis="y", length=0)
        for number in range(len(columns), down * across):
            axes[number // across][number % across].set_axis_off()
        used = sorted({place(method)[0] for method in methods})
        handles = [Line2D([], [], color=FAMILIES[f][1], marker="o", markersize=4.5, label=FAMILIES[f][0]) for f in used]
        fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def learning_curve(
    curves: dict[str, Sequence[tuple[int, Cell]]], score: str, out: str | Path, planted: float | None = None
) -> None:
    """Score against the number of training subjects, with intervals.

    Args:
        curves: Method -> (subjects, cell), in order of subjects.
        score: Of the cells.
        out: PNG.
        planted: What the planted effect allows; drawn as a line.

    Raises:
        UserError: The file cannot be written.
    """
    with figure(3.4, out, width=WIDTH * 0.72) as fig:
        axis = fig.subplots()
        if score in CHANCE:
            axis.axhline(CHANCE[score], color="0.7", linewidth=0.8)
            axis.annotate("chance", (1, CHANCE[score]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          color="0.45", fontsize=7.5)  # fmt: skip
        if planted is not None:
            axis.axhline(planted, color="0.45", linewidth=0.8, linestyle=(0, (4, 3)))
            axis.annotate("the planted truth", (1, planted), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color="0.45", fontsize=7.5)  # fmt: skip
        for number, (method, points) in enumerate(sorted(curves.items(), key=lambda item: place(item[0]))):
            colour = COLOURS[number % len(COLOURS)]
            shift = 1.02 ** (number - (len(curves) - 1) / 2)
            counts = [count * shift for count, _ in points]
            axis.plot(counts, [one.mean for _, one in points], "o-", color=colour, markersize=4, label=method)
            for count, (_, one) in zip(counts, points):
                axis.plot([count, count], [one.low, one.high], color=colour, linewidth=1, alpha=0.7)
        ticks = sorted({count for points in curves.values() for count, _ in points})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("training subjects")
        axis.set_ylabel(LABELS[score])
        fig.legend(loc="outside upper center", ncols=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report table1`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", type=Path, help="runs, or folders of them (multiruns, baselines)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write table1.{md,csv,tex,json,png} there")
    parser.add_argument(
        "--score",
        choices=(*CLASSIFIED, *REGRESSED, *MAPPED),
        help="show this score where the task has it, instead of AUROC or r",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"bootstrap draws (default: {DRAWS})")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--permutations",
        type=int,
        default=0,
        metavar="N",
        help="also test AUROC or r of every run against N shuffles of the test labels (default: no test)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def _write(columns: Columns, found: Sequence[Result], out: Path, args: argparse.Namespace) -> list[Path]:
    """All files of the table."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table1.md").write_text(markdown(columns), encoding="utf-8")
        (out / "table1.tex").write_text(latex(columns), encoding="utf-8")
        (out / "table1.json").write_text(json.dumps(rows(columns), indent=2) + "\n", encoding="utf-8")
        # the CSV has every score of every task, not only the one shown
        every: list[dict[str, Any]] = []
        for name in (*CLASSIFIED, *REGRESSED, *MAPPED):
            fitting = [run for run in found if score_name([run], name) == name]
            every += rows(columns_of(fitting, name, args.seed, args.draws)) if fitting else []
        every.sort(key=lambda row: (row["task"], place(row["method"])))
        write_csv(out / "table1.csv", every)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    forest(columns, out / "table1.png")
    return [out / f"table1.{kind}" for kind in ("md", "csv", "tex", "json", "png")]


def run(args: argparse.Namespace) -> int:
    """Make the table.

    Returns:
        0.

    Raises:
        UserError: no judged runs, damaged files, two runs for one place of the table.
    """
    if args.draws < 1:
        raise UserError(f"--draws {args.draws}: must be at least 1")
    if args.permutations < 0:
        raise UserError(f"--permutations {args.permutations}: must be 0 (no test) or more")
    found = results(args.runs)
    columns = columns_of(found, args.score, args.seed, args.draws)
    written = _write(columns, found, args.out, args) if args.out is not None else []
    print(json.dumps(rows(columns), indent=2) if args.json else markdown(columns), end="" if not args.json else "\n")
    if args.permutations and not args.json:
        print(permuted(found, args.seed, args.permutations))
    if written and not args.json:
        print("\nwrote " + ", ".join(str(path) for path in written))
    return 0

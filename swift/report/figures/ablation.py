"""Ablation of pre-training: settings ranked by the sum of z-scores of reconstruction and of a probe.

Reconstruction is judged as skill, 1 - L1 of the model / L1 of the best baseline on the same hidden voxels, since the
raw loss of different mask ratios, clips and patches measures problems of different difficulty. Probes are scores of
frozen features (RUN/probe.json), where a run has them. Runs that were fine-tuned are ranked by `python -m swift.report
ranking`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from swift.report.ablation import effects, rank, table
from swift.report.output import say, write_csv
from swift.report.points import finished_points
from swift.report.ranking import csv_row
from swift.report.style import COLOURS, figure


def draw(rows: Sequence[dict[str, Any]], out: str | Path | None) -> Figure:
    """The ranking as stacked z-scores, and the mean of every value of every setting.

    Args:
        rows: Of `rank`.
        out: PNG to write; None: only return the figure.
    """
    shown = list(rows[:24])
    found = effects(rows)
    with figure(1.2 + 0.2 * max(len(shown), 12), out) as fig:
        ranking, means = fig.subplots(1, 2, width_ratios=(1.5, 1))
        places = np.arange(len(shown))
        for i, name in enumerate(rows[0]["scores"]):
            offset, height = (i - (len(rows[0]["scores"]) - 1) / 2) * 0.35, 0.35
            own = [row["z"][name] for row in shown]
            ranking.barh(places + offset, own, height, color=COLOURS[i % len(COLOURS)], label=name)
        ranking.plot([row["sum_z"] for row in shown], places, "kD", ms=3.5, label="sum")
        ranking.set_yticks(places, [" · ".join(row["settings"].values()) for row in shown], fontsize=7)
        ranking.invert_yaxis()
        ranking.axvline(0, color="#808080", lw=0.7)
        ranking.set_xlabel(f"z-score over the {len(rows)} runs (higher is better)")
        ranking.set_title(" · ".join(name.rpartition(".")[2] for name in found), loc="left", fontsize=8)
        ranking.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3)
        place, ticks = 0, []
        for i, (name, values) in enumerate(found.items()):
            for value, (mean, count, error) in values.items():
                bar = error if np.isfinite(error) else 0.0
                means.barh(place, mean, 0.7, xerr=bar, color=COLOURS[i % len(COLOURS)], ecolor="#404040", capsize=2)
                ticks.append((place, f"{name.rpartition('.')[2]} {value} (n={count})"))
                place += 1
            place += 1
        means.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=7)
        means.invert_yaxis()
        means.axvline(0, color="#808080", lw=0.7)
        means.set_xlabel("mean sum of z, ± 1 SE")
    return fig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report ablation`."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="pre-trainings, or folders of some")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="folder for the figure and CSV (.)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Rank, draw, print."""
    points, left_out = finished_points(args.runs)
    say(left_out)
    rows = rank(points)
    draw(rows, args.out / "ablation.png")
    write_csv(args.out / "ablation.csv", [csv_row(row) for row in rows], ".5f")
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    say([f"wrote {args.out / name}" for name in ("ablation.png", "ablation.csv")])
    return 0

"""Step time and memory of masked pre-training by size, variant and clip length, measured here, beside the plan.

Reads POINT/throughput.json (made by a study of kind throughput). A step: forward, backward and AdamW on one device and
one clip of noise; each point in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from swift.report.output import say, write_csv
from swift.report.style import COLOURS, figure, gridded, plain_log
from swift.report.throughput import load, rows, table

MARKERS = "osD^vP"


def draw(found: Sequence[dict[str, Any]], out: str | Path | None) -> Figure:
    """Draw measured points: a colour a variant, a marker a clip length.

    Args:
        found: Of `throughput.rows`.
        out: PNG to write; None: only return the figure.
    """
    variants, lengths = sorted({r["variant"] for r in found}), sorted({r["frames"] for r in found})
    with figure(3.6, out) as fig:
        speed, memory = fig.subplots(1, 2)
        for i, variant in enumerate(variants):
            for j, frames in enumerate(lengths):
                own = [r for r in found if (r["variant"], r["frames"]) == (variant, frames)]
                if not own:
                    continue
                style: dict[str, Any] = {
                    "color": COLOURS[i % len(COLOURS)],
                    "marker": MARKERS[j % len(MARKERS)],
                    "ms": 5,
                }
                work = [r["gflop_a_clip"] * r["batch"] for r in own]
                name = f"{variant}, {frames} frames"
                speed.loglog(work, [r["step_s"] for r in own], lw=0.7, label=name, gid="measured", **style)
                spread = [[r["step_low_s"] for r in own], [r["step_high_s"] for r in own]]
                speed.vlines(work, *spread, color=style["color"], lw=1.2, gid="rounds")
                planned = [r["planned_step_s"] for r in own]
                if None not in planned:
                    speed.loglog(work, planned, ls="", mfc="white", gid="planned", **style)
                memory.loglog([r["planned_mib"] for r in own], [r["peak_mib"] for r in own], ls="", **style)
        everything = np.array([r["gflop_a_clip"] * r["batch"] for r in found])
        rate = float(np.median([r["gflop_a_s"] for r in found]))
        ends = np.array([everything.min() / 1.2, everything.max() * 1.2])
        speed.loglog(ends, ends / rate, color="#808080", lw=0.9, ls="--", label=f"median rate: {rate:.3g} GFLOP/s")
        known = any(r["planned_step_s"] is not None for r in found)
        speed.set_xlabel("model FLOPs of a step (GFLOP)" + ("; open: planned" if known else ""))
        speed.set_ylabel("seconds a step (forward, backward, AdamW)")
        speed.set_title(f"on {', '.join(sorted({r['device'] for r in found}))}", loc="left")
        speed.legend(fontsize=7)
        both = [r[key] for r in found for key in ("planned_mib", "peak_mib") if r[key] > 0]
        line = [min(both) / 1.2, max(both) * 1.2]
        memory.loglog(line, line, color="#808080", lw=0.9, ls="--", label="measured = planned")
        memory.set_xlabel("planned peak memory (MiB)")
        memory.set_ylabel("measured peak memory (MiB)")
        memory.legend(fontsize=7)
        for ax, x, y in ((speed, "gflop_a_clip", "step_s"), (memory, "planned_mib", "peak_mib")):
            for r in (r for r in found if (r["variant"], r["frames"]) == (variants[0], lengths[-1])):
                place = (r[x] * (r["batch"] if ax is speed else 1), r[y])
                ax.annotate(r["model"], place, (0, 6), textcoords="offset points", ha="center", fontsize=7)
            plain_log(ax, "x")
            plain_log(ax, "y")
            gridded(ax)
        fig.supxlabel(
            "points: median of the measured rounds; bars: fastest to slowest round; lines join one kind of model",
            fontsize=8,
        )
    return fig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report throughput`."""
    parser.add_argument(
        "runs", nargs="+", metavar="FOLDER", type=Path, help="folders of measured points, or a folder that holds some"
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="folder for the figure and CSV (.)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Read, draw, print."""
    found = rows(load(args.runs))
    draw(found, args.out / "throughput.png")
    write_csv(args.out / "throughput.csv", found, ".5g")
    print(json.dumps(found, indent=2) if args.json else table(found))
    say([f"wrote {args.out / name}" for name in ("throughput.png", "throughput.csv")])
    return 0

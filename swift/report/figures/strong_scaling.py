"""Clips/s, efficiency and time of a step by phase over the nodes of a sweep, from run directories.

Efficiency: clips/s per rank, relative to the smallest run. Phases are parts of the steps that were profiled
(`swift.train.callbacks.phases`), times the step time that was not. Communication is what nothing computed meanwhile; it
includes the wait for the slowest rank, which stands beside it. Where a size was also run with data.repeat_batch=true,
the difference of both step times is what input costs. Intervals: 95 % bootstrap over the logged intervals of a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from swift.report.output import say
from swift.report.strong_scaling import PHASES, Row, rows, table
from swift.report.style import BLUE, COLOURS, figure, gridded, plain_log


def draw(found: Sequence[Row], out: str | Path | None) -> Figure:
    """Draw clips/s with the ideal line, and the time of a clip on one rank by phase, with and without input."""
    with figure(3.6, out) as fig:
        rate, parts = fig.subplots(1, 2)
        ranks = np.array([r.ranks for r in found])
        measured = np.array([r.clips_per_second for r in found])
        bars = np.abs(np.array([r.rate_interval for r in found]).T - measured)
        rate.plot(ranks, measured[0] * ranks / ranks[0], color="0.6", ls="--", label="ideal")
        rate.errorbar(ranks, measured, bars, color=BLUE, marker="o", ms=4, capsize=3, label="measured")
        rate.set(xscale="log", yscale="log", xlabel="ranks", ylabel="clips/s, all ranks")
        rate.set_title("throughput", loc="left")
        rate.set_xticks(ranks, [str(n) for n in ranks])
        rate.xaxis.set_minor_locator(NullLocator())
        plain_log(rate, "y")
        rate.legend()
        a_clip = np.array([1e3 * r.ranks / r.clips_per_step for r in found])
        bottom = np.zeros(len(found))
        for name, colour in zip(PHASES, COLOURS[1:], strict=False):
            height = np.array([r.seconds.get(name, 0.0) for r in found]) * a_clip
            parts.bar([str(n) for n in ranks], height, bottom=bottom, label=name, width=0.6, color=colour)
            bottom += height
        both = [i for i, r in enumerate(found) if r.input is not None]
        if both:
            bare = [(found[i].step_seconds - (found[i].input or 0.0)) * a_clip[i] for i in both]
            ends = np.array([found[i].input_interval or (0.0, 0.0) for i in both]).T
            spread = np.abs(ends[::-1] - [found[i].input or 0.0 for i in both]) * a_clip[both]
            style = {"fmt": "_", "ms": 13, "mew": 1.6, "capsize": 3, "color": "black"}
            parts.errorbar(both, bare, spread, label="step without input", gid="without input", **style)
        parts.set(xlabel="ranks", ylabel="rank-milliseconds a clip")
        parts.set_title("time by phase, with input", loc="left")
        parts.legend(fontsize=7.5)
        for ax in (rate, parts):
            gridded(ax, "y")
        text = "medians over the logged intervals; bars: 95 % bootstrap"
        fig.supxlabel(text + (" (right: of the difference that input makes)" if both else ""), fontsize=8)
    return fig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report strong_scaling`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", type=Path, help="runs of a sweep over nodes, or its folder"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="also draw throughput and phases")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    found, notes = rows(args.runs)
    print(
        json.dumps([{k: v for k, v in asdict(r).items() if k != "logged"} for r in found], indent=2)
        if args.json
        else table(found)
    )
    if args.out:
        draw(found, args.out)
        notes.append(f"wrote {args.out}")
    say(notes)
    return 0

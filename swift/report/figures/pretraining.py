"""Loss curves of pre-training against steps, clips, tokens and FLOPs (figure 2): train and held out, restarts marked.

Curves of unfinished runs are drawn dashed; runs whose tokens or objective differ are named, since their losses or
tokens are not comparable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from swift.report.figures.loss import common_axis, extent, smooth
from swift.report.output import say, write_csv
from swift.report.points import OBJECTIVE, TOKENISATION, Point, differing, find_runs, point
from swift.report.style import COLOURS, figure, gridded
from swift.utils import jsonl
from swift.utils.errors import UserError

AXES = {"steps": "optimizer steps", "clips": "clips seen", "tokens": "patch tokens seen", "flops": "training FLOPs"}


def row(p: Point) -> dict[str, Any]:
    """A row of the table; None where the run does not say."""
    train, val = p.run.series("train/loss")[1], p.run.series(p.run.val_key)[1]
    finite = val[np.isfinite(val)]
    return {
        "run": p.name,
        "model": (p.run.settings.get("model") or {}).get("name"),
        "parameters": p.run.summary.get("parameters"),
        "finished": p.finished,
        **{axis: p.total(axis) for axis in AXES},
        "steps": p.steps,
        "train_loss": jsonl.plain(train[-1]) if len(train) else None,
        "val_l1": jsonl.plain(val[-1]) if len(val) else None,
        "val_l1_best": float(finite.min()) if len(finite) else None,
        "unit": p.run.unit,
        "restarts": len(p.restarts),
    }


def notes(points: Sequence[Point]) -> list[str]:
    """What a reader must know to compare the curves."""
    found = [
        f"{p.run.path} is not finished ({p.steps} of {p.max_steps or '?'} steps): dashed"
        for p in points
        if not p.finished
    ]
    if len(points) > 1:
        if (what := differing(points, TOKENISATION)) is not None:
            found.append(f"{what}: tokens and losses of different tokenisation are not comparable")
        if (what := differing(points, OBJECTIVE)) is not None:
            found.append(f"{what}: the losses measure different things")
    return found


def labels(points: Sequence[Point]) -> list[str]:
    """What each run is called in the legend: its model where that tells all apart, else its folder, cut to 30."""
    models = [str((p.run.settings.get("model") or {}).get("name") or p.name) for p in points]
    if len(set(models)) == len(models):
        return models
    return [p.name if len(p.name) <= 30 else f"{p.name[:14]}…{p.name[-15:]}" for p in points]


def draw(points: Sequence[Point], axes: Sequence[str], out: str | Path | None) -> Figure:
    """Loss curves, a panel an axis.

    Args:
        points: Runs.
        axes: Of AXES.
        out: PNG to write; None: only return the figure.

    Raises:
        UserError: a run without a loss.
    """
    for p in points:
        if not len(p.run.series("train/loss")[0]) and not len(p.run.series(p.run.val_key)[0]):
            raise UserError(f"{p.run.path}/metrics.jsonl: neither train/loss nor {p.run.val_key} in it")
    rows = (len(axes) + 1) // 2
    with figure(0.5 + 2.7 * rows, out) as fig:
        grid = fig.subplots(rows, min(len(axes), 2), sharey=True, squeeze=False)
        panels = list(grid.flat)
        for ax, axis in zip(panels, axes, strict=False):
            for index, (p, name) in enumerate(zip(points, labels(points), strict=True)):
                _curve(ax, p, axis, COLOURS[index % len(COLOURS)], name)
            if axis != "steps":
                ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
            ax.set_xlabel(AXES[axis])
            gridded(ax, "y")
        for ax in panels[len(axes) :]:
            ax.set_axis_off()
        low, high = extent([p.run for p in points])
        margin = 0.05 * (high - low) or 0.05
        panels[0].set_ylim(low - margin, high + margin)
        for row_of_axes in grid:
            row_of_axes[0].set_ylabel(common_axis([p.run for p in points]).replace("mean absolute error", "error"))
        handles, texts = panels[0].get_legend_handles_labels()
        named = dict(zip(texts, handles, strict=True))
        columns = 3 if max(map(len, named)) < 34 else 2
        fig.legend(list(named.values()), list(named), loc="outside upper left", ncols=columns, fontsize=7.5)
        fig.supxlabel("thin lines: every logged step; held out: the same clips each time", fontsize=8)
    return fig


def _curve(ax: Axes, p: Point, axis: str, colour: str, name: str) -> None:
    """Training (thin, smoothed), held out (markers), restarts (dotted)."""
    factor, dashes = p.per_step(axis), "-" if p.finished else "--"
    steps, values = p.run.series("train/loss")
    if len(steps):
        width = max(1, len(steps) // 20, min(5, len(steps) // 5))
        ax.plot(steps * factor, values, color=colour, lw=0.6, alpha=0.25, gid=f"{p.name} points")
        label = f"{name}: training" + (f" (mean of {width})" if width > 1 else "")
        ax.plot(steps * factor, smooth(values, width), color=colour, lw=1.0, ls=dashes, label=label, gid=p.name)
    steps, values = p.run.series(p.run.val_key)
    if len(steps):
        every = max(1, len(steps) // 15)
        style: dict[str, Any] = {"color": colour, "lw": 1.7, "ls": dashes, "marker": "o", "ms": 3.5, "markevery": every}
        ax.plot(steps * factor, values, label=f"{name}: held out", gid=f"{p.name} val", **style)
    for index, step in enumerate(p.restarts):
        once = f"{name}: restart" if index == 0 else None
        ax.axvline(step * factor, color=colour, lw=0.9, ls=":", label=once, gid=f"{p.name} restart")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report pretraining`."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="run directories, or folders of some")
    parser.add_argument("--x", nargs="+", choices=list(AXES), default=list(AXES), help="axes to draw (all)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="folder for the figure and CSV (.)")


def run(args: argparse.Namespace) -> int:
    """Read, draw, print."""
    points = [point(path) for path in find_runs(args.runs)]
    draw(points, list(dict.fromkeys(args.x)), args.out / "pretraining.png")
    found = [row(p) for p in points]
    write_csv(args.out / "pretraining.csv", found, ".6g")
    width = max(len(p.name) for p in points)
    for entry in found:
        val = entry["val_l1"]
        print(
            f"{entry['run']:<{width}}  {entry['parameters'] or '-':>12}  {entry['steps']:>7} steps  "
            f"{entry['tokens']:.3g} tokens  {entry['flops']:.3g} FLOP  held out "
            f"{f'{val:.4f}' if isinstance(val, float) else val or '-'}  {entry['restarts']} restarts"
        )
    say(notes(points))
    say([f"wrote {args.out / name}" for name in ("pretraining.png", "pretraining.csv")])
    return 0

"""A model of step time over nodes, fitted to measured rates, and the figure of strong scaling (figure 3).

The device time that a clip costs on n nodes (n / rate) is written as four parts, none of them negative:

    n / rate(n) = c (1 + h [n > 1] + k log2 n + s n^q) + data

c: compute on one node. h: what leaving the node costs once (exposed volume of a ring, which hardly depends on n). k:
latency of collectives, by doublings. s n^q: contention and stragglers. data: waiting for input, where it was measured.
Few points cannot tell q, so it is not fitted: the model is fitted for each q of a fixed list and their geometric mean
is the prediction; the interval spans all of them and their bootstrap. In strong scaling (fixed batch) a step takes
batch / rate(n); in weak scaling (fixed batch a node) n / rate(n) is the step time itself, up to a factor.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter, ScalarFormatter

from swift.report.output import say
from swift.report.scaling_model import Measured, StepModel, findings, fit_model, read_runs, read_table, table
from swift.report.style import COLOURS, figure, gridded, plain_log
from swift.utils.errors import UserError

PART_COLOURS = ("#9CC3DE", "#56B4E9", "#0072B2", "#D55E00", "#E69F00")


def draw(
    series: Sequence[Measured], models: Sequence[StepModel], predict: Sequence[int], out: str | Path | None
) -> Figure:
    """Draw measured and modelled scaling of one or more series.

    Args:
        series: Measured points.
        models: The model fitted to (part of) each.
        predict: Further node counts to extend the lines to.
        out: PNG to write; None: only return the figure.
    """
    with figure(3.1 + 2.5, out) as fig:
        top, bottom = np.asarray(fig.subfigures(2, 1, height_ratios=(3.1, 2.5)))
        rate, efficiency = top.subplots(1, 2)
        for index, (points, model) in enumerate(zip(series, models, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            _rate(rate, points, model, predict, colour)
            _efficiency(efficiency, points, model, predict, colour)
        counts = sorted({*(int(n) for s in series for n in s.nodes), *predict})
        for ax in (rate, efficiency):
            _nodes_axis(ax, counts, series[0].name)
        rate.set_ylabel("clips/s in all")
        plain_log(rate, "y")
        efficiency.set_ylabel("efficiency against the smallest count")
        efficiency.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        efficiency.axhline(1.0, color="#808080", lw=0.9, ls="--", gid="ideal")
        # Bands are held too, unless they say nothing any more.
        efficiency.set_ylim(0, float(np.clip(1.05 * efficiency.dataLim.y1, 1.08, 2.0)))
        labels = {"measured, fitted": {"marker": "o"}, "measured, predicted": {"marker": "o", "mfc": "white"}}
        if all(len(model.fitted.nodes) == len(points.nodes) for points, model in zip(series, models, strict=True)):
            del labels["measured, predicted"]
        styles: dict[str, dict[str, Any]] = {**labels, "ideal": {"ls": "--", "lw": 0.9}}
        for style in styles.values():
            rate.plot([], [], color="#606060", **{"ls": "", "ms": 5, **style})
        named = [f"{points.name}: model, 95 % band" for points in series]
        lines = [next(line for line in rate.lines if line.get_gid() == f"model {points.name}") for points in series]
        rate.legend([*lines, *rate.lines[-len(styles) :]], [*named, *styles], fontsize=7, loc="upper left")
        axes = np.atleast_1d(bottom.subplots(1, len(series)))
        for ax, points, model in zip(axes, series, models, strict=True):
            _shares(ax, points, model, predict)
        axes[0].set_ylabel(("rank" if series[0].name.startswith("ranks") else "node") + "-seconds a clip")
        handles, labels = axes[0].get_legend_handles_labels()
        bottom.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7.5)
    return fig


def _nodes_axis(ax: Axes, counts: Sequence[int], name: str) -> None:
    ax.xaxis.set_major_locator(FixedLocator(list(counts)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    if len(counts) > 6:
        ax.tick_params("x", rotation=45)
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(name if name.startswith("ranks") else "nodes")
    gridded(ax)


def _span(points: Measured, predict: Sequence[int]) -> np.ndarray:
    # Whole counts: between one node and two there is nothing.
    last = max([points.nodes[-1], *predict])
    return np.unique(np.round(np.geomspace(points.nodes[0], last, 200)))


def _rate(ax: Axes, points: Measured, model: StepModel, predict: Sequence[int], colour: str) -> None:
    wide = _span(points, predict)
    ideal = points.rate[0] * wide / points.nodes[0]
    ax.loglog(wide, ideal, color=colour, lw=0.8, ls="--", alpha=0.7, gid=f"ideal {points.name}")
    ax.loglog(wide, model.rate(wide), color=colour, lw=1.2, gid=f"model {points.name}")
    ax.fill_between(wide, *model.interval(wide), color=colour, alpha=0.15, lw=0)
    _points(ax, points, model, points.rate, colour)


def _points(ax: Axes, points: Measured, model: StepModel, values: np.ndarray, colour: str) -> None:
    used = np.isin(points.nodes, model.fitted.nodes)
    ax.plot(points.nodes[used], values[used], "o", color=colour, ms=4.5)
    if not used.all():
        ax.plot(points.nodes[~used], values[~used], "o", color=colour, mfc="white", ms=5)


def _efficiency(ax: Axes, points: Measured, model: StepModel, predict: Sequence[int], colour: str) -> None:
    wide = _span(points, predict)
    base = points.rate[0] / points.nodes[0]
    ax.semilogx(wide, model.rate(wide) / wide / base, color=colour, lw=1.2)
    low, high = model.interval(wide)
    ax.fill_between(wide, low / wide / base, high / wide / base, color=colour, alpha=0.15, lw=0)
    _points(ax, points, model, points.efficiency, colour)


def _shares(ax: Axes, points: Measured, model: StepModel, predict: Sequence[int]) -> None:
    """Stacked parts of the model at every count; the measured total as a line."""
    counts = np.array(sorted({*points.nodes.tolist(), *predict}))
    bottom = np.zeros(len(counts))
    for (name, values), colour in zip(model.shares(counts).items(), PART_COLOURS, strict=False):
        ax.bar(range(len(counts)), values, 0.7, bottom=bottom, color=colour, label=name)
        bottom += values
    places = np.searchsorted(counts, points.nodes)
    ax.plot(places, points.nodes / points.rate, "k_", ms=11, mew=1.5, label="measured")
    ax.set_xticks(range(len(counts)), [f"{count:g}" for count in counts])
    ax.set_title(points.name, loc="left")
    ax.set_xlabel(points.name if points.name.startswith("ranks") else "nodes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report scaling_model`."""
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", type=Path, help="runs of a sweep over nodes or ranks")
    parser.add_argument(
        "--table", type=Path, metavar="CSV", help="columns nodes, clips_per_second[, machine, data_wait]"
    )
    parser.add_argument(
        "--fit-up-to",
        nargs="+",
        default=[],
        metavar="[SERIES=]N",
        help="fit only points of at most N nodes (of one series: Aurora=64), predict the others",
    )
    parser.add_argument("--predict", type=int, nargs="+", default=[], metavar="N", help="further node counts")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="folder for the figure and JSON (.)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def limits(texts: Sequence[str]) -> dict[str, float]:
    """Series -> largest node count to fit; "" for every series."""
    found = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not number.isdigit() or int(number) < 1:
            raise UserError(f"--fit-up-to {text}: must be N or SERIES=N, N at least 1")
        found[name] = float(number)
    return found


def run(args: argparse.Namespace) -> int:
    """Fit, draw, print."""
    series = ([read_runs(args.runs)] if args.runs else []) + (read_table(args.table) if args.table else [])
    if not series:
        raise UserError("give run directories or --table CSV")
    upto = limits(args.fit_up_to)
    unknown = [name for name in upto if name and name not in {s.name for s in series}]
    if unknown:
        raise UserError(f"--fit-up-to {unknown[0]}=...: no such series; there are {', '.join(s.name for s in series)}")
    models = []
    for points in series:
        points.check()
        limit = upto.get(points.name, upto.get("", math.inf))
        models.append(fit_model(points.part(points.nodes <= limit)))
    found = [findings(points, model, args.predict) for points, model in zip(series, models, strict=True)]
    draw(series, models, args.predict, args.out / "scaling_model.png")
    (args.out / "scaling_model.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2) if args.json else "\n\n".join(table(entry) for entry in found))
    say([f"wrote {args.out / name}" for name in ("scaling_model.png", "scaling_model.json")])
    return 0

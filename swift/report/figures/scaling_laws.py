"""Neural scaling laws from finished runs (figure 4A): loss against size, data and compute.

Fits L = E + A/N^a + B/D^b and the single power laws L = (c/x)^a by a robust method with bootstrap intervals, predicts
the loss of larger runs and the best size for a budget of FLOPs. N: parameters of the model in pre-training, D: patch
tokens seen (repeats counted), L: held-out L1 of the finished run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from swift.report.laws import JointLaw
from swift.report.output import say, write_csv
from swift.report.points import finished_points
from swift.report.scaling_laws import Fitted, Ladder, as_json, fit_all, ladder, table
from swift.report.style import VERMILION, figure, gridded, plain_log
from swift.utils.errors import UserError

Array = np.ndarray


def short(value: float) -> str:
    """1.2M, 34k, 5.6e+15."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit <= value < limit * 1000:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def draw(runs: Ladder, fitted: Fitted, predict: Sequence[tuple[float, float]], out: str | Path | None) -> Figure:
    """Draw the laws.

    Args:
        runs: The points.
        fitted: Of `scaling_laws.fit_all`.
        predict: (N, D) of runs that were not made, drawn as stars with their intervals.
        out: PNG to write; None: only return the figure.
    """
    with figure(3.8, out) as fig:
        axes = fig.subplots(1, 3, sharey=True)
        _against(axes[0], runs, fitted, runs.n, runs.d, swap=False)
        _against(axes[1], runs, fitted, runs.d, runs.n, swap=True)
        _compute(axes[2], runs, fitted)
        if fitted.joint is not None:
            for n, d in predict:
                loss, (low, high) = fitted.joint.predict(n, d)
                bar = [[max(loss - low, 0)], [max(high - loss, 0)]]
                for ax, x in ((axes[0], n), (axes[1], d), (axes[2], fitted.cost[0] * n ** fitted.cost[1] * d)):
                    ax.errorbar(x, loss, bar, color=VERMILION, marker="*", ms=9, capsize=3, lw=1, gid="predicted")
            fig.suptitle(_title(fitted.joint, len(runs.names), bool(predict)), x=0.01, ha="left", fontsize=8.5)
        axes[0].set_ylabel(f"held-out L1 of finished runs\n({runs.unit})")
        axes[0].set_ylim(*_range(axes))
        for ax in axes:
            plain_log(ax, "y")
            plain_log(ax, "x", short)
            gridded(ax)
    return fig


def _title(law: JointLaw, runs: int, predicted: bool) -> str:
    """The fitted exponents with their intervals, and how the figure is to be read."""
    intervals, unknown = law.intervals(), law.undetermined()
    values = law.quantities(law.fit.theta)
    parts = []
    for name in "ab":
        low, high = intervals[name]
        parts.append(
            f"{name} {'not determined' if name in unknown else f'= {float(values[name]):.2f}'} [{low:.2f}, {high:.2f}]"
        )
    star = "; star: predicted" if predicted else ""
    return f"L = E + A/N$^a$ + B/D$^b$: {', '.join(parts)}\n{runs} runs; brackets, bands, bars: 95 % bootstrap{star}"


def _range(axes: Sequence[Axes]) -> tuple[float, float]:
    """Limits that hold every run, every prediction with its bar, and the fitted curves between the runs."""
    heights = [np.asarray(line.get_ydata(), dtype=np.float64) for ax in axes for line in ax.lines]
    heights += [
        ends[:, 1]
        for ax in axes
        for bars in ax.collections
        if isinstance(bars, LineCollection)
        for ends in bars.get_segments()
    ]
    low, high = (float(end(np.concatenate(heights))) for end in (np.min, np.max))
    room = (high / low) ** 0.06
    return low / room, high * room


def _between(values: Array) -> Array:
    """Where laws are drawn: among the runs, not beyond, where only the marked predictions speak."""
    return np.geomspace(values.min(), values.max(), 60)


def _against(ax: Axes, runs: Ladder, fitted: Fitted, x: Array, other: Array, swap: bool) -> None:
    """Loss against N, a colour for every D (or the other way round), with the joint law through each."""
    levels = np.unique(other)
    colours = colormaps["viridis"](np.linspace(0.0, 0.85, len(levels)))
    letter = "N" if swap else "D"
    for value, colour in zip(levels, colours, strict=True):
        own = other == value
        label = f"{letter} = {short(value)}" if len(levels) <= 8 or value in (levels[0], levels[-1]) else None
        ax.loglog(x[own], runs.loss[own], "o", color=colour, ms=4, label=label, gid=f"{letter} {value:g}")
        if fitted.joint is not None:
            wide = _between(x)
            n, d = (np.full_like(wide, value), wide) if swap else (wide, np.full_like(wide, value))
            ax.loglog(wide, fitted.joint.loss(n, d), color=colour, lw=1.2)
            many = fitted.joint.loss(n, d, fitted.joint.fit.draws[:, None, :])
            ax.fill_between(wide, *np.quantile(many, [0.025, 0.975], axis=0), color=colour, alpha=0.15, lw=0)
    ax.set_xlabel("patch tokens seen, D" if swap else "parameters, N")
    _legend(ax, columns=2)


def _compute(ax: Axes, runs: Ladder, fitted: Fitted) -> None:
    """Loss against compute: all runs, the best ones, the single power law, and the best that the joint law allows."""
    sizes = np.unique(runs.n)
    for size, colour in zip(sizes, colormaps["viridis"](np.linspace(0.0, 0.85, len(sizes))), strict=True):
        own = runs.n == size
        order = np.argsort(runs.c[own])
        ax.loglog(runs.c[own][order], runs.loss[own][order], "o-", color=colour, ms=3.5, lw=0.6)
    wide = _between(runs.c)
    if "C" in fitted.single:
        law = fitted.single["C"]
        own_range = _between(runs.c[runs.chosen("C")])
        text = f"(c/C)$^a$, a = {law.exponent:.3f}"
        ax.loglog(own_range, law.loss(own_range), color="black", lw=1.2, label=text, gid="L(C)")
        many = law.loss(own_range, law.fit.draws[:, None, :])
        ax.fill_between(own_range, *np.quantile(many, [0.025, 0.975], axis=0), color="black", alpha=0.12, lw=0)
    if fitted.joint is not None:
        best = np.array([fitted.joint.optimal(c, fitted.cost) for c in wide])
        # A best size far from all that were run is an extrapolation that no reader should take for a measurement.
        near = (best[:, 0] >= runs.n.min()) & (best[:, 0] <= runs.n.max())
        if near.any():
            least = fitted.joint.loss(best[near, 0], best[near, 1])
            ax.loglog(wide[near], least, color="black", lw=1, ls="--", label="best N of those run", gid="best")
    ax.set_xlabel("training compute, C (FLOP)")
    _legend(ax, columns=1)


def _legend(ax: Axes, columns: int) -> None:
    """Above the panel: wherever the runs lie, they are not covered."""
    style = {"handletextpad": 0.3, "columnspacing": 0.8, "borderaxespad": 0.2}
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, fontsize=6.5, **style)


def _pair(text: str) -> tuple[float, float]:
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: wants N,D such as 3e9,1e11")
    return _amount(parts[0]), _amount(parts[1])


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report scaling_laws`."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="run directories, or folders of some")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="folder for the figure, JSON and CSV (.)"
    )
    parser.add_argument("--predict", type=_pair, nargs="+", default=[], metavar="N,D", help="loss of runs not made")
    parser.add_argument(
        "--compute", type=_amount, nargs="+", default=[], metavar="C", help="best size for so many FLOPs"
    )
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws (1000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Fit, draw, print."""
    points, left_out = finished_points(args.runs)
    say(left_out)
    if args.draws < 100:
        raise UserError(f"--draws {args.draws}: intervals need at least 100")
    runs = ladder(points)
    fitted = fit_all(runs, args.draws, args.seed)
    found = as_json(runs, fitted, args.predict, args.compute)
    draw(runs, fitted, args.predict, args.out / "scaling_laws.png")
    (args.out / "scaling_laws.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    columns = zip(runs.names, runs.n, runs.d, runs.c, runs.loss, strict=True)
    points_csv = [
        {"run": name, "parameters": f"{n:.0f}", "tokens": f"{d:.0f}", "flops": f"{c:.6g}", "loss": f"{loss:.6f}"}
        for name, n, d, c, loss in columns
    ]
    write_csv(args.out / "points.csv", points_csv)
    print(json.dumps(found, indent=2) if args.json else table(found))
    say([f"wrote {args.out / name}" for name in ("scaling_laws.png", "scaling_laws.json", "points.csv")])
    return 0

"""The loss curve of one or more runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from swift.report.runs import LOSSES, Run, load_run
from swift.report.style import BLUE, COLOURS, figure, gridded
from swift.utils.errors import UserError


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving mean over `width` points (fewer at the ends), leaving out points that are not finite."""
    good = np.isfinite(values)
    ones = np.ones(width)
    # mode="same" keeps the length of the longer argument, so the window must not be longer than the curve
    total = np.convolve(np.where(good, values, 0.0), ones, mode="same")
    count = np.convolve(good.astype(float), ones, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def common_axis(runs: Sequence[Run]) -> str:
    """What the axis of several runs' losses says."""
    axes = list(dict.fromkeys(run.axis for run in runs))
    if len(axes) == 1:
        return axes[0]
    if any(run.target for run in runs):
        return "loss of each run's own task: not comparable"
    return "mean absolute error at masked voxels\n(normalized units of each run)"


def extent(runs: Sequence[Run], also: Sequence[float] = ()) -> tuple[float, float]:
    """Lowest and highest value that a plot of these curves (and of the values `also`) must show; no spike counts."""
    shown = list(also)
    for run in runs:
        for key in ("train/loss", run.val_key):
            values = run.series(key)[1]
            values = values[np.isfinite(values)]
            if len(values):
                shown += [values.min(), values[: max(1, len(values) // 50)].max(), np.percentile(values, 99)]
    return min(shown, default=0.0), max(shown, default=0.0)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved as little as needed, in their order, so that neighbours are at least `gap` apart."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    groups: list[list[float]] = []  # [sum of wanted first positions, members]: the pool-adjacent-violators rule
    for rank, index in enumerate(order):
        groups.append([positions[index] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    starts = [total / members for total, members in groups for _ in range(int(members))]
    placed = [0.0] * len(positions)
    for rank, index in enumerate(order):
        placed[index] = starts[rank] + rank * gap
    return placed


def loss_curve(run_dirs: Sequence[str | Path], out: str | Path | None) -> Figure:
    """Training and validation error over optimizer steps, with the baselines as horizontal lines.

    Read from metrics.jsonl (train/loss, val/l1) and, if the run has ended, the baselines in summary.json. With several
    runs each has a colour; baselines are drawn where all runs have the same ones.

    Args:
        run_dirs: Run directories.
        out: PNG to write; None: only return the figure.

    Raises:
        UserError: A run directory is missing or damaged, or holds no loss; `out` cannot be written.
    """
    runs = [load_run(path) for path in run_dirs]
    if not runs:
        raise UserError("no run directory given; give at least one")
    for run in runs:
        if not len(run.series("train/loss")[0]) and not len(run.series(run.val_key)[0]):
            raise UserError(f"{run.path}/metrics.jsonl: neither train/loss nor val/l1 in it")
    with figure(3.9, out) as fig:
        ax = fig.subplots()
        one = f": {runs[0].summary.get('model') or runs[0].name}" if len(runs) == 1 else ""
        fig.suptitle(f"{runs[0].target or 'Masked pre-training'}{one}", x=0.01, ha="left", fontsize=9.5)
        for index, run in enumerate(runs):
            _draw_run(ax, run, index, alone=len(runs) == 1)
        baselines = runs[0].baselines
        if any(run.baselines != baselines for run in runs):
            baselines = {}
        _frame(ax, runs, baselines)
        _draw_baselines(ax, baselines)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return fig


def _draw_run(ax: Axes, run: Run, index: int, alone: bool) -> None:
    train_colour = "#7A7A7A" if alone else COLOURS[index % len(COLOURS)]
    val_colour = BLUE if alone else train_colour
    label = "" if alone else f"{run.name}, "
    steps, values = run.series("train/loss")
    if len(steps):
        width = max(1, len(steps) // 20)
        ax.plot(steps, values, color=train_colour, lw=0.8, alpha=0.3 if width > 1 else 0.9, gid="train points")
        loss = "" if run.loss == "l1" else f" ({LOSSES.get(run.loss, run.loss)} loss)"
        if width > 1:
            mean = f", mean of {width} points" if alone else ""
            ax.plot(
                steps,
                smooth(values, width),
                color=train_colour,
                lw=1.3,
                gid="train",
                label=f"{label}training{loss}{mean}",
            )
        else:
            ax.lines[-1].set(label=f"{label}training{loss}", gid="train")
    steps, values = run.series(run.val_key)
    if len(steps):
        every = max(1, len(steps) // 25)
        ax.plot(
            steps,
            values,
            color=val_colour,
            lw=1.6,
            marker="o",
            ms=3.5,
            markevery=every,
            gid="val",
            label=f"{label}{'validation' if run.target else 'held-out clips'}",
        )


def _frame(ax: Axes, runs: Sequence[Run], baselines: dict[str, float]) -> None:
    """Axes: limits that hold every curve but no single spike, and labels with units."""
    low, high = extent(runs, list(baselines.values()))
    margin = 0.06 * (high - low) or 0.05
    ax.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
    last = max(
        steps.max() for run in runs for steps in (run.series(k)[0] for k in ("train/loss", run.val_key)) if len(steps)
    )
    ax.set_xlim(0, 1.012 * max(int(last), 1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(common_axis(runs))
    gridded(ax, "y")


def _draw_baselines(ax: Axes, baselines: dict[str, float]) -> None:
    """Dashed lines, each named at the right edge; names that would overlap are moved apart and tied to their line."""
    if not baselines:
        return
    names = list(baselines)
    low, high = ax.get_ylim()
    places = spread([baselines[name] for name in names], gap=0.062 * (high - low))
    # a pile of names must stay inside the axes
    shift = max(0.0, low + 0.03 * (high - low) - min(places)) - max(0.0, max(places) - high)
    for name, place in zip(names, places, strict=True):
        value = baselines[name]
        ax.axhline(value, color="#404040", lw=0.9, ls=(0, (5, 3)), gid=f"baseline {name}")
        ax.annotate(
            f"{name} {value:.3f}",
            xy=(1, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.035, place + shift),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color="#202020",
            arrowprops={"arrowstyle": "-", "color": "#808080", "lw": 0.6, "shrinkA": 1, "shrinkB": 0},
        )

"""Valleys of held-out loss against learning rate: where they are lowest, how sure that is, and what follows.

A valley is a parabola in log2 of the rate, fitted to the mean over seeds at its lowest rate and two on each side.
Seeds are drawn anew for the intervals, the same ones for all curves: their data are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swift.report.style import COLOURS, figure, gridded

WIDTHS = (16, 48, 144)
AROUND = 2
"""Rates on each side of the lowest that the parabola is fitted to."""
FEWEST = 3
"""Rates of a seed that make a curve."""
DRAWS = 2000
LEVEL = 95


class Curve(NamedTuple):
    """Losses of one way to train, at some widths.

    Attributes:
        name: In the table.
        mode: mup | standard.
        base: Base width of muP.
        title: For the figure.
        first: Lowest exponent of 2 tried at first, by width.
    """

    name: str
    mode: str
    base: int
    title: str
    first: dict[int, int]


CURVES = (
    Curve("mup", "mup", 96, "with muP", {16: -10, 48: -10, 144: -10}),
    Curve("standard", "standard", 96, "without muP", {16: -8, 48: -9, 144: -10}),
    Curve("mup16", "mup", 16, "with muP, base width 16", {144: -8}),
)
"""Base width 96 is that of `optimizer=adamw_mup`; 16 shows, at the widest, what a base at the narrowest costs."""


class Valley(NamedTuple):
    """The lowest point of a fitted curve: log2 of its rate, and its loss."""

    rate: float
    loss: float


def lowest(means: np.ndarray) -> int:
    """Index of the lowest loss; a rate at which a seed diverged (nan) is none."""
    return int(np.nanargmin(means))


def valley(exponents: np.ndarray, means: np.ndarray) -> Valley:
    """Lowest point of the parabola through the lowest rate and its neighbours.

    Where the parabola does not open upwards, or its lowest point lies outside of the rates that it was fitted to, the
    lowest rate itself.

    Args:
        exponents: (R,) log2 of the rates, ascending.
        means: (R,) loss, nan where a seed diverged.
    """
    at = lowest(means)
    near = slice(max(at - AROUND, 0), at + AROUND + 1)
    x, y = exponents[near], means[near]
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) >= 3:
        bend, slope, level = np.polyfit(x - exponents[at], y, 2)
        if bend > 0 and x[0] <= (rate := exponents[at] - slope / (2 * bend)) <= x[-1]:
            return Valley(float(rate), float(level - slope**2 / (4 * bend)))
    return Valley(float(exponents[at]), float(means[at]))


Losses = dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]
"""(curve, width) -> log2 of the rates (R,), and the loss of every seed at each (S, R)."""


def losses(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], Losses]:
    """The seeds that are compared, and their losses at the rates that all of them have.

    A curve that has too few rates yet for a valley at some seed is left out; so is a seed that lacks one of muP's.
    """
    by = {(r["curve"], r["width"], r["seed"], r["log2_lr"]): r[key] for r in rows}

    def rates(cell: tuple[str, int], seed: int) -> set[int]:
        return {e for c, w, s, e in by if (c, w, s) == (*cell, seed)}

    first = [(CURVES[0].name, width) for width in WIDTHS]
    seeds = [s for s in sorted({s for *_, s, _ in by}) if all(len(rates(cell, s)) >= FEWEST for cell in first)]
    if not seeds:
        raise SystemExit("no seed has all runs of muP yet")
    made: Losses = {}
    for cell in ((curve.name, width) for curve in CURVES for width in curve.first):
        common = sorted(set.intersection(*(rates(cell, seed) for seed in seeds)))
        if len(common) >= FEWEST:
            made[cell] = np.array(common), np.array([[by[(*cell, s, e)] for e in common] for s in seeds])
    return seeds, made


def resamples(seeds: int) -> np.ndarray:
    """(draws, seeds) indices: all draws with replacement where they are few, else DRAWS of them."""
    if seeds**seeds <= DRAWS:
        return np.array(list(itertools.product(range(seeds), repeat=seeds)))
    return np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))


def interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """The middle LEVEL per cent."""
    outside = (100 - LEVEL) / 2
    return [float(value) for value in np.percentile(values, [outside, 100 - outside])]


def at_rate(exponents: np.ndarray, means: np.ndarray, rate: float) -> float:
    """Loss at a rate between those that were run, by linear interpolation; at the nearest end beyond them."""
    return float(np.interp(rate, exponents, means))


def summary(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """Valleys with their intervals, how far they move over the widths, and the verdicts.

    Args:
        rows: Of the sweep.
        key: val_l1 or train_l1.
    """
    seeds, table = losses(rows, key)
    drawn = resamples(len(seeds))

    def valleys(picked: np.ndarray) -> dict[tuple[str, int], Valley]:
        return {cell: valley(x, y[picked].mean(0)) for cell, (x, y) in table.items()}

    whole, many = valleys(np.arange(len(seeds))), [valleys(picked) for picked in drawn]

    def spread(value: Callable[[dict[tuple[str, int], Valley]], float]) -> list[float]:
        """Of the mean over the seeds, and its interval."""
        return [value(whole), *interval([value(one) for one in many])]

    def moves(found: dict[tuple[str, int], Valley], name: str) -> float:
        rates = [found[name, width].rate for width in WIDTHS if (name, width) in table]
        return max(rates) - min(rates)

    widest = WIDTHS[-1]
    result: dict[str, Any] = {
        "judged_by": key,
        "seeds": seeds,
        "interval": f"{LEVEL} %, bootstrap over seeds",
        "cpu_minutes": round(sum(r["seconds"] for r in rows) / 60, 2),
    }
    for curve in CURVES:
        cells = [(curve.name, width) for width in curve.first if (curve.name, width) in table]
        told: dict[str, Any] = {
            "base_width": curve.base if curve.mode == "mup" else None,
            "best_log2_lr": {cell[1]: spread(lambda found, cell=cell: found[cell].rate) for cell in cells},
            "best_loss": {cell[1]: spread(lambda found, cell=cell: found[cell].loss) for cell in cells},
        }
        if {WIDTHS[0], widest} <= {width for _, width in cells}:
            told["moves_by_steps_of_2"] = spread(lambda found, name=curve.name: moves(found, name))
            x, y = table[curve.name, widest]
            rate = whole[curve.name, WIDTHS[0]].rate
            told["loss_of_widest_at_rate_of_narrowest"] = at_rate(x, y.mean(0), rate)
        result[curve.name] = told
    result["best_loss_of_widest_above_adamw"] = {
        name: spread(lambda found, name=name: found[name, widest].loss - found["standard", widest].loss)
        for name in ("mup", "mup16")
        if {(name, widest), ("standard", widest)} <= table.keys()
    }
    result["checks"] = checks(result)
    result["passed"] = all(result["checks"].values())
    return result


def checks(result: dict[str, Any]) -> dict[str, bool]:
    """The verdicts; what was not run has failed."""
    standard, above = result["standard"].get("moves_by_steps_of_2"), result["best_loss_of_widest_above_adamw"]
    return {
        "at least three seeds": len(result["seeds"]) >= 3,
        "with muP the best rate moves by less than one step of 2, interval included": (
            result["mup"]["moves_by_steps_of_2"][2] < 1
        ),
        "without muP it moves by more than one step, interval included": standard is not None and standard[1] > 1,
        f"muP's best loss at width {WIDTHS[-1]} is not above AdamW's by more than the interval": (
            "mup" in above and above["mup"][1] <= 0
        ),
    }


def text(result: dict[str, Any]) -> str:
    """A summary for a terminal."""
    lines = [f"{len(result['seeds'])} seeds; {result['interval']}"]
    for curve in CURVES:
        told = result[curve.name]
        for width, (rate, low, high) in told["best_log2_lr"].items():
            loss = told["best_loss"][width]
            lines.append(
                f"{curve.title:24} width {width:3}: best rate 2^{rate:.2f} [{low:.2f}, {high:.2f}], "
                f"loss {loss[0]:.4f} [{loss[1]:.4f}, {loss[2]:.4f}]"
            )
        if "moves_by_steps_of_2" in told:
            moved, low, high = told["moves_by_steps_of_2"]
            lines.append(f"{curve.title:24} moves by {moved:.2f} [{low:.2f}, {high:.2f}] steps of 2")
    for name, (more, low, high) in result["best_loss_of_widest_above_adamw"].items():
        lines.append(f"{name}: best loss at width {WIDTHS[-1]} above AdamW's by {more:+.4f} [{low:+.4f}, {high:+.4f}]")
    lines += [f"{'passed' if passed else 'FAILED'}: {name}" for name, passed in result["checks"].items()]
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], result: dict[str, Any], out: Path) -> None:
    """Loss against rate, a colour a width: every seed thin, their mean bold, the valley with its interval."""
    seeds, table = losses(rows, result["judged_by"])
    means = {cell: y.mean(0) for cell, (_, y) in table.items()}
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in means.values()])
    best = min(np.nanmin(y) for _, y in table.values())
    with figure(3.6, out) as fig:
        axes = fig.subplots(1, 2, sharey=True)
        for ax, curve in zip(axes, CURVES, strict=False):
            for colour, width in zip(COLOURS, WIDTHS, strict=False):
                if (curve.name, width) not in table:
                    continue
                x, y = table[curve.name, width]
                ax.plot(x, y.T, color=colour, lw=0.6, alpha=0.45)
                ax.plot(x, means[curve.name, width], color=colour, marker="o", ms=3, lw=1.5, label=f"width {width}")
                told = result[curve.name]
                (rate, low, high), (loss, *_) = told["best_log2_lr"][width], told["best_loss"][width]
                ax.errorbar(
                    rate, loss, xerr=[[max(rate - low, 0)], [max(high - rate, 0)]], color=colour, capsize=3, lw=1.6
                )
                ax.plot(rate, loss, color=colour, marker="*", ms=11, mec="white", zorder=5)
            title = curve.title
            if "moves_by_steps_of_2" in result[curve.name]:
                moved, low, high = result[curve.name]["moves_by_steps_of_2"]
                title += f": best moves by {moved:.1f} [{low:.1f}, {high:.1f}]"
            ax.set_title(title, loc="left")
            base = f" (at width {curve.base})" if curve.mode == "mup" else ""
            ax.set_xlabel(f"peak learning rate, log2{base}")
            gridded(ax)
        axes[0].set_ylabel("held-out L1 at hidden voxels\n(SD of each voxel)")
        axes[0].set_ylim(best - 0.004, np.percentile(finite, 80) + 0.004)
        axes[0].legend()
        failed = sum(not ok for ok in result["checks"].values())
        verdict = "All checks passed." if not failed else f"{failed} of {len(result['checks'])} CHECKS FAILED."
        fig.supxlabel(
            f"thin: {len(seeds)} seeds, bold: their mean; stars: lowest point of a parabola, bars: 95 % over seeds.\n"
            + verdict,
            fontsize=8,
        )

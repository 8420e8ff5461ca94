"""The coordinate check of muP as a command, and its figure: size of activations against width, a line a step."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from swift.config.check import CHOICES
from swift.report.style import figure, gridded
from swift.train import coord_check
from swift.train.coord_check import Plan
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

TITLES = {"mup": "with muP", "standard": "without muP (AdamW, same rate at the base width)"}
COLOURS = "viridis"


def shown(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is drawn: label of a row -> the places it averages (geometric mean)."""
    names = list(report["slopes"]["mup"])
    scores = [name for name in names if name.endswith(" scores")]
    blocks = [name for name in names if " block " in name and name not in scores]
    last_stage = blocks[-1].partition(" block ")[0]
    return {
        f"output of the blocks\nof {last_stage}": [name for name in blocks if name.startswith(last_stage)],
        "readout": ["readout"],
        "attention scores\nof all blocks": scores,
    }


def draw(report: Mapping[str, Any], out: str | Path | None) -> Figure:
    """Draw a check.

    Args:
        report: what `coord_check.report` gives (or --json prints).
        out: PNG to write; None: only return the figure.

    Raises:
        UserError: the file cannot be written.
    """
    rows, widths = shown(report), np.array(report["plan"]["widths"])
    steps = report["plan"]["steps"]
    colours = ScalarMappable(Normalize(0, steps), COLOURS)
    with figure(7.2, out) as fig:
        axes = fig.subplots(len(rows), 2, sharex=True, sharey="row")
        fig.suptitle(
            f"Coordinate check: {report['plan']['variant']} attention, depths {list(report['plan']['depths'])}, "
            f"rate {report['plan']['lr']:g}, widths over a factor of {widths.max() / widths.min():g}",
            x=0.01,
            ha="left",
            fontsize=9.5,
        )
        for row, (label, names) in zip(axes, rows.items(), strict=True):
            for ax, mode in zip(row, TITLES, strict=True):
                logs = np.mean([np.log(report["sizes"][mode][name]) for name in names], axis=0)
                _panel(ax, widths, np.exp(logs), colours)
                last = np.mean([report["slopes"][mode][name][-1] for name in names])
                ax.set_title(f"slope after {steps} steps {last:+.2f}", loc="right", pad=3)
            row[0].set_ylabel(label)
        for ax, title in zip(axes[0], TITLES.values(), strict=True):
            ax.annotate(title, (0, 1.16), xycoords="axes fraction", fontweight="bold")
        for ax in axes[-1]:
            ax.set_xlabel("width of stage 1 (embed_dim)")
        fig.supylabel("root mean square", fontsize=8.5)
        fig.colorbar(colours, ax=axes, label="optimizer steps done", shrink=0.5, aspect=30, pad=0.01)
    return fig


def _panel(ax: Axes, widths: np.ndarray, sizes: np.ndarray, colours: ScalarMappable) -> None:
    """One line a step; `sizes` is (widths, steps + 1)."""
    for step in range(sizes.shape[1]):
        ax.loglog(
            widths,
            sizes[:, step],
            color=colours.to_rgba(np.array(step)),
            lw=1.3,
            marker="o",
            ms=2.5,
            gid=f"step {step}",
        )
    ax.xaxis.set_major_locator(FixedLocator(widths.tolist()))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    gridded(ax, "y")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    plan = Plan()
    made = argparse.ArgumentParser(
        prog="python experiments/mu_transfer/coord_check.py",
        description="Coordinate check of muP: sizes of activations over widths and steps, with and without muP. "
        "Ends with status 1 if it fails.",
    )
    made.add_argument("--widths", type=int, nargs="+", default=list(plan.widths), metavar="E", help="base width first")
    made.add_argument("--steps", type=int, default=plan.steps, metavar="N")
    made.add_argument("--lr", type=float, default=plan.lr, help=f"constant rate at the base width ({plan.lr})")
    made.add_argument("--seeds", type=int, default=plan.seeds, metavar="N", help="initial weights to average over")
    made.add_argument("--variant", choices=coord_check.VARIANTS, default=plan.variant)
    made.add_argument("--decoder", choices=CHOICES["model.decoder"], default=plan.decoder)
    made.add_argument("--json", action="store_true", help="print JSON instead of the table")
    made.add_argument("--out", type=Path, metavar="FIG", help="draw the figure into this PNG")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the check; exit status 0 passed, 1 failed, 2 a mistake of the user."""
    options = parser().parse_args(arguments)
    set_up_logging()

    def work() -> None:
        widths = tuple(options.widths)
        if len(set(widths)) < 2:
            raise UserError(f"--widths {' '.join(map(str, widths))}: give at least two different ones")
        for name in ("steps", "seeds"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
        if not options.lr > 0:
            raise UserError(f"--lr {options.lr}: must be above 0")
        plan = Plan(widths, options.steps, options.lr, options.seeds, options.variant, options.decoder)
        result = coord_check.run(plan, lambda line: print(line, file=sys.stderr))
        if options.out:
            draw(coord_check.report(result), options.out)
        print(json.dumps(coord_check.report(result), indent=2) if options.json else coord_check.text(result))
        if result.failures:
            sys.exit(1)

    reported(work)


if __name__ == "__main__":
    main()

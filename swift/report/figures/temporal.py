"""Temporal fidelity: autocorrelation, slope of the power spectrum and Hurst exponent of BOLD and of every layer.

Reads RUN/temporal.json (made by `python -m swift.series RUN SCAN...`). Shapes: T time steps, K series (voxels, or
tokens x channels), L lags.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from swift.report.output import say
from swift.report.points import find_runs
from swift.report.style import figure, gridded
from swift.report.temporal import CONDITIONS, load, mean_acf, rows, table

TITLES = {"ordered": "frames in order", "shuffled": "frames shuffled (control)"}


def draw(contents: Mapping[str, dict[str, Any]], out: str | Path | None) -> Figure:
    """Draw a row a run: frames in order on the left, shuffled on the right.

    Args:
        contents: Name of a run -> its temporal.json.
        out: PNG to write; None: only return the figure.
    """
    with figure(0.6 + 1.75 * len(contents), out) as fig:
        grid = fig.subplots(len(contents), 2, sharex=True, sharey="col", squeeze=False)
        for row, (name, content) in zip(grid, contents.items(), strict=True):
            layers = list(content["scans"][0]["layers"])
            colours = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(layers) - 1, 1)))
            for ax, condition in zip(row, CONDITIONS, strict=True):
                for layer in layers:
                    seconds, mean, low, high = mean_acf(content, layer, condition)
                    colour = "black" if layer == "bold" else colours[layers.index(layer) - 1]
                    style = {"color": colour, "lw": 1.6 if layer == "bold" else 1.2}
                    ax.plot(seconds, mean, label="BOLD" if layer == "bold" else layer, gid=f"{name} {layer}", **style)
                    ax.fill_between(seconds, low, high, color=colour, alpha=0.18, lw=0)
                ax.axhline(0, color="#808080", lw=0.6)
                clip = content.get("clip_seconds")
                if clip and clip <= ax.get_xlim()[1]:
                    ax.axvline(clip, color="#808080", lw=0.7, ls=":", gid="clip")
                gridded(ax, "y")
            row[0].set_ylabel("autocorrelation")
            kind = ", ".join(str(content[key]) for key in ("variant", "position") if content.get(key))
            row[0].set_title(f"{kind or name}", loc="right", fontsize=8.5)
        for ax, condition in zip(grid[0], CONDITIONS, strict=True):
            ax.set_title(TITLES[condition], loc="left", fontweight="bold")
        for ax in grid[-1]:
            ax.set_xlabel("lag (s); dotted: length of a clip")
        handles, labels = grid[0][0].get_legend_handles_labels()
        fig.supxlabel("lines: mean over scans; bands: 95 % bootstrap over scans", fontsize=8)
        fig.legend(handles, labels, loc="outside upper right", ncols=6)
    return fig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report temporal`."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="run directories, or folders of some")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="folder for the figure and JSON (.)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Read, draw, print."""
    contents: dict[str, dict[str, Any]] = {path.resolve().name: load(path) for path in find_runs(args.runs)}
    found = {name: rows(content) for name, content in contents.items()}
    draw(contents, args.out / "temporal.png")
    (args.out / "temporal.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2) if args.json else table(found))
    say([f"wrote {args.out / name}" for name in ("temporal.png", "temporal.json")])
    return 0

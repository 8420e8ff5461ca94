"""How figures look, and how they are written: 900 pixels wide, colour-blind safe, small files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from swift.utils.errors import UserError

DPI = 120
WIDTH = 7.5  # inches: 900 pixels
STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
}
# Okabe and Ito's colours: told apart with any kind of colour vision
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
HIDDEN = "#9CC3DE"


@contextmanager
def figure(
    height: float, out: str | Path | None, width: float = WIDTH, layout: Any = "constrained"
) -> Iterator[Figure]:
    """A figure in this style. It is saved when the block ends.

    Args:
        height: Inches.
        out: PNG to write; None: write nothing.
        width: Inches.
        layout: Of matplotlib.

    Raises:
        UserError: The file cannot be written.
    """
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(width, height), dpi=DPI, layout=layout)
        yield fig
        if out is not None:
            save(fig, out)


def gridded(ax: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind what is drawn."""
    ax.grid(axis=axis, color="#E6E6E6", lw=0.6)
    ax.set_axisbelow(True)


def plain_log(ax: Axes, which: Literal["x", "y"], text: Callable[[float], str] = "{:g}".format) -> None:
    """Readable ticks of a logarithmic axis, whatever its range: round numbers if it spans less than a factor of 100.

    Call it when the limits are final: otherwise matplotlib marks powers of ten only, often one or none, or too many.

    Args:
        ax: The panel.
        which: Its axis.
        text: Of a tick.
    """
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = sorted(axis.get_view_interval())
    axis.set_minor_formatter(NullFormatter())
    if high / low >= 100:
        return
    if high / low < 2:
        ticks = [float(t) for t in MaxNLocator(5).tick_values(low, high)]
    else:
        ticks = [m * 10.0**e for e in range(-9, 16) for m in (1, 2, 3, 5, 7)]
    ticks = [t for t in ticks if low <= t <= high]
    if len(ticks) > 5 and high / low >= 2:
        ticks = [t for t in ticks if f"{t:e}"[0] in "125"]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def save(fig: Figure, out: str | Path) -> None:
    """Write a small PNG: 256 colours chosen for the picture.

    Raises:
        UserError: The file cannot be written.
    """
    buffer = io.BytesIO()
    FigureCanvasAgg(fig).print_png(buffer)
    # a median cut cannot see transparency, and the figure has none
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error

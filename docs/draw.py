"""The figures of "How it works", drawn by the code that the model uses: its masks, its token grids, its windows.

python docs/draw.py FOLDER
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from swift.config.compose import composed
from swift.models.encoder import stage_grids
from swift.models.masking import draw_mask
from swift.report.style import BLUE, GREEN, HIDDEN, ORANGE, SKY, VERMILION, figure

KINDS = (
    ("random", "random: any patch of any frame"),
    ("tube", "tube: the same places in every frame"),
    ("temporal", "temporal: the last frames"),
)


def draw_all(folder: Path) -> None:
    """Every figure, as PNG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path_of_a_clip(folder / "how_path.png")
    masks(folder / "how_masks.png")
    block(folder / "how_block.png")


def _box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=colour + "33", ec=colour, lw=1)
    ax.add_patch(style)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    shape = f"arc3,rad={bend}"
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=0.9, connectionstyle=shape))


def path_of_a_clip(out: Path) -> None:
    """From voxels to tokens, through the four stages, to what they are used for; sizes are those of model=7m."""
    cfg = composed(["model=7m", "data=store", "data.path=none", "data.grid=[96,96,96]", "data.spacing=2.0"])[0]
    volume = (*cfg.data.grid, cfg.data.frames)
    grids = stage_grids(cfg.model, volume)
    with figure(2.9, out) as fig:
        ax = fig.subplots()
        ax.set(xlim=(0, 15.2), ylim=(-0.6, 5.2))
        ax.axis("off")
        x, y, z, t = volume
        _box(ax, 0.1, 1.7, 1.9, 1.7, f"clip\n{x} × {y} × {z}\nvoxels\n{t} frames", "#666666")
        patch = " × ".join(map(str, cfg.model.patch_size[:3]))
        _box(ax, 2.5, 1.7, 1.9, 1.7, f"patches of\n{patch} voxels,\n{cfg.model.patch_size[3]} frame", ORANGE)
        _arrow(ax, (2.05, 2.55), (2.45, 2.55))
        for stage, grid in enumerate(grids):
            left = 4.9 + 1.9 * stage
            size = f"{grid[0]} × {grid[1]} × {grid[2]}\n× {grid[3]} tokens"
            width = cfg.model.embed_dim * 2**stage
            text = f"stage {stage + 1}\n{cfg.model.depths[stage]} blocks\n{size}\n{width} channels"
            _box(ax, left, 1.7 - 0.1, 1.55, 1.9, text, BLUE)
            _arrow(ax, (left - 0.3, 2.55), (left - 0.05, 2.55))
        _arrow(ax, (12.2, 2.55), (12.7, 4.1))
        _arrow(ax, (12.2, 2.55), (12.7, 2.55))
        _arrow(ax, (12.2, 2.55), (12.7, 1.0))
        _box(ax, 12.75, 3.6, 2.3, 1.1, "decoder: the\nhidden voxels", GREEN)
        _box(ax, 12.75, 2.0, 2.3, 1.1, "mean over brain:\nan embedding", GREEN)
        _box(ax, 12.75, 0.4, 2.3, 1.1, "head: a label", GREEN)
        ax.text(8.6, 0.9, "between stages, 2 × 2 × 2 neighbours become one token; time stays", ha="center", fontsize=8)


def masks(out: Path) -> None:
    """What each kind of mask hides, of one row of patches (down) in 20 frames (across)."""
    with figure(2.2, out) as fig:
        for ax, (kind, title) in zip(fig.subplots(1, 3), KINDS, strict=True):
            hidden = draw_mask(0, torch.tensor([3]), (72, 72, 72, 20), (6, 6, 6, 1), (6, 6, 6, 1), 0.8, kind)[0]
            row = hidden[:, 6, 6].numpy()  # (x, t)
            colours = np.where(row[..., None], np.array(_rgb(HIDDEN)), np.array(_rgb(ORANGE)))
            ax.imshow(colours, aspect="auto", interpolation="nearest")
            ax.set_xticks(np.arange(-0.5, 20), minor=True)
            ax.set_yticks(np.arange(-0.5, 12), minor=True)
            ax.grid(which="minor", color="white", lw=0.8)
            ax.tick_params(which="both", length=0)
            ax.set(title=title, xlabel="frame", xticks=[0, 5, 10, 15], yticks=[])
        fig.axes[0].set_ylabel("patches of one row")
        fig.suptitle("orange: seen by the model; blue: hidden and to be filled in (80 %)", fontsize=8.5, color="0.3")


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def block(out: Path) -> None:
    """A block of the default variant, with the windows in which tokens look at each other."""
    with figure(3.0, out) as fig:
        left, middle, right = fig.subplots(1, 3, width_ratios=[1.15, 1, 1.25])
        _branches(left)
        _space(middle)
        _time(right)


def _branches(ax: Axes) -> None:
    ax.set(xlim=(0, 6), ylim=(0, 9.6), title="one block")
    ax.axis("off")
    parts = (("attention in space", SKY), ("attention in time", VERMILION), ("MLP", GREEN))
    ax.text(2.4, 0.15, "tokens", ha="center", fontsize=8)
    for number, (name, colour) in enumerate(parts):
        bottom = 1.0 + 2.8 * number
        _arrow(ax, (2.4, bottom - 0.45), (2.4, bottom + 0.25))
        _box(ax, 0.5, bottom + 0.3, 3.8, 1.3, f"LayerNorm\n{name}", colour)
        ax.plot([2.4, 5.2, 5.2], [bottom - 0.1, bottom - 0.1, bottom + 2.05], color="black", lw=0.9)
        _arrow(ax, (5.2, bottom + 2.0), (2.6, bottom + 2.05))
        ax.text(2.4, bottom + 2.05, "+", ha="center", va="center", fontsize=11)
    ax.text(5.3, 5.0, "the input\nis added", fontsize=7, va="center")


def _space(ax: Axes) -> None:
    """Windows of 4 tokens on an axis, and those of every second block, moved by half a window."""
    count, side = 12, 4
    ax.set(xlim=(-0.2, count + 0.2), ylim=(-1.2, count + 0.2), title="windows in space (a slice)", aspect="equal")
    ax.axis("off")
    for x in range(count):
        for y in range(count):
            ax.add_patch(Rectangle((x + 0.1, y + 0.1), 0.8, 0.8, fc="#DDDDDD"))
    for x in range(0, count, side):
        for y in range(0, count, side):
            ax.add_patch(Rectangle((x, y), side, side, fill=False, ec=BLUE, lw=1.6))
    for at in range(side // 2, count, side):
        ax.plot([at, at], [0, count], color=VERMILION, lw=1.1, ls="--")
        ax.plot([0, count], [at, at], color=VERMILION, lw=1.1, ls="--")
    ax.text(count / 2, -0.9, "solid: one block; dashed: the next", ha="center", fontsize=7.5)


def _time(ax: Axes) -> None:
    """Windows of 10 frames for one place."""
    frames, reach = 20, 10
    ax.set(xlim=(-0.5, frames + 0.5), ylim=(-1.4, 5.2), title="windows in time (one place)")
    ax.axis("off")
    for row, (offset, colour, style) in enumerate(((0, BLUE, "-"), (reach // 2, VERMILION, "--"))):
        bottom = 3.2 - 2.4 * row
        for t in range(frames):
            ax.add_patch(Rectangle((t + 0.1, bottom), 0.8, 0.8, fc="#DDDDDD"))
        edges = sorted({0, frames, *range(offset, frames, reach)})
        for start, end in itertools.pairwise(edges):
            box = Rectangle((start, bottom - 0.2), end - start, 1.2, fill=False, ec=colour, lw=1.5, ls=style)
            ax.add_patch(box)
        ax.text(0, bottom + 1.2, "one block" if row == 0 else "the next", fontsize=7.5)
    ax.text(frames / 2, -0.9, "20 frames, 10 to a window", ha="center", fontsize=7.5)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))

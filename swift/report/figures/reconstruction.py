"""The reconstruction figure: what the model saw of a clip, what it made of it, and how far that is from the truth."""

from __future__ import annotations

import textwrap
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from swift.report.runs import Run, load_run
from swift.report.style import HIDDEN, VERMILION, figure
from swift.utils.errors import UserError


@dataclass
class _Clip:
    """Content of reconstruction.npz, and where it is looked at."""

    original: np.ndarray  # (X, Y, Z, T)
    masked: np.ndarray  # (X, Y, Z, T) bool
    reconstructed: np.ndarray  # (X, Y, Z, T)
    brain: np.ndarray  # (X, Y, Z) bool
    tr: float  # s
    spacing: float  # mm
    frame: int
    centre: tuple[int, int, int]
    voxel: tuple[int, int, int]

    @property
    def composite(self) -> np.ndarray:
        """The prediction where the model saw nothing, the original elsewhere: (X, Y, Z, T)."""
        return np.where(self.masked, self.reconstructed, self.original)


def _load_clip(npz_path: str | Path) -> _Clip:
    names = ("original", "masked", "reconstructed", "brain", "tr", "spacing", "frame")
    try:
        with np.load(npz_path, allow_pickle=False) as content:
            missing = [name for name in names if name not in content]
            if missing:
                raise UserError(f"{npz_path}: no array {', '.join(missing)}; it must hold {', '.join(names)}")
            data = {name: content[name] for name in names}
    except FileNotFoundError as error:
        raise UserError(f"{npz_path}: no such file") from error
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition(".")[0]
        raise UserError(f"{npz_path}: not a readable .npz file ({reason})") from error
    original, masked, brain = (
        data["original"].astype(np.float32),
        data["masked"].astype(bool),
        data["brain"].astype(bool),
    )
    frame, shape = int(data["frame"]), original.shape
    if original.ndim != 4 or masked.shape != shape or data["reconstructed"].shape != shape or brain.shape != shape[:3]:
        shapes = {name: data[name].shape for name in names[:4]}
        raise UserError(f"{npz_path}: expected (X, Y, Z, T) three times and brain (X, Y, Z), got {shapes}")
    if not 0 <= frame < shape[3] or not brain.any() or not (masked & brain[..., None]).any():
        raise UserError(f"{npz_path}: frame {frame} of {shape[3]}, {brain.sum()} brain voxels; nothing masked to show")
    # kind temporal hides the last frames only: go to the nearest frame that has something hidden
    frames = np.flatnonzero((masked & brain[..., None]).any((0, 1, 2)))
    frame = int(frames[np.argmin(np.abs(frames - frame))])
    centre = tuple(round(axis.mean()) for axis in brain.nonzero())
    reconstructed = data["reconstructed"].astype(np.float32)
    voxel = _typical_voxel(np.abs(reconstructed - original), masked, brain, centre[2])
    spacing = float(np.mean(data["spacing"]))
    return _Clip(original, masked, reconstructed, brain, float(data["tr"]), spacing, frame, centre, voxel)


def _typical_voxel(error: np.ndarray, masked: np.ndarray, brain: np.ndarray, z: int) -> tuple[int, int, int]:
    """The voxel whose mean error over its masked frames is the median: neither the best nor the worst.

    Among brain voxels of axial plane `z` that have masked and visible frames; where there are none, those of the plane
    with masked ones; where there are none, those of the brain.
    """
    hidden = masked.sum(3)
    any_masked = brain & (hidden > 0)
    plane = np.zeros_like(brain)
    plane[:, :, z] = True
    mixed = any_masked & (hidden < masked.shape[3])
    candidates = next(c for c in (mixed & plane, any_masked & plane, any_masked) if c.any())
    places = np.argwhere(candidates)
    mean = (error * masked).sum(3)[candidates] / hidden[candidates]
    x, y, z = places[np.argsort(mean, kind="stable")[(len(mean) - 1) // 2]]
    return int(x), int(y), int(z)


PLANES = (("sagittal", 0, (1, 2), ("P", "A")), ("coronal", 1, (0, 2), ("L", "R")), ("axial", 2, (0, 1), ("L", "R")))
"""Name, fixed axis, axes shown (horizontal, vertical), what lies at the left and right edge of the picture in RAS+."""
MARGIN_X, MARGIN_Y = (4, 4), (1, 1)
"""Voxels around the brain."""
COLUMNS = ("original", "masked input", "reconstruction", "difference")


def _slice(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A plane as an image for imshow(origin="lower"): rows are the vertical axis."""
    return np.take(volume, index, axis=axis).T


def reconstruction(npz_path: str | Path, out: str | Path | None) -> Figure:
    """What the model saw, what it made of it, and how far that is from the truth, for one frame of one clip.

    Args:
        npz_path: RUN/figures/reconstruction.npz: original, masked, reconstructed (X, Y, Z, T), brain (X, Y, Z), tr (s),
            spacing (mm), frame (index of the frame shown; the
            nearest one with hidden brain voxels if it has none). Orientation RAS+.
        out: PNG to write; None: only return the figure.

    Raises:
        UserError: The file is missing, damaged or has wrong shapes; `out` cannot be written.
    """
    clip = _load_clip(npz_path)
    run = _run_of(npz_path)
    unit = run.unit if run else "normalized units"
    box = [(int(axis.min()), int(axis.max()) + 1) for axis in clip.brain.nonzero()]
    # rows as high as their pictures at one scale, so that no picture floats in its cell
    spans = [stop - start for start, stop in box]
    panel = 1.7 / (max(spans[:2]) + sum(MARGIN_X))  # inches a voxel
    heights = [panel * (spans[axes[1]] + sum(MARGIN_Y)) for _, _, axes, _ in PLANES]
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.055, hspace=0.0, wspace=0.02)
    with figure(sum(heights) + 3.85, out, layout=layout) as fig:
        grid = fig.add_gridspec(5, 4, height_ratios=[*heights, 0.09, 1.6])
        images = _draw_planes(fig, grid, clip, box)
        left = fig.colorbar(images[0], cax=fig.add_subplot(grid[3, :3]), orientation="horizontal", extend="both")
        left.set_label(f"BOLD signal ({unit})")
        right = fig.colorbar(images[1], cax=fig.add_subplot(grid[3, 3]), orientation="horizontal", extend="both")
        right.set_label("reconstruction − original")
        right.ax.xaxis.set_major_locator(MaxNLocator(5))
        _draw_course(fig.add_subplot(grid[4, :]), clip, unit)
        fig.supxlabel(_caption(clip), x=0.01, ha="left", fontsize=7.5, color="#303030")
    return fig


def _run_of(npz_path: str | Path) -> Run | None:
    """The run a figure's data lies in, if it lies in one."""
    folder = Path(npz_path).resolve().parent.parent
    return load_run(folder) if (folder / "metrics.jsonl").is_file() else None


def _draw_planes(fig: Figure, grid: Any, clip: _Clip, box: list[tuple[int, int]]) -> tuple[Any, Any]:
    """Three rows of four pictures; returns an image of the signal scale and one of the difference scale."""
    shown = clip.original[..., clip.frame][clip.brain]
    low, high = np.percentile(shown[np.isfinite(shown)], (2, 98)) if np.isfinite(shown).any() else (0.0, 1.0)
    hidden, brain = clip.masked[..., clip.frame], clip.brain
    blank = np.float32(np.nan)
    original = np.where(brain, clip.original[..., clip.frame], blank)
    composite = np.where(brain, clip.composite[..., clip.frame], blank)
    difference = np.where(brain & hidden, clip.reconstructed[..., clip.frame] - clip.original[..., clip.frame], blank)
    found = np.abs(difference[np.isfinite(difference)])
    limit = float(np.percentile(found, 98)) if len(found) else 1.0
    signal: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": high}
    change: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -(limit or 1.0), "vmax": limit or 1.0}
    volumes = (
        (original, signal),
        (np.where(hidden, blank, original), signal),
        (composite, signal),
        (difference, change),
    )
    last: list[Any] = [None, None]
    for row, (plane, axis, shown_axes, sides) in enumerate(PLANES):
        for column, (volume, scale) in enumerate(volumes):
            ax = fig.add_subplot(grid[row, column], gid=f"{plane} {COLUMNS[column]}")
            if column == 1:
                cover = _slice(np.where(brain & hidden, 1.0, np.nan), axis, clip.centre[axis])
                ax.imshow(cover, origin="lower", cmap=ListedColormap([HIDDEN]), interpolation="nearest")
            picture = _slice(volume, axis, clip.centre[axis])
            last[column == 3] = ax.imshow(picture, origin="lower", interpolation="nearest", **scale)
            outline = _slice(brain.astype(float), axis, clip.centre[axis])
            ax.contour(outline, levels=[0.5], colors="#606060", linewidths=0.5)
            _dress(ax, [box[i] for i in shown_axes], sides)
            if row == 0:
                ax.set_title(COLUMNS[column])
            if column == 0:
                ax.set_ylabel(f"{plane}\n{'xyz'[axis]} = {clip.centre[axis]}")
            if axis == 2 and clip.voxel[2] == clip.centre[2] and column in (0, 2):
                ax.plot(*clip.voxel[:2], marker="+", ms=9, mew=1.4, color=VERMILION, gid="voxel")
    return last[0], last[1]


def _dress(ax: Axes, limits: list[tuple[int, int]], sides: tuple[str, str]) -> None:
    """Cut to the brain with a margin, take the ticks away, name the two sides."""
    (left, right), (bottom, top) = limits
    ax.set_xlim(left - 0.5 - MARGIN_X[0], right - 0.5 + MARGIN_X[1])
    ax.set_ylim(bottom - 0.5 - MARGIN_Y[0], top - 0.5 + MARGIN_Y[1])
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    style: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 8, "color": "#303030", "va": "bottom"}
    ax.text(0.01, 0.01, sides[0], ha="left", **style)
    ax.text(0.99, 0.01, sides[1], ha="right", **style)


def _draw_course(ax: Axes, clip: _Clip, unit: str) -> None:
    """The chosen voxel over time: the truth, the prediction at the frames the model did not see."""
    times = np.arange(clip.original.shape[3]) * clip.tr
    masked = clip.masked[clip.voxel]
    for index in np.flatnonzero(masked):
        label = "masked frame" if index == np.flatnonzero(masked)[0] else None
        ax.axvspan(times[index] - clip.tr / 2, times[index] + clip.tr / 2, color=HIDDEN, alpha=0.4, lw=0, label=label)
    ax.plot(times, clip.original[clip.voxel], color="black", lw=1.3, marker="o", ms=3, label="original", gid="original")
    ax.plot(
        times[masked],
        clip.reconstructed[clip.voxel][masked],
        color=VERMILION,
        ls="none",
        marker="D",
        ms=4.5,
        label="reconstruction at masked frames",
        gid="reconstruction",
    )
    ax.axvline(times[clip.frame], color="#606060", lw=0.9, ls=":", label="frame shown above")
    ax.set_xlim(times[0] - clip.tr / 2, times[-1] + clip.tr / 2)
    ax.set_xlabel("time from the start of the clip (s)")
    ax.set_ylabel(f"BOLD signal\n({unit})")
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(
        range(len(labels)), key=lambda i: ("original", "reconstruction at masked frames").count(labels[i]), reverse=True
    )
    ax.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        borderaxespad=0.2,
    )


def _caption(clip: _Clip) -> str:
    hidden = clip.masked[clip.brain]
    error = np.abs(clip.reconstructed - clip.original)[clip.brain][hidden].mean()
    place = "of its axial plane, marked +" if clip.voxel[2] == clip.centre[2] else "of the brain"
    part = f"{100 * hidden.mean():.0f} % of the clip's brain voxels and frames"
    text = (
        f"Frame {clip.frame + 1} of {clip.original.shape[3]} (TR {clip.tr:g} s), {clip.spacing:g} mm voxels, "
        f"neurological view (left is left). Blue: hidden from the model ({part}). "
        "Reconstruction: the prediction in hidden patches, the original elsewhere; difference: hidden patches only. "
        f"Below: voxel ({', '.join(map(str, clip.voxel))}), the one of median error {place}. "
        f"Mean absolute error over this clip's hidden brain voxels: {error:.3f}."
    )
    return textwrap.fill(text, 138)

"""Predicted maps of three subjects beside the true ones, and who is like whom.

Reads RUN/figures/maps.npz, which a task of maps leaves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from swift.report.style import WIDTH, figure

ROWS = ("best", "median", "worst")


def _middle(volume: np.ndarray) -> int:
    """The axial slice in the middle of those that have values."""
    places = np.flatnonzero(np.isfinite(volume).any((0, 1)))
    return int(places[len(places) // 2])


def maps_figure(data: str | Path, out: str | Path) -> None:
    """Truth, prediction and both without the training mean, of the best, median and worst subject by residual r; below
    them C, of maps and of residuals. All of one contrast; a row shows one axial slice, left at the left.

    Args:
        data: maps.npz.
        out: PNG.

    Raises:
        UserError: the file cannot be written.
    """
    with np.load(data, allow_pickle=False) as file:
        arrays: dict[str, Any] = dict(file)
    truth, said, mean = arrays["truth"], arrays["predicted"], arrays["mean"]
    wide = float(np.nanpercentile(np.abs(truth), 99))
    rest = float(np.nanpercentile(np.abs(truth - mean), 99))
    titles = ("true map", "predicted map", "true residual", "predicted residual")
    with figure(1.35 * WIDTH, out) as fig:
        fig.suptitle(f"contrast {arrays['contrast']}")
        grid = fig.add_gridspec(5, 4)
        axes = np.array([[fig.add_subplot(grid[row, place]) for place in range(4)] for row in range(3)])
        for row, name in enumerate(ROWS):
            z = _middle(said[row])
            shown = (truth[row], said[row], truth[row] - mean, said[row] - mean)
            for place, (axis, volume) in enumerate(zip(axes[row], shown, strict=True)):
                limit = wide if place < 2 else rest
                picture = axis.imshow(volume[:, :, z].T, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if row == 2 and place in (1, 3):
                    fig.colorbar(picture, ax=axes[:, place - 1 : place + 1], shrink=0.6)
            axes[row, 0].set_ylabel(f"{name}\nresidual r {float(arrays['residual_r'][row]):.2f}")
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title)
        for place, (key, title) in enumerate((("raw", "r of maps"), ("residual", "r of residuals"))):
            axis = fig.add_subplot(grid[3:, 2 * place : 2 * place + 2])
            picture = axis.imshow(arrays[key], cmap="viridis")
            axis.set_title(f"{title}, {arrays[key].shape[0]} test subjects")
            axis.set_xlabel("predicted map of subject")
            axis.set_ylabel("true map of subject")
            fig.colorbar(picture, ax=axis, shrink=0.8)

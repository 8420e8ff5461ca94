"""Attribution maps on the scan's mean image, by nilearn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from swift.report.style import figure

SHOWN = 90
"""Percentile of a map's sizes from which it is drawn."""
PART = "part of the change"
END = 99
"""Percentile of a map's sizes at which its colours end: a few voxels may be ten times as large as the others."""
ROWS = {
    "ig_share": ("integrated gradients: part of the output's change from the baseline", f"{PART}, a voxel"),
    "occlusion": ("occlusion: part of the output's change lost without the voxel's cube", f"{PART}, a cube"),
    "ig_share_random": ("integrated gradients of the model with shuffled weights", f"{PART}, a voxel"),
    "ig": ("integrated gradients, mean of the clips", "units of the output, a voxel"),
}
"""What is drawn, in this order: title, and label of the colour bar. Sizes of single clips are not: they mislead."""
ROW, TOP, BOTTOM = 2.2, 0.35, 0.25  # inches: of a map, and for title and note


def draw(images: dict[str, nib.Nifti1Image], mean: nib.Nifti1Image, title: str, out: Path) -> None:
    """One row a map, cut where the integrated gradients' share has its (smoothed) largest value.

    Args:
        images: Maps by name, in one space with `mean`; those of ROWS are drawn, `ig_share` must be there.
        mean: What to draw them on.
        title: Of the figure.
        out: PNG.
    """
    from nilearn import plotting

    centre = _centre(images["ig_share"])
    rows = {name: images[name] for name in ROWS if name in images}
    height = ROW * len(rows) + TOP + BOTTOM
    with figure(height, out, layout=None) as fig:
        fig.suptitle(title, fontsize=9, y=1 - 0.04 / height, va="top")
        part, floor = ROW / height, BOTTOM / height
        for row, (name, image) in enumerate(rows.items()):
            heading, unit = ROWS[name]
            sizes = np.abs(np.asarray(image.dataobj))
            cut, top = np.percentile(sizes[sizes > 0], [SHOWN, END]).tolist() if (sizes > 0).any() else (1e-6, 1.0)
            shown = plotting.plot_stat_map(
                image,
                bg_img=mean,
                cut_coords=centre,
                figure=fig,
                axes=(0.02, floor + (len(rows) - 1 - row + 0.05) * part, 0.88, part * 0.82),
                threshold=cut,
                cmap="RdBu_r",
                vmin=-top,
                vmax=top,
                symmetric_cbar=True,
                black_bg=False,
                draw_cross=False,
                annotate=False,
            )
            shown.annotate(size=7)  # sides, and where the cuts lie (mm)
            _label(shown, unit)
            fig.text(0.02, floor + (len(rows) - row - 0.02) * part, heading, fontsize=8.5, va="top")
        note = f"Drawn: the {100 - SHOWN} % of voxels with the largest sizes; colours end at the {END}th percentile. "
        note += "Cuts in mm."
        fig.text(0.98, 0.3 * floor, note, fontsize=7, ha="right", va="bottom", color="0.35")


def _label(shown: Any, text: str) -> None:
    """Say what the colour bar's numbers are; nilearn has no argument for it."""
    axes = shown._cbar.ax
    axes.tick_params(labelsize=7)
    axes.yaxis.set_label_position("right")
    axes.set_ylabel(text, fontsize=7, labelpad=4)


def _centre(image: nib.Nifti1Image) -> tuple[float, float, float]:
    """World place, mm, of the largest value after smoothing."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.asarray(image.dataobj, dtype=np.float64), 1.5)
    voxel = np.array(np.unravel_index(int(smooth.argmax()), smooth.shape))
    x, y, z = voxel @ image.affine[:3, :3].T + image.affine[:3, 3]
    return float(x), float(y), float(z)

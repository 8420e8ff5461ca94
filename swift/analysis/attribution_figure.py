"""Attribution maps on the scan's mean image, by nilearn."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from swift.analysis.style import DPI, STYLE, WIDTH, save

SHOWN = 90
"""Percentile of a map's sizes from which it is drawn."""
TITLES = {
    "ig": "integrated gradients, summed over frames",
    "ig_size": "integrated gradients, sizes",
    "occlusion": "occlusion: what the output loses",
    "ig_size_random": "the same with shuffled weights, sizes",
}
ROW = 2.1  # inches


def draw(images: dict[str, nib.Nifti1Image], mean: nib.Nifti1Image, title: str, out: Path) -> None:
    """One row a map, cut where the sizes of the integrated gradients have their (smoothed) largest value.

    Args:
        images: Maps by the names of TITLES, in one space with `mean`.
        mean: What to draw them on.
        title: Of the figure.
        out: PNG.
    """
    from nilearn import plotting

    centre = _centre(images["ig_size"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, ROW * len(images) + 0.3), dpi=DPI)
        figure.suptitle(title, fontsize=9, y=0.995, va="top")
        part = ROW / (ROW * len(images) + 0.3)
        for row, (name, image) in enumerate(images.items()):
            sizes = np.abs(np.asarray(image.dataobj))
            signed = "size" not in name
            top = float(sizes.max()) or 1.0
            shown = plotting.plot_stat_map(
                image,
                bg_img=mean,
                cut_coords=centre,
                figure=figure,
                axes=(0.02, (len(images) - 1 - row) * part, 0.94, part * 0.86),
                threshold=float(np.percentile(sizes[sizes > 0], SHOWN)) if (sizes > 0).any() else 1e-6,
                cmap="RdBu_r" if signed else "inferno",
                vmin=-top if signed else 0,
                vmax=top,
                symmetric_cbar=signed,
                black_bg=False,
                draw_cross=False,
                annotate=False,
            )
            shown.annotate(size=7, positions=False)
            figure.text(0.02, (len(images) - row) * part - 0.02 * part, TITLES[name], fontsize=8.5, va="top")
        save(figure, out)


def _centre(image: nib.Nifti1Image) -> tuple[float, float, float]:
    """World place, mm, of the largest value after smoothing."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.asarray(image.dataobj, dtype=np.float64), 1.5)
    voxel = np.array(np.unravel_index(int(smooth.argmax()), smooth.shape))
    x, y, z = voxel @ image.affine[:3, :3].T + image.affine[:3, 3]
    return float(x), float(y), float(z)

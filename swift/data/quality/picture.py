"""A picture (PNG) of one scan's quality, for `info --qc`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from swift.data.quality.measures import courses, tsnr_map
from swift.data.store.reader import Store
from swift.utils.errors import UserError


def quality_picture(store: Store, scan: int, target: Path) -> dict[str, float]:
    """Draw mean, temporal signal-to-noise (mean / std over time) and a carpet (voxels by time, z-scored) of one scan.

    Returns:
        median_tsnr, and mean and largest DVARS-like change from frame to frame (root mean square of z-scores).

    Raises:
        UserError: the picture cannot be written, or damaged data (every frame is checked).
    """
    from matplotlib.figure import Figure  # drawing is asked for now and then only

    info, mask = store.scans[scan], store.mask(scan)
    mean, tsnr, course = store.array(scan, "stats/mean"), tsnr_map(store, scan), courses(store, scan)
    carpet, change = course.carpet, course.change[1:]

    figure = Figure(figsize=(9, 7), layout="constrained")
    rows = np.asarray(figure.subfigures(3, 1, height_ratios=(1, 1, 1.1)))
    centre = [round(float(places.mean())) for places in np.nonzero(mask)]
    for row, (values, title) in zip(rows, ((mean, "mean"), (tsnr, "tSNR")), strict=False):
        volume = np.full(store.grid, np.nan, np.float32)
        volume[mask] = values
        top = float(np.percentile(values, 98)) or 1.0
        planes = (volume[centre[0]], volume[:, centre[1]], volume[:, :, centre[2]])
        axes = row.subplots(1, 3)
        for axis, plane, name in zip(axes, planes, ("sagittal", "coronal", "axial"), strict=True):
            image = axis.imshow(
                plane.T, origin="lower", cmap="gray" if title == "mean" else "viridis", vmin=0, vmax=top
            )
            axis.set_title(f"{title}, {name}", fontsize=9)
            axis.set_axis_off()
        row.colorbar(image, ax=axes, shrink=0.8)
    axis = rows[2].subplots()
    axis.imshow(carpet.T, aspect="auto", cmap="gray", vmin=-2, vmax=2, interpolation="nearest")
    axis.set(xlabel=f"frame (TR {info.tr:g} s)", ylabel=f"{len(course.place)} of {info.voxels} voxels", yticks=[])
    figure.suptitle(
        f"{info.scan_id}: {info.frames} frames, {info.voxels} voxels, median tSNR {np.median(tsnr):.0f}", fontsize=10
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    return {
        "median_tsnr": float(np.median(tsnr)),
        "mean_change": float(change.mean()),
        "largest_change": float(change.max()),
    }

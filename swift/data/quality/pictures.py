"""Small pictures of a scan for a page: slices of the mean and of the tSNR with the mask's outline, the carpet, traces.

Each is markup with the picture inside it; words are text, so they stay sharp and take the page's colours.
Legend: X Y Z voxels (RAS+), T frames, n sampled voxels.
"""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from swift.data.quality.measures import HIGH_MOTION, Courses, centred, outlier_frames, tsnr_map
from swift.data.store.reader import Store

TILE = 128
"""Pixels of a slice's longer side."""
SLICES = (0.25, 0.5, 0.75)
"""Where the slices lie: quantiles of the mask's voxels along the axis."""
PLANES = (("sagittal", "x", "P", "A"), ("coronal", "y", "L", "R"), ("axial", "z", "L", "R"))
"""Name, axis that is cut, what lies left and right in the picture: as one looks from behind, and from above."""
OUTLINE = {"mean": (255, 140, 0), "map": (255, 255, 255)}
MOST_COLUMNS, CARPET_ROWS = 400, 140
QUALITY = 55
"""Of the WebP pictures."""
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Five points of matplotlib's map of that name."""


def webp(pixels: np.ndarray) -> str:
    """(rows, columns[, 3]) uint8 as an address that holds the picture."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def coloured(part: np.ndarray, kind: str) -> np.ndarray:
    """Values from 0 to 1 -> (..., 3) uint8: gray for the mean, viridis for a map."""
    part = np.clip(part, 0, 1)
    if kind == "mean":
        return np.repeat((255 * part).astype(np.uint8)[..., None], 3, axis=-1)
    points = np.array(VIRIDIS, np.float64)
    where = np.linspace(0, 1, len(points))
    return np.stack([np.interp(part, where, points[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def edge_of(mask: np.ndarray) -> np.ndarray:
    """(rows, columns) bool: cells of a mask that touch a cell outside of it, or the picture's edge."""
    wide = np.pad(mask, 1)
    inner = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return np.asarray(mask & ~inner)


def tile(values: np.ndarray, mask: np.ndarray, low: float, high: float, kind: str) -> np.ndarray:
    """One slice, first axis to the right and second up, enlarged, with the mask's outline.

    Args:
        values: (A, B) of the slice.
        mask: (A, B) bool.
        low, high: Values of the darkest and of the brightest colour.
        kind: "mean" or "map".
    """
    size = round(mask.shape[0] * TILE / max(mask.shape)), round(mask.shape[1] * TILE / max(mask.shape))
    part = (values - low) / ((high - low) or 1.0)
    turned = np.ascontiguousarray(np.where(mask, part, 0).T[::-1], dtype=np.float32)
    brain = np.ascontiguousarray(mask.T[::-1])
    large = np.asarray(Image.fromarray(turned).resize(size, Image.Resampling.BILINEAR))
    inside = np.asarray(Image.fromarray(brain.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 127
    pixels = coloured(large, kind)
    pixels[~inside] = 0
    pixels[edge_of(inside)] = OUTLINE[kind]
    return pixels


def slices_of(mask: np.ndarray, axis: int) -> list[int]:
    """Places of the slices along one axis."""
    count = np.cumsum(mask.sum(axis=tuple(other for other in range(3) if other != axis)))
    return [int(np.searchsorted(count, share * count[-1])) for share in SLICES]


def brain(store: Store, scan: int) -> str:
    """Mean and tSNR (of centred values: standard deviation) in three planes of three slices, as three figures."""
    mask, affine = store.mask(scan), store.affine(scan)
    mean = store.array(scan, "stats/mean")
    has_tsnr = not centred(store, scan)
    second = tsnr_map(store, scan) if has_tsnr else store.array(scan, "stats/std")
    name = "tSNR" if has_tsnr else "SD over time"
    low, high = (0.0, float(np.percentile(mean, 98))) if has_tsnr else map(float, np.percentile(mean, [2, 98]))
    top = float(np.percentile(second, 98))
    shown = []
    kinds: tuple[tuple[np.ndarray, float, float, str], ...] = ((mean, low, high, "mean"), (second, 0.0, top, "map"))
    for values, bottom, end, kind in kinds:
        volume = np.zeros(store.grid, np.float32)
        volume[mask] = values
        shown.append((volume, bottom, end, kind))
    figures = []
    for axis, (plane, letter, left, right) in enumerate(PLANES):
        places = slices_of(mask, axis)
        rows = [
            np.concatenate(
                [tile(np.take(volume, p, axis), np.take(mask, p, axis), bottom, end, kind) for p in places], axis=1
            )
            for volume, bottom, end, kind in shown
        ]
        millimetres = [float(affine[axis, axis] * p + affine[axis, 3]) for p in places]
        words = f"{plane}, above mean, below {name}, at {letter} = " + ", ".join(f"{mm:g}" for mm in millimetres)
        figures.append(_plane(np.concatenate(rows), millimetres, letter, left, right, words + " mm"))
    told = f"Above: mean, {low:.4g} to {_short(high)}. Below: {name}, 0 to {top:.3g}. Line: the mask; L: left; mm."
    return f"<figure><div class=planes>{''.join(figures)}</div><figcaption>{told}</figcaption></figure>"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plane(pixels: np.ndarray, millimetres: list[float], letter: str, left: str, right: str, words: str) -> str:
    height, width = pixels.shape[:2]
    step = width / len(millimetres)
    texts = [f'<text x="4" y="14">{left}</text>', f'<text x="{width - 4}" y="14" text-anchor="end">{right}</text>']
    texts += [
        f'<text x="{(i + 0.5) * step:.0f}" y="{height + 13}" text-anchor="middle" class=mm>{letter} {mm:g}</text>'
        for i, mm in enumerate(millimetres)
    ]
    image = f'<image width="{width}" height="{height}" href="{webp(pixels)}"/>'
    box = f'viewBox="0 0 {width} {height + 18}" role="img" aria-label="{escape(words)}"'
    return f"<svg {box}>{image}{''.join(texts)}</svg>"


def binned(values: np.ndarray, columns: int, largest: bool) -> np.ndarray:
    """The first axis brought to at most so many columns: the mean of neighbours, or their largest (spikes stay)."""
    if len(values) <= columns:
        return values
    starts = np.linspace(0, len(values), columns, endpoint=False).astype(int)
    if largest:
        return np.asarray(np.fmax.reduceat(values, starts))
    return np.add.reduceat(values, starts) / np.diff([*starts, len(values)])[:, None]


def carpet(course: Courses, tr: float) -> str:
    """Traces of movement and of change from frame to frame above the carpet, all over the same frames."""
    frames = len(course.change)
    parts = []
    told = [f"{frames} frames of {tr:g} s."]
    if course.displacement is not None and np.isfinite(course.displacement).any():
        top = max(float(np.nanmax(course.displacement)), HIGH_MOTION)
        parts.append(_trace("movement", course.displacement, top, HIGH_MOTION))
        told.append(f"First: framewise displacement, 0 to {top:.2g} mm, line at {HIGH_MOTION:g} mm.")
    else:
        told.append("Movement is not known.")
    top = float(course.change.max()) or 1.0
    drawn = course.change.copy()
    drawn[:1] = course.change[1:2] if frames > 1 else 0  # the first frame has none before it
    parts.append(_trace("change", drawn, top, None))
    count = int(outlier_frames(course.change).sum())
    told.append(f"Change from the frame before, 0 to {top:.2g} SD; {count} outlying frames.")
    rows = binned(binned(course.carpet, MOST_COLUMNS, False).T, CARPET_ROWS, False)
    pixels = (255 * np.clip((rows + 2) / 4, 0, 1)).astype(np.uint8)
    parts.append(f'<img class=carpet alt="carpet: voxels over frames" src="{webp(pixels)}">')
    told.append("Carpet: voxels by frames, -2 to 2 SD.")
    return f"<figure class=course>{''.join(parts)}<figcaption>{' '.join(told)}</figcaption></figure>"


def _trace(kind: str, values: np.ndarray, top: float, line: float | None) -> str:
    points = binned(np.nan_to_num(values), MOST_COLUMNS, True)
    text = " ".join(f"{place},{40 * (1 - value / top):.3g}" for place, value in enumerate(points))
    width = max(1, len(points) - 1)
    limit = "" if line is None else f'<path class=limit d="M0 {40 * (1 - line / top):.3g}H{width}"/>'
    return (
        f'<svg class="trace {kind}" viewBox="0 -1 {width} 42" preserveAspectRatio="none" role="img" '
        f'aria-label="{kind} over frames">{limit}<polyline points="{text}"/></svg>'
    )

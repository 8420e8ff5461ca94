"""Statistics and quantization of a scan, in float64 and in bounded memory, and the normalizations made from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swift.utils.errors import BadScan, UserError

LEVELS = 32767
"""Codes go from -LEVELS to LEVELS."""
KINDS = ("zscore_voxel", "zscore_global", "percent", "minmax", "robust", "none")
NEEDS = {"zscore_voxel": ("mean", "std"), "percent": ("mean",), "robust": ("median", "iqr")}
"""Per-voxel statistics that a kind is made from."""
IQR_OF_NORMAL = 1.3489795003921634
"""Interquartile range of a normal distribution of standard deviation 1."""
MINIMUM = "minimum"
"""How an input contract says that the background is the scan's smallest normalized value, see `least`."""
MIN_BASELINE = 0.01
"""Percent change of a voxel whose mean is below this part of the brain's mean is not defined, and set to 0."""
BLOCK_BYTES = 1 << 25


@dataclass
class Summary:
    """Per-voxel arrays (V,) float32 named as in format.STATS, global figures, and the int16 code of every voxel.

    A code q stands for the value q * scale + offset. The code covers the voxel's range symmetrically, so the error is
    at most scale / 2, where scale = (max - min) / 65534. (Where float32 cannot hold the middle of the range, scale is
    larger, but never above (max - min + spacing of float32 at that value) / 65534.) scale is 0 for a constant voxel.
    """

    scale: np.ndarray
    offset: np.ndarray
    voxel: dict[str, np.ndarray]
    brain: dict[str, float]
    constant: int


def voxel_code(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset (V,) float32 of the int16 code that covers [low, high] (V,) float64."""
    offset = ((low + high) / 2).astype(np.float32)
    half = np.maximum(high - offset, offset - low)  # not (high - low) / 2: the offset was rounded to float32
    scale = (half / LEVELS).astype(np.float32)
    short = scale.astype(np.float64) * LEVELS < half
    scale[short] = np.nextafter(scale[short], np.float32(np.inf))
    return scale, offset


def summarize(bold: np.ndarray) -> Summary:
    """Statistics and code of a scan.

    Args:
        bold: (T, V) float32 values, finite. May be a memory map: it is read in blocks of voxels.

    Raises:
        BadScan: no frame, no voxel, or values that are not finite.
    """
    frames, voxels = bold.shape
    if frames < 1 or voxels < 1:
        raise BadScan(f"{frames} frames of {voxels} brain voxels: both must be at least 1")
    names = ("mean", "std", "min", "max", "median", "iqr")
    table = {name: np.empty(voxels, np.float64) for name in names}
    width = max(1, BLOCK_BYTES // (8 * frames))
    for start in range(0, voxels, width):
        part = slice(start, min(start + width, voxels))
        block = np.ascontiguousarray(bold[:, part].T, dtype=np.float64)  # (v, T): each voxel's course together
        if not np.isfinite(block).all():
            bad = int((~np.isfinite(block)).any(1).sum())
            raise BadScan(f"at least {bad} brain voxels hold NaN or infinite values: take them out of the mask first")
        table["mean"][part] = block.mean(1)
        table["std"][part] = block.std(1)
        block.sort(axis=1)
        table["min"][part], table["max"][part] = block[:, 0], block[:, -1]
        first, table["median"][part], third = (_quantile(block, q) for q in (0.25, 0.5, 0.75))
        table["iqr"][part] = third - first
    scale, offset = voxel_code(table["min"], table["max"])
    constant = table["min"] == table["max"]
    table["std"][constant] = 0.0  # rounding of the mean leaves a trace otherwise
    table["mean"][constant] = table["min"][constant]
    mean = float(table["mean"].mean())
    spread = float(np.sqrt(np.mean(table["std"] ** 2 + (table["mean"] - mean) ** 2)))  # law of total variance
    brain = {
        "global_mean": mean,
        "global_std": spread,
        "global_min": float(table["min"].min()),
        "global_max": float(table["max"].max()),
        "global_median": float(np.median(table["median"])),
        "global_iqr": float(np.median(table["iqr"])),
    }
    voxel = {name: array.astype(np.float32) for name, array in table.items()}
    return Summary(scale, offset, voxel, brain, int(constant.sum()))


def _quantile(ordered: np.ndarray, q: float) -> np.ndarray:
    """Linear-interpolation quantile of each row of (v, T) sorted values."""
    place = q * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    return ordered[:, below] + (place - below) * (ordered[:, above] - ordered[:, below])


def quantize(bold: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Codes of some frames: (n, V) float -> (n, V) little-endian int16."""
    inverse = np.zeros(len(scale), np.float64)
    np.divide(1.0, scale, out=inverse, where=scale > 0, dtype=np.float64)
    codes = np.subtract(bold, offset, dtype=np.float64)
    codes *= inverse
    np.rint(codes, out=codes)
    np.clip(codes, -LEVELS, LEVELS, out=codes)
    return codes.astype("<i2")


def least(kind: str, brain: dict[str, float]) -> float:
    """The smallest normalized value of a scan, from its `Summary.brain`.

    Raises:
        UserError: a kind that scales each voxel by itself, where no smallest value is kept.
    """
    if kind == "zscore_global":
        return (brain["global_min"] - brain["global_mean"]) / brain["global_std"]
    if kind in ("minmax", "none"):
        return 0.0 if kind == "minmax" else brain["global_min"]
    raise UserError(
        f"normalization {kind}: a background of the scan's smallest value needs zscore_global, minmax or none"
    )


def fold(
    kind: str,
    scale: np.ndarray,
    offset: np.ndarray,
    voxel: dict[str, np.ndarray],
    brain: dict[str, float],
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Dequantization and normalization in one: a, b (V,) float32 with normalized = q * a + b.

    zscore_voxel: (x - mean) / std of the voxel. zscore_global: of all brain voxels and frames. percent: 100 * (x -
    mean) / mean of the voxel. minmax: the scan's range to [0, 1]. robust: (x - median) / (IQR / 1.349) of the voxel.
    none: x. Voxels that are constant in time give 0 (in every kind but none), as do voxels whose divisor is 0.

    Raises:
        UserError: unknown kind; percent change of a scan without a positive baseline.
    """
    if kind not in KINDS:
        raise UserError(f"normalization {kind!r}: legal are {', '.join(KINDS)}")
    a, b = out if out is not None else np.empty((2, len(scale)), np.float32)
    if kind == "none":
        a[:], b[:] = scale, offset
        return a, b
    # In float32: the largest error, that of offset - centre, is the rounding that both were stored with.
    ok = scale > 0
    centre: np.ndarray | np.float32
    width: np.ndarray | np.float32
    if kind == "zscore_voxel":
        centre, width = voxel["mean"], voxel["std"]
    elif kind == "zscore_global":
        centre, width = np.float32(brain["global_mean"]), np.float32(brain["global_std"])
    elif kind == "minmax":
        centre = np.float32(brain["global_min"])
        width = np.float32(brain["global_max"] - brain["global_min"])
    elif kind == "robust":
        centre, width = voxel["median"], voxel["iqr"] * np.float32(1 / IQR_OF_NORMAL)
    else:
        base = brain["global_mean"]
        if not base > brain["global_std"] * MIN_BASELINE:
            raise UserError(
                f"normalization percent: the scan's mean is {base:.4g} (std {brain['global_std']:.4g}), not a positive "
                "baseline; it was probably centred before: use zscore_voxel"
            )
        centre = voxel["mean"]
        width = centre * np.float32(0.01)
        ok &= centre > np.float32(MIN_BASELINE * base)
    ok &= width > 0
    with np.errstate(divide="ignore"):
        np.reciprocal(np.broadcast_to(width, a.shape), out=a)
    a[~ok] = 0
    np.subtract(offset, centre, out=b)
    b *= a
    a *= scale
    return a, b

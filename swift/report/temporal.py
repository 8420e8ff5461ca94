"""Temporal fidelity: autocorrelation, slope of the power spectrum and Hurst exponent of BOLD and of every layer.

Reads RUN/temporal.json (made by `python -m swift.series RUN SCAN...`). Shapes: T time steps, K series (voxels, or
tokens x channels), L lags.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import welch

from swift.evaluate.predictions import finite
from swift.utils.errors import UserError

Array = np.ndarray
FILE = "temporal.json"
BAND = (0.01, 0.1)
"""Hz: where the BOLD signal of networks lives."""
HURST = np.arange(0.01, 0.996, 0.002)
CONDITIONS = ("ordered", "shuffled")


def acf(series: Array, lags: int) -> Array:
    """Autocorrelation by FFT, the biased estimator: sum of products at a lag over the sum of squares.

    Args:
        series: (T, K).
        lags: Largest lag L.

    Returns:
        (L + 1, K), 1 at lag 0; nan for a series that does not change.

    Raises:
        UserError: no more than L time steps.
    """
    steps = len(series)
    if steps <= lags:
        raise UserError(f"{steps} time steps: an autocorrelation up to lag {lags} needs at least {lags + 1}")
    centred = series - series.mean(0)
    spectrum = rfft(centred, next_fast_len(2 * steps, real=True), axis=0)
    products = irfft(np.abs(spectrum) ** 2, next_fast_len(2 * steps, real=True), axis=0)[: lags + 1]
    variance = (centred**2).sum(0)
    flat = variance <= 1e-20 * np.maximum((series**2).sum(0), 1e-300)
    return np.where(flat, np.nan, products / np.where(flat, 1.0, variance))


def spectrum_slope(series: Array, seconds: float, band: tuple[float, float] = BAND) -> Array:
    """Slope of log power over log frequency inside a band (Welch, Hann windows of a quarter of the series or more).

    Args:
        series: (T, K).
        seconds: Between time steps.
        band: Hz.

    Returns:
        (K,): -beta of a spectrum 1 / f^beta; nan where a series does not change.

    Raises:
        UserError: fewer than three frequencies of the band are resolved.
    """
    steps = len(series)
    window = min(steps, max(steps // 4, int(np.ceil(3 / (band[0] * seconds)))))
    frequency, power = welch(series, 1 / seconds, nperseg=window, axis=0, detrend="constant")
    inside = (frequency >= band[0]) & (frequency <= band[1])
    if inside.sum() < 3:
        raise UserError(
            f"{steps} time steps of {seconds:g} s resolve {inside.sum()} frequencies between {band[0]:g} and "
            f"{band[1]:g} Hz; a slope needs three: longer scans"
        )
    x = np.log(frequency[inside])
    x -= x.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log(power[inside])
        slope = (x[:, None] * y).sum(0) / (x**2).sum()
    return np.where(np.isfinite(slope), slope, np.nan)


@lru_cache(maxsize=8)
def _log_density(steps: int) -> tuple[Array, Array]:
    """Log spectral density of fractional Gaussian noise at the Fourier frequencies, (H, F), and their number.

    f(w) ~ (1 - cos w) sum_j |w + 2 pi j|^(-2H - 1), with 50 terms a side and the rest of the sum as an integral.
    """
    frequency = 2 * np.pi * np.arange(1, (steps - 1) // 2 + 1) / steps
    terms = np.abs(frequency[:, None] + 2 * np.pi * np.arange(-50, 51))
    rows = []
    for hurst in HURST:
        power = -2 * hurst - 1
        edge = 2 * np.pi * 50.5
        rest = ((edge + frequency) ** (power + 1) + (edge - frequency) ** (power + 1)) / (2 * np.pi * 2 * hurst)
        rows.append(np.log1p(-np.cos(frequency)) + np.log((terms**power).sum(1) + rest))
    return np.stack(rows), frequency


def hurst(series: Array) -> Array:
    """Hurst exponent of the fractional Gaussian noise that fits best: Whittle's likelihood, its scale profiled out.

    0.5: white; above: persistent. A signal that is no such noise gets the exponent of the one most like it.

    Args:
        series: (T, K), T at least 32.

    Returns:
        (K,) in (0, 1); nan where a series does not change.

    Raises:
        UserError: fewer than 32 time steps.
    """
    steps = len(series)
    if steps < 32:
        raise UserError(f"{steps} time steps: a Hurst exponent needs at least 32")
    log_density, _ = _log_density(steps)
    count = log_density.shape[1]
    periodogram = np.abs(rfft(series - series.mean(0), axis=0)[1 : count + 1]) ** 2
    flat = periodogram.sum(0) <= 1e-20 * np.maximum((series**2).sum(0), 1e-300)
    with np.errstate(divide="ignore"):
        objective = np.log(np.exp(-log_density) @ periodogram / count) + log_density.mean(1)[:, None]
    best = np.argmin(np.where(np.isfinite(objective), objective, np.inf), axis=0)
    return np.where(flat, np.nan, HURST[best])


def describe(series: Array, seconds: float, lags: int, band: tuple[float, float] = BAND) -> dict[str, Any]:
    """Means over K series, JSON-ready: "acf" (L + 1), "slope", "hurst"."""
    return {
        "acf": [float(value) for value in np.nanmean(acf(series, lags), axis=1)],
        "slope": float(np.nanmean(spectrum_slope(series, seconds, band))),
        "hurst": float(np.nanmean(hurst(series))),
    }


# ----------------------------------------------------------------------------------------------------------- the report
def bootstrap(values: Array, seed: int = 0, draws: int = 2000) -> tuple[Array, Array, Array]:
    """Mean over the first axis (scans) and its 95 % interval: scans drawn with replacement; NaN of a single scan."""
    if len(values) < 2:
        nowhere = np.full_like(np.asarray(values.mean(0), np.float64), np.nan)
        return values.mean(0), nowhere, nowhere
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975], axis=0)
    return values.mean(0), low, high


def load(path: Path) -> dict[str, Any]:
    """RUN/temporal.json.

    Raises:
        UserError: it is not there, or damaged.
    """
    file = path / FILE
    if not file.is_file():
        raise UserError(f"{path}: no {FILE} in it; make it with python -m swift.series {path} SCAN...")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["scans"]
        assert all(set(scan["layers"]) >= {"bold"} for scan in found["scans"])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{file}: damaged ({error})") from error
    content: dict[str, Any] = found
    return content


def rows(content: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """One row a layer and condition: means over scans with intervals. "acf" is that at the first lag.

    "distance" is the mean absolute difference of a layer's autocorrelation from that of the BOLD signal in the same
    condition, over lags 1 to L of the coarser of both, scan by scan.
    """
    found = []
    scans = content["scans"]
    for layer in scans[0]["layers"]:
        for condition in CONDITIONS:
            row: dict[str, Any] = {"layer": layer, "condition": condition, "scans": len(scans)}
            entries = [scan["layers"][layer][condition] for scan in scans]
            numbers = {
                "acf1": np.array([entry["acf"][1] for entry in entries]),
                "slope": np.array([entry["slope"] for entry in entries]),
                "hurst": np.array([entry["hurst"] for entry in entries]),
                "distance": np.array([distance(scan, layer, condition) for scan in scans]),
            }
            for name, values in numbers.items():
                mean, low, high = bootstrap(values, seed)
                row[name] = {"value": float(mean), "interval": [finite(float(low)), finite(float(high))]}
            found.append(row)
    return found


def distance(scan: dict[str, Any], layer: str, condition: str) -> float:
    """Mean absolute difference of two autocorrelations, BOLD's read off at the layer's lags."""
    own, bold = scan["layers"][layer], scan["layers"]["bold"]
    lag = np.arange(1, len(own[condition]["acf"])) * own["seconds"]
    reference = np.arange(len(bold[condition]["acf"])) * bold["seconds"]
    lag = lag[lag <= reference[-1] + 1e-9]
    wanted = np.interp(lag, reference, bold[condition]["acf"])
    return float(np.mean(np.abs(np.array(own[condition]["acf"])[1 : len(lag) + 1] - wanted)))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The rows as text, one block for each run."""

    def cell(entry: dict[str, Any]) -> str:
        low, high = entry["interval"]
        if low is None:
            return f"{entry['value']:+.3f} (too few scans)"
        return f"{entry['value']:+.3f} [{low:+.3f}, {high:+.3f}]"

    lines = []
    for name, entries in found.items():
        lines += [f"{name} ({entries[0]['scans']} scans; brackets: 95 % over scans)"]
        head = ("lag 1", "spectrum slope", "Hurst", "distance from BOLD")
        lines.append(f"  {'layer':<8} {'frames':<9}" + "".join(f"{text:>26}" for text in head))
        for row in entries:
            cells = "".join(f"{cell(row[key]):>26}" for key in ("acf1", "slope", "hurst", "distance"))
            lines.append(f"  {row['layer']:<8} {row['condition']:<9}{cells}")
    return "\n".join(lines)


def mean_acf(content: dict[str, Any], layer: str, condition: str) -> tuple[Array, Array, Array, Array]:
    """Seconds of the lags, mean autocorrelation over scans, and its interval."""
    entries: Sequence[dict[str, Any]] = [scan["layers"][layer] for scan in content["scans"]]
    values = np.array([entry[condition]["acf"] for entry in entries])
    mean, low, high = bootstrap(values)
    return np.arange(values.shape[1]) * entries[0]["seconds"], mean, low, high

"""Autocorrelation against statsmodels, Hurst exponent of exact fractional noise, slopes of known spectra."""

from __future__ import annotations

import json

import numpy as np
import pytest
from statsmodels.tsa.stattools import acf as reference_acf

from swift.report import __main__ as report
from swift.report.temporal import acf, bootstrap, describe, hurst, mean_acf, spectrum_slope
from swift.utils.errors import UserError


def fractional_noise(hurst_exponent: float, steps: int, series: int, seed: int) -> np.ndarray:
    """(T, K) exact fractional Gaussian noise of unit variance, by circulant embedding (Davies and Harte 1987)."""
    lag = np.arange(steps + 1, dtype=np.float64)
    power = 2 * hurst_exponent
    covariance = 0.5 * ((lag + 1) ** power - 2 * lag**power + np.abs(lag - 1) ** power)
    circle = np.concatenate([covariance, covariance[-2:0:-1]])
    eigenvalues = np.maximum(np.fft.fft(circle).real, 0.0)
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((len(circle), series)) + 1j * generator.standard_normal((len(circle), series))
    found: np.ndarray = np.fft.fft(np.sqrt(eigenvalues / len(circle))[:, None] * noise, axis=0).real[:steps]
    return found


@pytest.mark.parametrize("steps", [30, 31, 200, 257])
def test_autocorrelation_equals_statsmodels(steps):
    series = np.random.default_rng(steps).standard_normal((steps, 5)).cumsum(0)
    ours = acf(series, 20)
    for column in range(5):
        for fft in (True, False):
            wanted = reference_acf(series[:, column], nlags=20, fft=fft, adjusted=False)
            np.testing.assert_allclose(ours[:, column], wanted, rtol=0, atol=1e-10)


def test_a_constant_series_has_no_autocorrelation():
    series = np.stack([np.full(50, 3.0), np.arange(50.0)], 1)
    assert np.isnan(acf(series, 5)[:, 0]).all()
    assert np.isfinite(acf(series, 5)[:, 1]).all()
    assert np.isnan(hurst(series)[0])


@pytest.mark.parametrize("truth", [0.3, 0.5, 0.7, 0.9])
def test_hurst_exponent_of_fractional_noise(truth):
    long = hurst(fractional_noise(truth, 1200, 30, seed=1))
    assert np.all(np.abs(long - truth) < 0.1)
    assert abs(long.mean() - truth) < 0.01
    assert np.mean(np.abs(long - truth) < 0.05) > 0.9
    short = hurst(fractional_noise(truth, 300, 100, seed=2))
    assert abs(short.mean() - truth) < 0.02


def test_fractional_noise_has_the_covariance_it_should():
    noise = fractional_noise(0.8, 400, 400, seed=0)
    products = (noise[:-1] * noise[1:]).mean()
    assert (noise**2).mean() == pytest.approx(1, abs=0.05)
    assert products == pytest.approx(0.5 * (2**1.6 - 2), abs=0.05)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_slope_of_a_power_law_spectrum(beta):
    generator = np.random.default_rng(3)
    steps, series = 1024, 40
    frequency = np.fft.rfftfreq(steps)
    frequency[0] = np.inf
    phases = np.exp(2j * np.pi * generator.random((len(frequency), series)))
    noise = np.fft.irfft(frequency[:, None] ** (-beta / 2) * phases, steps, axis=0)
    assert spectrum_slope(noise, 2.0).mean() == pytest.approx(-beta, abs=0.15)


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).standard_normal((400, 1))
    mean, low, high = bootstrap(values)
    assert mean[0] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert low[0] == pytest.approx(mean[0] - half, abs=0.02)
    assert high[0] == pytest.approx(mean[0] + half, abs=0.02)


@pytest.fixture
def run(tmp_path):
    """Two layers over four scans; stage1 has two frames a step and follows BOLD, stage2 is white."""
    path = tmp_path / "rope"
    path.mkdir()
    (path / "config.yaml").write_text("model: {position: rope}\n")
    scans = []
    for seed in range(4):
        bold = fractional_noise(0.9, 400, 20, seed)
        white = fractional_noise(0.5, 400, 20, seed + 10)
        layers = {
            "bold": {"seconds": 2.0, "ordered": describe(bold, 2.0, 20), "shuffled": describe(white, 2.0, 20)},
            "stage1": {"seconds": 4.0, "ordered": describe(bold[::2], 4.0, 10), "shuffled": describe(white, 4.0, 10)},
            "stage2": {"seconds": 2.0, "ordered": describe(white, 2.0, 20), "shuffled": describe(white, 2.0, 20)},
        }
        scans.append({"scan": f"s{seed}", "subject": f"s{seed}", "frames": 400, "tr": 2.0, "layers": layers})
    (path / "temporal.json").write_text(json.dumps({"clip_seconds": 40.0, "scans": scans}))
    return path


def test_the_report_compares_layers_with_bold(run, tmp_path, capsys):
    assert report.main(["temporal", str(run), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = {(row["layer"], row["condition"]): row for row in json.loads(capsys.readouterr().out)["rope"]}
    assert len(found) == 6
    assert found["bold", "ordered"]["distance"]["value"] == 0
    assert found["bold", "ordered"]["hurst"]["value"] == pytest.approx(0.9, abs=0.04)
    near, far = (found[layer, "ordered"]["distance"] for layer in ("stage1", "stage2"))
    assert near["value"] < 0.1 < far["value"]
    assert far["interval"][0] < far["value"] < far["interval"][1]
    assert (tmp_path / "out" / "temporal.png").stat().st_size > 5000
    content = json.loads((run / "temporal.json").read_text())
    seconds, mean, low, high = mean_acf(content, "stage1", "ordered")
    assert seconds.tolist() == [4.0 * lag for lag in range(11)]
    assert np.all((low <= mean) & (mean <= high))
    assert report.main(["temporal", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "distance from BOLD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "no temporal.json in it; make it with python -m swift.series"),
        (lambda file: file.write_text("{"), "damaged"),
        (lambda file: file.write_text('{"scans": []}'), "damaged"),
    ],
)
def test_mistakes_are_one_line(run, capsys, change, message):
    change(run / "temporal.json")
    assert report.main(["temporal", str(run)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1


def test_too_short_series_are_refused():
    series = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.raises(UserError, match="needs at least 33"):
        acf(series, 32)
    with pytest.raises(UserError, match="needs at least 32"):
        hurst(series)
    with pytest.raises(UserError, match="resolve 1 frequencies"):
        spectrum_slope(series, 2.0, (0.01, 0.03))

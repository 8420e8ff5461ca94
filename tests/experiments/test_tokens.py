"""The tables of experiments/tokens/probe.py on planted results whose answers are known."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.scripts import load

SUBJECTS = [f"s{number:02d}" for number in range(12)]
TARGET = [number % 2 for number in range(12)]


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return load("tokens/probe.py")


def row(name: str, seed: int, score: list[float], value: list[float], error: float) -> dict[str, Any]:
    """A kept training: the same scores in both probes of the label, a number, and an error that all subjects have."""
    label = {subject: [float(t), s] for subject, t, s in zip(SUBJECTS, TARGET, score)}
    number = {subject: [float(place), v] for place, (subject, v) in enumerate(zip(SUBJECTS, value))}
    sums = {subject: [error * (place + 1), place + 1] for place, subject in enumerate(SUBJECTS)}
    about = {"name": name, "seed": seed, "seconds": 60, "steps": 100 + seed}
    return (
        about
        | {"linear, label": label, "full, label": label, "linear, number": number}
        | {
            "patches": sums,
            "tubes": sums,
        }
    )


def auroc(target: np.ndarray, score: np.ndarray) -> float:
    """Share of pairs of different labels that are in order; ties half."""
    pairs = [
        1.0 if b > a else 0.5 if b == a else 0.0
        for a, t in zip(score, target)
        for b, u in zip(score, target)
        if t == 0 and u == 1
    ]
    return float(np.mean(pairs))


def test_figures_are_those_of_each_resample_and_the_mean_of_seeds(probe: ModuleType) -> None:
    rng = np.random.default_rng(0)
    score, value = rng.random(12), rng.random(12)
    rows = [row("a", 0, score.tolist(), value.tolist(), 0.5), row("a", 1, score[::-1].tolist(), value.tolist(), 0.7)]
    assert probe.drawn(rows, "patches") == pytest.approx(0.6)
    assert probe.drawn(rows[:1], "linear, number")[0] == pytest.approx(np.corrcoef(np.arange(12), value)[0, 1])
    found = probe.drawn(rows, "full, label")
    target = np.array(TARGET)
    weights = next(probe.draw_weights(np.arange(12), 0, probe.DRAWS)).astype(int)
    for place, times in enumerate(weights[:20], start=1):
        some = np.repeat(np.arange(12), times)
        if len(set(target[some])) == 2:
            expected = np.mean([auroc(target[some], one[some]) for one in (score, score[::-1])])
            assert found[place] == pytest.approx(expected)
    assert found[0] == pytest.approx(np.mean([auroc(target, score), auroc(target, score[::-1])]))


def test_tables_of_planted_results(probe: ModuleType) -> None:
    """One setting knows the label, the other says its opposite; of the rest nothing varies."""
    right, wrong = [float(t) for t in TARGET], [1.0 - t for t in TARGET]
    number = [float(n) for n in range(12)]
    first, second = probe.PAIRS[0]
    lines = probe.tables([row(first, 0, right, number, 0.5), row(second, 0, wrong, number[::-1], 0.6)])
    sure, half, six = "1.000 [1.000, 1.000]", "0.500 [0.500, 0.500]", "0.600 [0.600, 0.600]"
    none, minus = "0.000 [0.000, 0.000]", "-1.000 [-1.000, -1.000]"
    assert f"| {first} | 60 | 1 | 100 | {sure} | {sure} | {sure} | {half} | {half} |" in lines
    assert f"| {second} | 60 | 1 | 100 | {none} | {minus} | {none} | {six} | {six} |" in lines
    apart, error = "+1.000 [+1.000, +1.000]", "-0.100 [-0.100, -0.100]"
    assert lines[-1] == (f"| {first} - {second} | {apart} | +2.000 [+2.000, +2.000] | {apart} | {error} | {error} |")


def test_what_is_kept_is_not_trained_again(
    probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "RESULTS", tmp_path / "probe.jsonl")
    monkeypatch.setattr(probe, "HERE", tmp_path)
    monkeypatch.setattr(probe, "make_cohort", lambda out: None)
    made: list[tuple[str, int]] = []
    score = [0.25] * 6 + [0.75] * 6

    def point(out: Path, name: str, seed: int, seconds: float) -> dict[str, Any]:
        made.append((name, seed))
        return row(name, seed, score, score, 0.5)

    monkeypatch.setattr(probe, "point", point)
    names = list(probe.PAIRS[0])
    for seeds in (["0"], ["0", "1"]):
        monkeypatch.setattr("sys.argv", ["probe.py", "--out", str(tmp_path), "--seeds", *seeds, "--only", *names])
        probe.main()
    assert sorted(made) == sorted((name, seed) for name in names for seed in (0, 1))
    assert (tmp_path / "probe.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "probe.png").stat().st_size > 1000

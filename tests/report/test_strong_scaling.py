"""Strong scaling from run directories: figures by hand, what is refused, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from swift.report.__main__ import main
from swift.report.figures.strong_scaling import draw
from swift.report.strong_scaling import interval, medians, rows

PHASES = {"data": 0.1, "compute": 0.5, "communication": 0.3, "other": 0.1}


def write(
    run: Path,
    nodes: int,
    rates: list[float],
    clips: int = 32,
    devices: int = 8,
    model: str = "tiny",
    done: bool = True,
    same: bool = False,
) -> str:
    """A run with these clips/s in its logged intervals."""
    run.mkdir(parents=True)
    settings = {"model": {"name": model}, "parallel": {"nodes": nodes, "devices": devices}}
    settings["data"] = {"repeat_batch": same}
    (run / "config.yaml").write_text(json.dumps(settings))
    lines = [{"perf/clips_per_second": rate, "perf/step_seconds": clips / rate} for rate in rates]
    lines.append({f"perf/phase_{name}": part for name, part in PHASES.items()} | {"perf/phase_straggler": 0.2})
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i} | line) + "\n" for i, line in enumerate(lines)))
    if done:
        (run / "summary.json").write_text('{"val_l1": 1.0}')
    return str(run)


def test_rows_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first interval is warm-up; the median of the others counts."""
    runs = [write(tmp_path / "b", 4, [1, 48, 64, 80]), write(tmp_path / "a", 1, [1, 20, 19, 21])]
    assert main(["strong_scaling", "--json", *runs]) == 0
    one, four = json.loads(capsys.readouterr().out)
    assert (one["run"], one["nodes"], one["ranks"], one["clips_per_step"]) == ("a", 1, 8, 32)
    assert (one["clips_per_second"], one["efficiency"]) == (20.0, 1.0)
    assert (four["nodes"], four["ranks"], four["clips_per_second"], four["step_seconds"]) == (4, 32, 64.0, 0.5)
    assert four["efficiency"] == pytest.approx(64 / 80)
    assert four["seconds"] == pytest.approx({"data": 0.05, "compute": 0.25, "communication": 0.15, "other": 0.05})
    assert four["straggler"] == pytest.approx(0.1)


def test_what_input_costs_is_the_difference_to_the_run_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write(tmp_path / "a", 1, [1, 20]), write(tmp_path / "b", 4, [1, 64, 64])]
    bare = write(tmp_path / "c", 4, [1, 80, 80, 80], same=True)
    assert main(["strong_scaling", "--json", *runs, bare]) == 0
    one, four = json.loads(capsys.readouterr().out)
    assert (one["input"], four["run"]) == (None, "b")
    assert four["input"] == pytest.approx(32 / 64 - 32 / 80)
    assert main(["strong_scaling", *runs, bare]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("100.0 [100.0, 100.0] (20%)")
    assert main(["strong_scaling", bare]) == 2
    assert "all of these runs are without input" in capsys.readouterr().err


def test_the_interval_of_what_input_costs_is_that_of_two_medians() -> None:
    """Step times with a known sampling error of the median: 1.2533 SD / sqrt(n) each, both independent."""
    generator = np.random.default_rng(3)
    slow, fast = 1.0 + 0.1 * generator.standard_normal(400), 0.9 + 0.1 * generator.standard_normal(400)
    low, high = interval(medians(slow, 0) - medians(fast, 1))
    error = 1.2533 * 0.1 / 20 * 2**0.5
    assert low < np.median(slow) - np.median(fast) < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_the_figure_shows_steps_with_and_without_input(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a", 1, [1, 20, 20]), write(tmp_path / "b", 4, [1, 64, 64])]
    bare = [write(tmp_path / "c", 4, [1, 80, 80], same=True)]
    found, _ = rows([Path(run) for run in (*runs, *bare)])
    rate, parts = draw(found, tmp_path / "figure.png").axes
    np.testing.assert_allclose(rate.lines[1].get_ydata(), [20, 64])
    heights = np.array([[bar.get_height() for bar in group] for group in parts.containers[:4]])
    np.testing.assert_allclose(heights.sum(0), [1e3 * 8 / 20, 1e3 * 32 / 64])
    line = next(line for line in parts.lines if line.get_marker() == "_" and len(line.get_xdata()) == 1)
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (1, pytest.approx(1e3 * 32 / 80))


def test_the_table_and_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "sweep" / "1", 1, [10, 10])
    write(tmp_path / "sweep" / "2", 2, [16, 16])
    write(tmp_path / "sweep" / "3", 4, [30, 30], done=False)
    figure = tmp_path / "figure.png"
    assert main(["strong_scaling", str(tmp_path / "sweep"), "--out", str(figure)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[2].split()[:6] == ["2", "16", "32", "16.00", "80.0%", "2000.0"]
    assert "600.0 (30%)" in said.out
    assert said.out.splitlines()[-1].startswith("strong scaling")
    assert f"left out: {tmp_path}/sweep/3 is not finished" in said.err
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_weak_scaling_and_runs_without_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / str(n), n, [8.0 * n, 8.0 * n], clips=8 * n) for n in (1, 2)]
    for run in runs:
        metrics = Path(run) / "metrics.jsonl"
        metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines() if "phase" not in line))
    assert main(["strong_scaling", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["2", "16", "16", "16.00", "100.0%", "1000.0", "-", "-", "-", "-", "-", "-"]
    assert lines[-1].startswith("weak scaling")


def test_what_is_no_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", 1, [1, 2])
    cases = {
        "one and same both have 1 nodes": [one, write(tmp_path / "same", 1, [1, 2])],
        "model.name is tiny in one and 3b in big": [one, write(tmp_path / "big", 2, [1, 2], model="3b")],
        "no perf/clips_per_second in it": [write(tmp_path / "short", 1, [])],
        "none of these runs is finished": [write(tmp_path / "open", 1, [1], done=False)],
    }
    for message, runs in cases.items():
        assert main(["strong_scaling", *runs]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.count("\n") == 1

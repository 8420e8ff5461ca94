"""The figure of a run's speed: its curves are the run's numbers, and it leaves out what was not measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from swift.report.figures.performance import performance
from swift.utils.errors import UserError


def write_run(path, extra=()):
    path.mkdir()
    lines = [{"step": 1, "train/loss": 1.0}]
    for step in (10, 20, 30):
        lines.append({"step": step, "perf/clips_per_second": 2.0 * step, "perf/tflops": 1.0, "perf/data_wait": 0.25})
        lines.append({"step": step, "mon/host_rss_gib": 3.0, "mon/cpu_percent": 150.0} | dict(extra))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def curve(fig, name):
    return next(line for ax in fig.axes for line in ax.lines if line.get_gid() == name)


def test_curves_are_the_numbers_of_the_run(tmp_path):
    run = write_run(
        tmp_path / "run",
        {
            "perf/mfu": 0.4,
            "perf/save_stall_seconds": 0.08,
            "mon/device_busy": 93.0,
            "mon/device_peak_gib": 50.0,
        }.items(),
    )
    fig = performance(run, run / "figures" / "performance.png")
    np.testing.assert_array_equal(curve(fig, "all ranks").get_xdata(), [10, 20, 30])
    np.testing.assert_allclose(curve(fig, "all ranks").get_ydata(), [20, 40, 60])
    np.testing.assert_allclose(curve(fig, "MFU").get_ydata(), 40.0)
    np.testing.assert_allclose(curve(fig, "waiting for data").get_ydata(), 25.0)
    np.testing.assert_allclose(curve(fig, "training stands still").get_ydata(), 80.0)
    np.testing.assert_allclose(curve(fig, "device busy").get_ydata(), 93.0)
    assert [ax.get_ylabel() for ax in fig.axes][-1] == "CPU, % of a core"
    with Image.open(run / "figures" / "performance.png") as picture:
        assert picture.width == 900
    assert (run / "figures" / "performance.png").stat().st_size < 100_000


def test_what_was_not_measured_is_left_out(tmp_path):
    fig = performance(write_run(tmp_path / "run"), None)
    names = [line.get_gid() for ax in fig.axes for line in ax.lines]
    assert names == ["all ranks", "model FLOPs", "waiting for data", "host, with workers", "rank 0 with workers"]


def test_a_run_without_speed_is_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    with pytest.raises(UserError, match=r"no perf/clips_per_second in it"):
        performance(tmp_path / "run", None)

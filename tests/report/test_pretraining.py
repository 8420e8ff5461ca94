"""python -m swift.report pretraining: curves against what was seen, restarts, notes, mistakes."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from swift.report import __main__ as report
from swift.report.figures.pretraining import AXES, draw
from swift.report.points import point
from tests.report.studies import assert_one_line, write_point


def lines(ax):
    return {line.get_gid(): line for line in ax.lines}


def test_curves_show_the_metrics_on_every_axis(tmp_path):
    points = [
        point(write_point(tmp_path / "small", 1000, 40, 0.5)),
        point(write_point(tmp_path / "large", 9000, 80, 0.4, restarts=(20, 50), batch=2, tokens=50, flops=1e9)),
    ]
    fig = draw(points, list(AXES), None)
    factors = {"steps": 1, "clips": 4, "tokens": 200, "flops": 4e9}
    for ax, axis in zip(fig.axes, AXES, strict=True):
        assert ax.get_xlabel() == AXES[axis]
        curve = lines(ax)["large points"]
        np.testing.assert_allclose(curve.get_xdata(), np.arange(10, 81, 10) * factors[axis])
        np.testing.assert_allclose(curve.get_ydata(), 0.4 + 5 / np.arange(10, 81, 10))
        assert lines(ax)["large val"].get_ydata()[-1] == 0.4
        at = [line.get_xdata()[0] for line in ax.lines if line.get_gid() == "large restart"]
        np.testing.assert_allclose(at, [20 * factors[axis], 50 * factors[axis]])
    assert "SD of each voxel" in fig.axes[0].get_ylabel()


def test_command_table_and_notes(tmp_path, capsys):
    runs = tmp_path / "runs"
    write_point(runs / "a", 1000, 40, 0.5, restarts=(10,))
    write_point(runs / "b", 1000, 20, 0.6, max_steps=40, settings={"model": {"patch_size": [6, 6, 6, 2]}})
    assert report.main(["pretraining", str(runs), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "b is not finished (20 of 40 steps): dashed" in said.err
    assert "model.patch_size is [6, 6, 6, 1] in a and [6, 6, 6, 2] in b: tokens and losses" in said.err
    with (tmp_path / "out" / "pretraining.csv").open() as stream:
        first, second = csv.DictReader(stream)
    assert (first["run"], first["tokens"], first["restarts"], first["finished"]) == ("a", "32000", "1", "True")
    assert (second["finished"], second["val_l1"]) == ("False", "0.6")
    assert (tmp_path / "out" / "pretraining.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n'),
            "no perf/clips_per_second",
        ),
        (lambda run: (run / "provenance.json").write_text("{"), "damaged"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, damage, message):
    run = write_point(tmp_path / "a")
    damage(run)
    assert_one_line(capsys, message, "pretraining", run, "--out", tmp_path)

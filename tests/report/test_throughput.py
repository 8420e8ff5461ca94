"""python -m swift.report throughput: measured points beside the plan; mistakes."""

from __future__ import annotations

import csv
import json

import pytest

from swift.report import __main__ as report
from swift.report.throughput import load, rows
from tests.report.studies import assert_one_line


def write_measured(path, frames=10, parameters=1000, step=0.5, planned=None, **more):
    path.mkdir(parents=True)
    point = {
        "device": "CPU",
        "model": "tiny",
        "variant": "joint",
        "frames": frames,
        "batch": 2,
        "parameters": parameters,
    }
    point |= {"flops_per_clip": 2e9, "step_seconds": [step, 9.0, step], "forward_seconds": [0.1], "peak_bytes": 3 << 20}
    point |= {"plan": {"bytes": 2 << 20, "step_seconds": planned}}
    (path / "throughput.json").write_text(json.dumps(point | more))
    return path


def test_rows_are_medians_beside_the_plan(tmp_path, capsys):
    write_measured(tmp_path / "runs" / "b", parameters=2000, planned=0.25)
    write_measured(tmp_path / "runs" / "a")
    first, second = rows(load([tmp_path / "runs"]))
    assert (first["point"], second["point"]) == ("a", "b")
    assert (first["step_s"], first["step_low_s"], first["step_high_s"]) == (0.5, 0.5, 9.0)
    assert first["gflop_a_s"] == pytest.approx(8)
    assert (first["peak_mib"], first["planned_mib"], first["planned_step_s"]) == (3, 2, None)
    assert second["planned_step_s"] == 0.25
    assert report.main(["throughput", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "none is guessed" in capsys.readouterr().out
    with (tmp_path / "out" / "throughput.csv").open() as stream:
        assert [row["planned_step_s"] for row in csv.DictReader(stream)] == ["", "0.25"]
    assert (tmp_path / "out" / "throughput.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "throughput.json").unlink(), "no throughput.json in it"),
        (lambda path: (path / "throughput.json").write_text("{}"), "damaged"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, change, message):
    path = write_measured(tmp_path / "a")
    change(path)
    assert_one_line(capsys, message, "throughput", path, "--out", tmp_path)

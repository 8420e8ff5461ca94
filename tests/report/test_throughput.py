"""python -m swift.report throughput: measured points beside the plan; measuring itself; mistakes."""

from __future__ import annotations

import csv
import json

import pytest

from swift.plan.flops import model_flops
from swift.plan.geometry import build_geometry
from swift.report import __main__ as report
from swift.report.throughput import load, measure, rows
from tests.report.studies import assert_one_line
from tests.small import settings


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


def test_measuring_runs_the_model_of_the_settings():
    cfg = settings("trainer.accelerator=cpu", "data.batch_size=2")
    found = measure(cfg, rounds=2)
    geometry = build_geometry(cfg.model, (12, 12, 12, 8))
    assert found["flops_per_clip"] == model_flops(geometry).total
    assert found["parameters"] == geometry.total_parameters
    assert len(found["step_seconds"]) == 2
    assert min(found["step_seconds"]) > 0
    assert (found["device"], found["batch"], found["frames"]) == ("CPU", 2, 8)
    assert found["plan"]["bytes"] > 16 * geometry.total_parameters


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

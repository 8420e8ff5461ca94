"""The model of step time: planted parts, the published rows, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import swift
from swift.report import __main__ as report
from swift.report.scaling_model import Measured, fit_model, fit_parts, read_table
from swift.utils.errors import UserError
from tests.report.studies import write_point

PUBLISHED = Path(swift.__file__).resolve().parents[1] / "experiments" / "strong_scaling" / "published.csv"


def series(nodes, cost, waiting=None):
    nodes = np.asarray(nodes, dtype=float)
    return Measured("planted", nodes, nodes / cost, np.full(len(nodes), np.nan) if waiting is None else waiting)


def test_planted_parts_come_back():
    nodes = 2.0 ** np.arange(0, 9)
    cost = 0.04 * (1 + 0.2 * (nodes > 1) + 0.1 * np.log2(nodes) + 0.03 * (np.sqrt(nodes) - 1))
    parts = fit_parts(nodes, cost, 0.5)
    np.testing.assert_allclose(parts, 0.04 * np.array([1, 0.2, 0.1, 0.03]), rtol=1e-6)
    model = fit_model(series(nodes, cost), draws=10)
    np.testing.assert_allclose(model.rate(nodes), nodes / cost, rtol=0.03)
    assert model.rate(np.array([1024.0]))[0] == pytest.approx(1024 / (0.04 * (1 + 0.2 + 1 + 0.03 * 31)), rel=0.1)
    total = sum(model.shares(nodes).values())
    np.testing.assert_allclose(total, cost, rtol=0.05)


def test_one_spoiled_point_does_not_move_the_rest():
    nodes = 2.0 ** np.arange(0, 9)
    cost = 0.04 * (1 + 0.1 * np.log2(nodes))
    cost[4] *= 1.6
    model = fit_model(series(nodes, cost), draws=10)
    keep = np.arange(9) != 4
    np.testing.assert_allclose(model.rate(nodes)[keep], (nodes / cost)[keep], rtol=0.03)


def test_waiting_for_data_is_a_part_of_its_own():
    nodes = np.array([1.0, 2, 4, 8])
    compute, data = 0.1 * (1 + 0.1 * np.log2(nodes)), 0.01 + 0.005 * (nodes - 1)
    model = fit_model(series(nodes, compute + data, data / (compute + data)), draws=10)
    np.testing.assert_allclose(model.data, [0.01, 0.005], rtol=1e-6)
    np.testing.assert_allclose(model.rate(nodes), nodes / (compute + data), rtol=0.01)
    np.testing.assert_allclose(model.shares(nodes)["data"], data, rtol=1e-6)


def test_aurora_up_to_64_nodes_predicts_256_and_512_within_15_percent():
    aurora = next(points for points in read_table(PUBLISHED) if points.name == "Aurora")
    model = fit_model(aurora.part(aurora.nodes <= 64), draws=20)
    later = aurora.nodes > 64
    error = model.rate(aurora.nodes[later]) / aurora.rate[later] - 1
    assert aurora.nodes[later].tolist() == [256, 512]
    assert np.all(np.abs(error) < 0.15), error


@pytest.mark.slow
def test_published_rows_as_a_command(tmp_path, capsys):
    given = ["scaling_model", "--table", str(PUBLISHED), "--out", str(tmp_path), "--json"]
    assert report.main([*given, "--fit-up-to", "Aurora=64", "Frontier=256", "--predict", "4096"]) == 0
    aurora, frontier = json.loads(capsys.readouterr().out)
    assert [row["nodes"] for row in aurora["rows"] if row["fitted"]] == [1, 4, 16, 64]
    assert [row["nodes"] for row in frontier["rows"] if not row["fitted"]] == [512, 1024, 2048, 4096]
    assert aurora["rows"][5]["efficiency"] == pytest.approx(4251.88 / 512 / 27.44)
    assert frontier["rows"][-1]["measured"] is None
    for row in frontier["rows"]:
        assert row["interval"][0] < row["interval"][1]
    assert (tmp_path / "scaling_model.png").stat().st_size > 5000


def test_runs_of_a_sweep_over_ranks(tmp_path, capsys):
    for devices in (1, 2, 4):
        path = tmp_path / "sweep" / f"d{devices}"
        write_point(path, batch=3 * devices, settings={"parallel": {"devices": devices}})
    write_point(tmp_path / "sweep" / "d8", max_steps=80, settings={"parallel": {"devices": 8}})
    assert report.main(["scaling_model", str(tmp_path / "sweep"), "--out", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert "d8 is not finished" in said.err
    (found,) = json.loads(said.out)
    assert found["series"] == "ranks of one machine"
    assert [row["nodes"] for row in found["rows"]] == [1, 2, 4]
    assert [row["efficiency"] for row in found["rows"]] == pytest.approx([1, 1, 1])
    assert found["node_seconds_a_clip"]["data"] == pytest.approx([0.1 / 24] * 3, rel=1e-3)


def rows(path, nodes, column="nodes"):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([[column, "clips_per_second"], *([n, 10 * n] for n in nodes)])
    return path


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([4], "a single point says nothing"),
        ([1, 2], "2 node counts; a model of step time needs at least three"),
        ([1, 4, 2], "node counts must increase, but 2 follows 4"),
        ([1, 4, 4], "node counts must increase, but 4 follows 4"),
        ([-1, 4, 8], "at least 1"),
        ([], "no rows"),
        (["x"], "line 2"),
    ],
)
def test_tables_that_are_no_series(tmp_path, capsys, nodes, message):
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["nodes", "clips_per_second"], *([n, 10] for n in nodes)])
    assert report.main(["scaling_model", "--table", str(table), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1


def test_other_mistakes(tmp_path, capsys):
    table = rows(tmp_path / "t.csv", [1, 2, 4])
    for given, message in (
        ([], "give run directories or --table"),
        (["--table", str(tmp_path / "none.csv")], "cannot be read"),
        (["--table", str(rows(tmp_path / "u.csv", [1, 2, 4], "n"))], "no column nodes"),
        (["--table", str(table), "--fit-up-to", "x"], "must be N or SERIES=N"),
        (["--table", str(table), "--fit-up-to", "Summit=64"], "no such series; there are t"),
    ):
        assert report.main(["scaling_model", *given, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="above 0"):
        fit_model(series([1, 2, 4], np.array([1.0, -1.0, 1.0])))

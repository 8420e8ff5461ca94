"""The benchmark itself: runs small, reads the same clips in every way, and says so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.bench import data as bench_data

SMALL = ["--grid", "24", "--scans", "2", "--frames", "12", "--clip", "4", "--rounds", "1", "--seconds", "0.02"]


def test_small_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_data.main([*SMALL, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["largest_difference"] < 0.01  # float16 of values up to 5
    voxels = np.mean([bench_data.brain((24, 24, 24), number).sum() for number in range(2)])
    assert figures["clip_mb"] == {"packed": pytest.approx(8e-6 * voxels), "dense": pytest.approx(8e-6 * 24**3)}
    rows = {row["name"]: row for row in figures["rows"]}
    assert list(rows) == list(bench_data.Bench.WAYS)
    for row in rows.values():
        assert row["packed_gb_s"] == pytest.approx(figures["clip_mb"]["packed"] / row["ms_per_clip"])
        assert row["dense_gb_s"] == pytest.approx(figures["clip_mb"]["dense"] / row["ms_per_clip"])
    ratio = rows["gzip HDF5"]["ms_per_clip"] / rows["loader"]["ms_per_clip"]
    assert figures["aims"]["loader / gzip HDF5"] == {"reached": pytest.approx(ratio), "wanted": 20.0}


def test_best_of_rounds_and_aims() -> None:
    rows = [bench_data.Row(name, ms, ms, 1.0, 1.0) for name, ms in zip(bench_data.Bench.WAYS, range(2, 11))]
    aims = bench_data.judge(rows)
    assert aims["clip read / raw pread"] == (pytest.approx(2 / 3), 0.9)
    assert aims["loader / raw pread"] == (pytest.approx(2 / 6), 0.6)

"""python -m swift.report ablation: z-scores against a second way, what is ranked, mistakes."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest
from scipy.stats import zscore

from swift.report import __main__ as report
from swift.report.ablation import effects, rank, skill
from swift.report.points import point
from tests.report.studies import write_point

RATIOS, KINDS = (0.4, 0.6, 0.8), ("random", "tube")


@pytest.fixture
def runs(tmp_path):
    """The loss rises with the ratio, but so does that of the best baseline, faster; the probe likes tubes."""
    folder = tmp_path / "runs"
    for ratio, kind in itertools.product(RATIOS, KINDS):
        best = 0.5 + 0.4 * ratio
        loss = best * (1 - 0.2 * ratio) - (0.01 if kind == "tube" else 0.0)
        path = folder / f"{ratio}-{kind}"
        task = {"mask_ratio": ratio, "mask_kind": kind}
        baselines = {"mean": best + 0.1, "line": best}
        write_point(path, loss=loss, settings={"task": task}, summary={"baselines": baselines})
        (path / "probe.json").write_text(json.dumps({"scores": {"probe": 0.6 if kind == "tube" else 0.5}}))
    return folder


def test_rank_is_the_sum_of_z_scores(runs):
    points = [point(path) for path in sorted(runs.iterdir())]
    rows = rank(points)
    table = np.array([[skill(p), 0.6 if "tube" in p.name else 0.5] for p in points])
    sums = zscore(table, axis=0, ddof=1).sum(1)
    order = np.argsort(-sums)
    assert [row["run"] for row in rows] == [points[i].name for i in order]
    np.testing.assert_allclose([row["sum_z"] for row in rows], sums[order])
    assert rows[0]["settings"] == {"task.mask_kind": "tube", "task.mask_ratio": "0.8"}
    # The lowest raw loss is that of the easiest problem, and does not win.
    assert min(rows, key=lambda row: row["val_l1"])["settings"]["task.mask_ratio"] == "0.4"
    found = effects(rows)["task.mask_kind"]
    assert found["tube"][1] == 3
    assert found["tube"][0] == pytest.approx(-found["random"][0])


def test_command(runs, tmp_path, capsys):
    write_point(runs / "stopped", 1000, 20, max_steps=40)
    assert report.main(["ablation", str(runs), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "stopped is not finished (20 of 40 steps)" in said.err
    assert "mean sum of z by value:" in said.out
    with (tmp_path / "out" / "ablation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    assert float(rows[0]["sum_z"]) == pytest.approx(float(rows[0]["z skill"]) + float(rows[0]["z probe"]), abs=1e-4)
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: [(p / "summary.json").unlink() for p in list(runs.iterdir())[1:]], "1 finished run: a ranking"),
        (lambda runs: next(runs.iterdir()).joinpath("probe.json").unlink(), "every run needs every score"),
        (lambda runs: next(runs.iterdir()).joinpath("probe.json").write_text("{}"), "damaged"),
        (lambda runs: [(p / "config.yaml").write_text("{}") for p in runs.iterdir()], "runs of the same settings"),
        (lambda runs: write_point(runs / "x", summary={"baselines": {}}), "no baselines"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, change, message):
    change(runs)
    assert report.main(["ablation", str(runs), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""

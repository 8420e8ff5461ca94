"""Fine-tuned runs and folders of baselines in the reports: their own score, unit and axis, and nothing false said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift.cluster import status
from swift.evaluate.downstream import Cell
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import interval_text, judge
from swift.report import __main__ as report
from swift.report.figures.loss import loss_curve
from swift.report.points import finished_points, point
from swift.report.table1 import notes, numbers
from tests.report.studies import write_point

TASK = {"name": "sex", "target": {"column": "sex"}, "select": "auroc", "loss": "cross_entropy"}


def predictions(people: int, seed: int = 0, sure: bool = False) -> Predictions:
    """Half of the people of each class; `sure`: perfectly told apart."""
    rng = np.random.default_rng(seed)
    target = np.arange(people) % 2
    p = np.where(target == 1, 0.9, 0.1) if sure else np.clip(0.3 + 0.4 * target + 0.3 * rng.normal(size=people), 0, 1)
    names = [f"s{i}" for i in range(people)]
    return Predictions("binary", ["F", "M"], names, [""] * people, [-1] * people, target, np.stack([1 - p, p], axis=1))


def write_task(path: Path, sure: bool = False) -> Path:
    """A fine-tuned run of 6 of 6 steps."""
    val, test = predictions(20, 1), predictions(8, 2, sure)
    judged = judge(val, test, draws=200)
    run = write_point(path, 1000, 40, 0.5, settings={"task": TASK}, summary={"task": "sex", **judged})
    content = json.loads((run / "summary.json").read_text())
    for name in ("val_l1", "baselines"):
        del content[name]
    (run / "summary.json").write_text(json.dumps(content | {"steps": 6}))
    lines: list[dict[str, Any]] = []
    speed = {"perf/step_seconds": 1.0, "perf/clips_per_second": 4.0, "perf/tokens_per_second": 4.0, "perf/tflops": 1.0}
    for step, auroc in ((2, 0.6), (4, 0.8), (6, 0.7)):
        lines += [{"step": step, "train/loss": 0.7, **speed}, {"step": step, "val/loss": 0.69, "val/auroc": auroc}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def write_baselines(folder: Path) -> Path:
    for name in ("constant", "nuisance"):
        summary = judge(predictions(20, 1), predictions(30, 2), draws=200) | {"method": name, "task": "sex"}
        (folder / name / "predictions").mkdir(parents=True)
        (folder / name / "predictions" / "test.csv").touch()
        (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_fine_tuned_run_has_its_own_score(tmp_path, capsys):
    run, other = write_task(tmp_path / "ft"), write_point(tmp_path / "pre")
    test = json.loads((run / "summary.json").read_text())["scores"]["test"]["auroc"]
    assert report.main([str(run), "--no-figures"]) == 0
    said = capsys.readouterr().out
    head, line = said.splitlines()
    assert "L1" not in head
    assert line.split()[:2] == ["ft", "sex"]
    interval = interval_text(json.loads((run / "summary.json").read_text()), "auroc")
    told = ["0.7000 cross entropy", "auroc", "0.8000", "4", f"{test:.4f}", interval]
    assert re.split("  +", line)[5:] == told
    assert report.main([str(run), str(other), "--no-figures", "--json"]) == 0
    task, pre = json.loads(capsys.readouterr().out)
    assert (task["val_score"], task["val_score_step"], task["test_score"]) == (0.8, 4, test)
    assert "val_l1" not in task
    assert (pre["val_l1"], "score" in pre) == (0.5, False)
    axis = loss_curve([run], None).axes[0].get_ylabel()
    assert axis == "cross entropy; validation: of the averaged predictions"
    assert "not comparable" in loss_curve([run, other], None).axes[0].get_ylabel()


def test_a_finished_task_is_finished_and_takes_no_part_in_laws(tmp_path):
    run, other = write_task(tmp_path / "ft"), write_point(tmp_path / "pre")
    assert point(run).finished  # also where patience ends it before max_steps: 6 of 40
    kept, left_out = finished_points([run, other])
    assert [p.name for p in kept] == ["pre"]
    assert left_out == [f"left out: {run} is fine-tuned on sex"]


def test_the_page_shows_tasks_and_baselines(tmp_path):
    runs = [write_task(tmp_path / name) for name in ("a", "b")]
    folder = write_baselines(tmp_path / "baselines")
    out = tmp_path / "page.html"
    assert report.main(["html", *map(str, runs), str(folder), "--out", str(out)]) == 0
    text = out.read_text()
    assert "Not finished" not in text
    assert "not finished" not in text
    assert "SD of each voxel" not in text
    assert "best val L1" not in text
    table = text.partition('id="runs"')[2].partition("</table>")[0]
    assert re.findall("<td[^>]*>(auroc|sex|0.8)</td>", table) == ["sex", "auroc", "0.8"] * 2
    section = text.partition("baselines</h2>")[2].partition("</section>")[0]
    assert re.findall("<h3>(.*?)</h3>", section) == ["constant, sex", "nuisance, sex"]
    wanted = judge(predictions(20, 1), predictions(30, 2), draws=200)
    assert interval_text(wanted, "auroc") in section
    assert f"{wanted['scores']['test']['auroc']:.5g}" in section


def test_baselines_are_no_run(tmp_path, capsys):
    folder = write_baselines(tmp_path / "baselines")
    assert report.main([str(folder)]) == 2
    assert "results of swift.baselines, not a run" in capsys.readouterr().err


def test_the_state_of_a_task_names_its_score(tmp_path):
    state = status.describe(write_task(tmp_path / "ft"), 0.0)
    assert (state.val, state.score) == (0.7, "auroc")
    assert "0.7000 auroc" in status.table([state])
    other = status.describe(write_point(tmp_path / "pre"), 0.0)
    assert (other.val, other.score) == (0.5, "l1")


def test_too_few_instead_of_a_point(tmp_path, capsys):
    run = write_task(tmp_path / "ft", sure=True)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["scores"]["test"]["auroc"] == 1
    assert summary["intervals"]["test"]["auroc"] == [None, None]
    low, high = summary["intervals"]["test"]["accuracy"]
    z = 1.959963984540054
    assert low == pytest.approx(8 / (8 + z**2))  # Wilson's of 8 of 8
    assert high == 1
    assert report.main([str(run), "--no-figures"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("1.0000  too few")
    constant = Predictions("binary", ["F", "M"], [f"s{i}" for i in range(8)], [""] * 8, [-1] * 8, np.arange(8) % 2,
                           np.full((8, 2), 0.5))  # fmt: skip
    judged = judge(constant, constant, draws=200)
    assert judged["intervals"]["test"]["auroc"] == [0.5, 0.5]  # certain, whoever is drawn
    assert judged["bootstrap"]["too_few"] == []


def test_a_cell_without_interval_says_too_few_and_one_random_encoder_is_said():
    one = Cell(1.0, 0.1, np.nan, np.nan, "subjects", 1, 1, 1, 20, 8)
    assert numbers(one) == ("1.000 ± 0.100", "(too few)")
    alone = notes({"sex": ("auroc", {"random weights, linear": one})})
    assert (
        "One random encoder only, so no band of its noise: random weights, linear. Repeat it with seed=1, 2, ..."
        in alone
    )
    several = notes(
        {"sex": ("auroc", {"random weights, linear": Cell(0.6, 0.1, 0.5, 0.7, "subjects", 3, 3, 1, 20, 8)})}
    )
    assert any(line.startswith("Random weights: ± is over random encoders") for line in several)

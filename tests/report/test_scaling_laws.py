"""python -m swift.report scaling_laws: runs to laws, figure and files; mistakes."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from swift.report import __main__ as report
from swift.report.figures.scaling_laws import draw
from swift.report.points import point
from swift.report.scaling_laws import fit_all, ladder
from tests.report.studies import write_point

SIZES, STEPS = (1_000, 8_000, 60_000, 400_000), (10, 40, 160, 640)


def truth(n, d):
    return 0.3 + 0.3 * (n / 1e3) ** -0.4 + 0.3 * (d / 8e3) ** -0.3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    for n, steps in itertools.product(SIZES, STEPS):
        # Eight clips a step of 100 tokens; FLOPs a clip 6 N x 100.
        write_point(folder / f"n{n}-s{steps}", n, steps, truth(n, steps * 800), flops=600.0 * n)
    return folder


def test_points_are_what_the_metrics_say(runs):
    found = point(runs / "n8000-s40")
    assert (found.parameters, found.steps, found.clips_per_step, found.tokens_per_clip) == (8000, 40, 8, 100)
    assert found.flops_per_clip == pytest.approx(600 * 8000)
    assert found.total("tokens") == 40 * 800
    assert found.total("flops") == pytest.approx(40 * 8 * 600 * 8000)
    assert found.finished


def test_laws_of_a_ladder_of_runs(runs, tmp_path, capsys):
    given = ["scaling_laws", str(runs), "--out", str(tmp_path), "--draws", "100", "--json"]
    assert report.main([*given, "--predict", "3e6,5e6", "--compute", "1e13"]) == 0
    found = json.loads(capsys.readouterr().out)
    joint = found["L(N, D) = E + A/N^a + B/D^b"]
    assert joint["a"]["value"] == pytest.approx(0.4, abs=2e-3)
    assert joint["b"]["value"] == pytest.approx(0.3, abs=2e-3)
    assert found["compute"]["kappa"] == pytest.approx(6, rel=1e-3)
    assert found["compute"]["gamma"] == pytest.approx(1, abs=1e-4)
    assert found["predicted"][0]["loss"]["value"] == pytest.approx(truth(3e6, 5e6), rel=1e-3)
    best = found["best"][0]
    grid = np.geomspace(1e3, 1e9, 5001)
    assert best["N"]["value"] == pytest.approx(grid[np.argmin(truth(grid, 1e13 / 6 / grid))], rel=0.02)
    assert best["among_sizes"] == (1e3 <= best["N"]["value"] <= 4e5)
    assert set(found["refused"]) == set()
    assert (tmp_path / "scaling_laws.png").stat().st_size > 5000
    assert len((tmp_path / "points.csv").read_text().splitlines()) == 17
    assert json.loads((tmp_path / "scaling_laws.json").read_text()) == found


def test_a_best_size_beyond_those_that_were_run_is_named(runs, tmp_path, capsys):
    assert report.main(["scaling_laws", str(runs), "--out", str(tmp_path), "--draws", "100", "--compute", "1e22"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best for C=1e+22")]
    assert line.endswith("N lies outside the sizes that were run")


def test_the_figure_holds_all_runs_and_the_whole_prediction(runs):
    made = ladder([point(path) for path in sorted(runs.iterdir())])
    fitted = fit_all(made, 100, 0)
    far = (1e8, 1e8)
    fig = draw(made, fitted, [far], None)
    low, high = fig.axes[0].get_ylim()
    loss, interval = fitted.joint.predict(*far)
    assert low < min(made.loss.min(), interval[0])
    assert max(made.loss.max(), loss) < high < 1.5 * made.loss.max()
    for ax in fig.axes:
        left, right = ax.get_xlim()
        ticks = [tick for tick in ax.xaxis.get_majorticklocs() if left <= tick <= right]
        assert 1 <= len(ticks) <= 7
    (line,) = [line for line in fig.axes[2].lines if line.get_gid() == "best"]
    best = [fitted.joint.optimal(c, fitted.cost)[0] for c in line.get_xdata()]
    assert made.n.min() <= min(best) <= max(best) <= made.n.max()


def test_runs_of_one_power_law_are_not_held_back_by_the_other_quantity(runs):
    made = ladder([point(path) for path in sorted(runs.iterdir())])
    assert set(made.d[made.chosen("N")]) == {640 * 800}
    assert set(made.n[made.chosen("D")]) == {400_000}
    front = made.chosen("C")
    for i in front:
        assert not np.any((made.c <= made.c[i]) & (made.loss < made.loss[i]))
    assert np.all(np.diff(made.loss[front]) < 0)


def test_unfinished_and_diverged_runs_are_listed_and_left_out(runs, tmp_path, capsys):
    write_point(tmp_path / "stopped", 1000, 40, max_steps=80)
    write_point(tmp_path / "spoiled", 1000, 40, summary={"val_l1": "NaN"})
    given = [str(runs), str(tmp_path / "stopped"), str(tmp_path / "spoiled")]
    assert report.main(["scaling_laws", *given, "--out", str(tmp_path), "--draws", "100"]) == 0
    said = capsys.readouterr()
    assert "16 finished runs" in said.out
    assert "stopped is not finished (40 of 80 steps)" in said.err
    assert "spoiled has diverged" in said.err


def patch(path):
    write_point(path / "other", 5000, 40, settings={"model": {"patch_size": [6, 6, 6, 2]}})


def ratio(path):
    write_point(path / "other", 5000, 40, settings={"task": {"mask_ratio": 0.8}})


@pytest.mark.parametrize(
    ("prepare", "few", "message"),
    [
        (
            patch,
            False,
            "model.patch_size is [6, 6, 6, 1] in n1000-s10 and [6, 6, 6, 2] in other: runs of different tok",
        ),
        (ratio, False, "task.mask_ratio is 0.5 in n1000-s10 and 0.8 in other: their losses measure different things"),
        (lambda path: write_point(path / "other", metrics=False), False, "no perf/clips_per_second"),
        (lambda path: write_point(path / "other"), True, "1 finished run: a scaling law needs at least three"),
        (lambda path: (path / "other").mkdir(), True, "neither a run directory"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, prepare, few, message):
    prepare(tmp_path)
    given = [str(tmp_path / "other")] if few else [str(runs), str(tmp_path / "other")]
    assert report.main(["scaling_laws", *given, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_too_few_sizes_leave_the_other_laws(runs, tmp_path, capsys):
    given = [str(path) for path in sorted(runs.iterdir()) if path.name.startswith("n1000-")]
    assert report.main(["scaling_laws", *given, "--out", str(tmp_path), "--draws", "100"]) == 0
    said = capsys.readouterr().out
    assert "not fitted: L(N, D): 1 different sizes" in said
    assert "L(D) = (c/D)^a" in said
    assert report.main(["scaling_laws", *given, "--out", str(tmp_path), "--predict", "1e9,1e9"]) == 2
    assert "nothing can be predicted" in capsys.readouterr().err

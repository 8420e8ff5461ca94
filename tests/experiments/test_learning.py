"""The learning study's arithmetic, tables and figures on planted results whose answers are known in closed form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.learning import bounds, figures, show
from experiments.learning.points import BASE_STEPS, COHORT, FACTOR_SECONDS, base_points, chosen, data_of_a_step
from swift.data.synthetic import CohortSpec, make_subject
from swift.report.style import BLUE, VERMILION
from swift.utils.errors import UserError

VOXELS = 100
COMPARED = "| {} |  |  | {:.4f} |  | {} | {} |"


def line(name: str, suite: str = "cohort", **level: float) -> dict[str, Any]:
    """A kept result whose L1 is the given number in each clip ("a_0" is clip "a 0"), of equally many voxels."""
    clips = {clip.replace("_", " "): [value * VOXELS, VOXELS] for clip, value in level.items()}
    return {"point": name, "suite": suite, "l1": float(np.mean(list(level.values()))), "clips": clips}


# ------------------------------------------------------------------------------------------------------ show: numbers
def test_rows_are_summed_by_clip_and_on_the_sample_by_mask_too() -> None:
    rows = [
        {"seed": seed, "subject": "a", "start": start, "sum": 10.0 * seed + start, "voxels": 7 + seed}
        | ({"watch": {"cosine": 0.25 + start / 10}} if seed == 0 else {})
        for seed in (0, 1)
        for start in (0, 5)
    ]
    found = show.small({"point": "p", "suite": "cohort", "rows": rows, "steps": 3})
    assert found == {
        "point": "p",
        "suite": "cohort",
        "steps": 3,
        "clips": {"a 0": [10.0, 15], "a 5": [20.0, 15]},
        "watch": {"cosine": 0.5},
    }
    assert show.small({"point": "p", "suite": "sample", "rows": rows})["clips"] == {
        "a 0 0": [0.0, 7],
        "a 5 0": [5.0, 7],
        "a 0 1": [10.0, 8],
        "a 5 1": [15.0, 8],
    }


def test_results_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "KEPT", tmp_path / "kept.jsonl")
    row = {"seed": 0, "subject": "a", "start": 0, "voxels": 10}
    source = tmp_path / "made.jsonl"
    for levels in ({"p": 5.0, "q": 6.0}, {"q": 7.0, "closed forms": None}):
        text = [
            json.dumps({"point": name, "suite": "cohort", "rows": [] if total is None else [row | {"sum": total}]})
            for name, total in levels.items()
        ]
        source.write_text("\n".join(text) + "\n")
        show.add(source)
    kept = [json.loads(text) for text in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [(one["point"], one["clips"]) for one in kept] == [("p", {"a 0": [5.0, 10]}), ("q", {"a 0": [7.0, 10]})]


def test_difference_of_two_subjects_in_closed_form() -> None:
    """A resample of two subjects is one of them twice with p = 1/4 each: the 95 % ends are their own differences."""
    a = [line("a", s_0=0.50, s_20=0.54, t_0=0.70)]  # subject s has two clips
    b = [line("b", s_0=0.60, s_20=0.60, t_0=0.71, u_0=0.1)]  # of u there is nothing in a
    found = show.compare(a, b)
    assert found.l1 == pytest.approx((0.50 + 0.54 + 0.70) / 3)
    assert found.mean == pytest.approx((-0.10 - 0.06 - 0.01) / 3)
    assert (found.low, found.high) == (pytest.approx(-0.08), pytest.approx(-0.01))
    assert str(found) == "-0.0567 [-0.0800, -0.0100]"


def test_voxels_weigh_and_a_constant_difference_has_no_interval() -> None:
    a, b = line("a", s_0=0.5, t_0=0.9), line("b", s_0=0.6, t_0=1.0)
    for one in (a, b):
        one["clips"]["s 0"] = [3 * number for number in one["clips"]["s 0"]]
    found = show.compare([a], [b])
    assert found.l1 == pytest.approx((3 * 0.5 + 0.9) / 4)
    assert (found.mean, found.low, found.high) == (pytest.approx(-0.1),) * 3
    same = [a]
    assert str(show.compare(same, same)) == "0"


def test_seeds_are_drawn_too() -> None:
    """One subject, so that all of the interval comes from the seeds: of each side one twice with p = 1/4."""
    a = [line("a", s_0=0.50), line("a", s_0=0.54)]
    b = [line("b", s_0=0.60), line("b", s_0=0.61)]
    found = show.compare(a, b)
    assert (found.l1, found.mean) == (pytest.approx(0.52), pytest.approx(-0.085))
    assert (found.low, found.high) == (pytest.approx(0.50 - 0.61), pytest.approx(0.54 - 0.60))


def test_on_the_sample_clips_and_masks_are_drawn() -> None:
    """Two clips and two masks: each pair alone comes with p = 1/16, more than the 2.5 % beyond an end."""
    difference = {"a_0_0": -0.04, "a_0_1": -0.01, "a_8_0": -0.02, "a_8_1": 0.03}
    a = [line("a", "sample", **{key: 0.7 + value for key, value in difference.items()})]
    b = [line("b", "sample", **dict.fromkeys(difference, 0.7))]
    found = show.compare(a, b)
    assert found.mean == pytest.approx(-0.01)
    assert (found.low, found.high) == (pytest.approx(-0.04), pytest.approx(0.03))
    # As subjects all four are of one: nothing can be drawn.
    whole = show.compare(*([one | {"suite": "cohort"} for one in part] for part in (a, b)))
    assert (whole.low, whole.high) == (pytest.approx(-0.01),) * 2


# ----------------------------------------------------------------------------------------------------- show: documents
@pytest.fixture
def planted() -> dict[str, Any]:
    """Closed forms, a training of two seeds and a factor around each base; every subject differs alike."""

    def trained(name: str, level: float, **more: Any) -> dict[str, Any]:
        about = {"steps": 30, "cpu_seconds": 12.0, "curve": [[0.1, 0, 0.8], [12.0, 30, level]]}
        return line(name, s_0=level, t_0=level + 0.1) | about | {"l1": level + 0.05} | more

    watch = dict(zip(show.WATCHED, (0.9, 0.6, 0.05, 0.7, 0.68)))
    low, both = show.LOW_RANK["cohort"], show.BOTH["cohort"]
    lines = [
        line(low, s_0=0.70, t_0=0.80),
        line(both, s_0=0.69, t_0=0.79),
        trained("cohort/maps#0", 0.66, watch=watch),
        trained("cohort/maps#1", 0.68),
        trained("factors/network/base", 0.72),
        trained("factors/network/base, 36 steps", 0.71, steps=36),
        trained("factors/network/rate=1e-2", 0.713, steps=33),
        trained("factors/network/decay=0", 0.73, steps=20),
        trained("factors/network/batch=8", 0.73, steps=18),
        trained("factors/maps/base", 0.69),
        trained("factors/maps/rate=1e-2", 0.70),
    ]
    return {one["point"]: one for one in lines}


def test_tables_of_planted_results(planted: dict[str, Any]) -> None:
    rows = show.recipe_table(planted, "cohort")[2:]
    assert rows == [
        "| trained: maps | 12 | 30 | 0.7200 | 0.7100, 0.7300 "
        "| -0.0300 [-0.0400, -0.0200] | -0.0200 [-0.0300, -0.0100] |",
        COMPARED.format("low-rank (training subjects) + local ridge", 0.74, "-0.0100 [-0.0100, -0.0100]", "0"),
        COMPARED.format("low-rank (training subjects)", 0.75, "0", "+0.0100 [+0.0100, +0.0100]"),
    ]
    assert show.watch_table(planted)[2:] == ["| cohort/maps#0 | 0.900 | 0.600 | 0.050 | 0.700 | 0.680 |"]
    factors = show.factor_table(planted, show.factor_rows(planted))
    # The network's base falls from 0.77 at 30 steps to 0.76 at 36. A step of 8 clips sees what two of the base do.
    assert factors[2:7] == [
        "| base | 36 | 0.7600 |  | 30 | 0.7400 |  |",
        "| base | 30 | 0.7700 |  |  |  |  |",
        "| rate = 1e-2 | 33 | 0.7630 | -0.0020 [-0.0020, -0.0020] | 30 | 0.7500 | +0.0100 [+0.0100, +0.0100] |",
        "| batch = 8 | 18 | 0.7800 | +0.0200 [+0.0200, +0.0200] |  |  |  |",
        "| decay = 0 | 20 | 0.7800 | +0.0100 [+0.0100, +0.0100] |  |  |  |",
    ]
    missing = factors[-1].removeprefix("Not run for want of time: ").removesuffix(".").split("; ")
    assert len(missing) == len(chosen(["factors"])) - 7
    assert "network/LayerScale=none" in missing
    assert "maps/rate=1e-2" not in missing


def test_the_command_writes_between_its_marks_only(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "HERE", tmp_path)
    monkeypatch.setattr(show, "KEPT", tmp_path / "points.jsonl")
    (tmp_path / "points.jsonl").write_text("".join(json.dumps(one) + "\n" for one in planted.values()))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{show.BEGIN}\nold table\n{show.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["show"])
    show.main()
    once = readme.read_text()
    assert once.startswith(f"before\n{show.BEGIN}\n")
    assert once.endswith(f"{show.END}\nafter\n")
    assert "old table" not in once
    assert "| rate = 1e-2 | 33 | 0.7630 |" in once
    assert "ten masks" not in once  # nothing of the sample is there
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("trained.png", "factors.png"))
    for name in ("draw_trained", "draw_factors"):
        monkeypatch.setattr(show, name, lambda *given: None)
    show.main()
    assert readme.read_text() == once


def test_the_figures_show_what_the_tables_say(planted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    @contextmanager
    def kept(height: float, out: Path) -> Iterator[Figure]:
        drawn.append(Figure())
        yield drawn[-1]

    monkeypatch.setattr(figures, "figure", kept)
    rows = show.factor_rows(planted)
    figures.draw_factors(rows, Path("factors.png"))
    left = drawn[0].axes[0]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["decay = 0", "batch = 8", "rate = 1e-2"]
    for ax, base in zip(drawn[0].axes, ("network", "maps")):
        points = {
            int(one.get_ydata()[0]): (float(one.get_xdata()[0]), one.get_color())
            for one in ax.lines
            if one.get_marker() == "o"
        }
        found = {place: of[base] for place, (_, of) in enumerate(reversed(rows)) if base in of}
        assert points == {
            place: (one.mean, BLUE if one.high < 0 else VERMILION) for place, one in found.items()
        }  # no interval here holds 0
        assert {(*map(float, one.get_xdata()), int(one.get_ydata()[0])) for one in ax.lines if len(one.get_xdata()) == 2
                and one.get_marker() != "o" and one.get_linewidth() == 1.5} == {
            (one.low, one.high, place) for place, one in found.items()
        }  # fmt: skip


def test_factors_differ_from_their_base_in_one_thing() -> None:
    points = chosen(["factors"])
    assert len({point.name for point in points}) == len(points) == 67
    again, rest = points[:6], points[6:]
    bases = {point.name.split("/")[1]: point for point in rest if point.name.endswith("/base")}
    assert [point.name for point in rest[:2]] == ["factors/network/base", "factors/maps/base"]
    for base, one in bases.items():
        own = [point for point in again if point.name.split("/")[1] == base]
        assert [point.name for point in [one, *own]] == base_points(base)
        assert {point.options for point in own} == {one.options}
        assert sorted(point.extra["steps"] for point in own) == sorted(BASE_STEPS[base])
    for point in rest:
        assert point.extra["seconds"] == FACTOR_SECONDS
        base = bases[point.name.split("/")[1]]
        more = set(point.options) - set(base.options)
        extra = set(point.extra) - {"seconds"}
        # 10 frames and batches of 8 go together: as many voxels a step.
        assert (point is base) == (not more and not extra)
        assert len({one.split("=")[0] for one in more} - {"data.batch_size"}) + len(extra) <= 1, point.name
        batch = {"batch=2": 0.5, "batch=8": 2.0}
        assert data_of_a_step(point) == batch.get(point.name.split("/")[-1], 1.0), point.name
    assert not set(bases["network"].options) & set(COHORT)
    with pytest.raises(UserError, match=r"--sets finalist: legal are factors, cohort, finalists"):
        chosen(["finalist"])


# ------------------------------------------------------------------------------------------------------------- bounds
def stationary(rng: np.random.Generator, voxels: int) -> np.ndarray:
    """(3, V, V) covariance of a process: two sources of autocorrelation 0.8 and 0.5, and white noise."""
    maps = rng.normal(size=(2, voxels))
    lags = [sum(phi**lag * np.outer(one, one) for phi, one in zip((0.8, 0.5), maps)) for lag in range(3)]
    lags[0] = lags[0] + 0.3 * np.eye(voxels)
    return np.stack(lags)


def test_conditional_mean_equals_the_joint_gaussian() -> None:
    """Against one covariance of all voxels of the three frames, entry by entry, and its inverse."""
    rng = np.random.default_rng(0)
    frames, voxels = 5, 4
    covariance, values = stationary(rng, voxels), rng.normal(size=(frames, voxels))
    hidden = rng.random((frames, voxels)) < 0.5
    hidden[2] = True  # a frame known by its neighbours alone
    found = bounds.conditional_mean(np.where(hidden, np.nan, values), hidden, covariance)
    for t in range(frames):
        places = [(s, v) for s in (t - 1, t, t + 1) if 0 <= s < frames for v in range(voxels)]
        joint = np.array([[covariance[abs(s - r), v, w] for r, w in places] for s, v in places])
        seen = [n for n, (s, v) in enumerate(places) if not hidden[s, v]]
        known = np.array([values[places[n]] for n in seen])
        for v in range(voxels):
            at = places.index((t, v))
            expected = joint[at, seen] @ np.linalg.inv(joint[np.ix_(seen, seen)]) @ known if hidden[t, v] else 0.0
            assert found[t, v] == pytest.approx(expected, abs=1e-9)


def test_mean_covariance_counts_the_subjects_that_have_a_voxel() -> None:
    """Three places of a grid of four: both subjects have place 3, one has 1, nobody has 2."""
    first, second = np.arange(24.0).reshape(2, 3, 2, 2), 10 + np.arange(24.0).reshape(2, 3, 2, 2)
    truths = [
        SimpleNamespace(mask=np.array([False, True, False, True]), covariance=first),
        SimpleNamespace(mask=np.array([True, False, False, True]), covariance=second),  # place 0 is not asked for
    ]
    found = bounds.mean_covariance(truths, np.array([1, 2, 3]), 4)  # type: ignore[arg-type]
    one, two = first.sum(0), second.sum(0)
    for lag in range(3):
        expected = np.zeros((3, 3))
        expected[0, 0] = one[lag, 0, 0]
        expected[0, 2] = one[lag, 0, 1] / np.sqrt(2)
        expected[2, 0] = one[lag, 1, 0] / np.sqrt(2)
        expected[2, 2] = (one[lag, 1, 1] + two[lag, 1, 1]) / 2
        expected[1, 1] = 1.0 if lag == 0 else 0.0
        np.testing.assert_allclose(found[lag], expected, rtol=1e-6)


def test_lagged_covariance_by_loops() -> None:
    values = np.random.default_rng(1).normal(size=(9, 3))
    for lag in range(3):
        loops = [
            [sum(values[t, a] * values[t + lag, b] for t in range(9 - lag)) / 9 for b in range(3)] for a in range(3)
        ]
        np.testing.assert_allclose(bounds._lagged(values, lag), (np.array(loops) + np.array(loops).T) / 2)


def test_the_truth_of_a_subject_fits_its_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of the noise is what the scan holds beside the scan without noise."""
    spec = CohortSpec(n_subjects=1, grid=(10, 10, 10), spacing=12.0, frames=100, seed=0)
    monkeypatch.setattr(bounds, "COHORT_SPEC", spec)
    truth = bounds.Truth(0)
    bold = make_subject(spec, 0).bold
    noise = (bold - bold.mean(0)) / bold.std(0) - truth.known
    said = truth.covariance[1]
    assert noise.var(0).sum() == pytest.approx(np.trace(said[0]), rel=0.05)
    # Neighbours in the flat order are neighbours in space: the smooth part, without the white one.
    beside = (noise[:, :-1] * noise[:, 1:]).mean(0).sum()
    assert beside == pytest.approx(np.diagonal(said[0], 1).sum(), rel=0.1)
    later = (noise[:-1] * noise[1:]).mean(0).sum()
    assert later == pytest.approx(np.trace(said[1]), rel=0.15)

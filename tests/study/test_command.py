"""python -m swift.study: points, resuming, probes and series on small runs; mistakes."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import swift
from swift.data.store.reader import Store
from swift.data.synthetic import CohortSpec
from swift.plan.__main__ import composed
from swift.report import __main__ as report
from swift.report.temporal import FILE
from swift.study import runner as module
from swift.study.__main__ import main
from swift.study.file import cohort_store, load_study, point_name
from swift.study.runner import run_study
from swift.utils import jsonl
from swift.utils.errors import UserError
from tests.runs import QUIET, restarts
from tests.small import DATA, MODEL, TRAINER, small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("cohort") / "store")


def write(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def small(path, store, **more):
    base = ["data=store", f"data.path={store}", *MODEL, *DATA, *TRAINER, QUIET]
    return load_study(write(path / "small" / "laptop.yaml", base=base, **more))


def steps(run):
    return [record["step"] for record in jsonl.read(run / "metrics.jsonl") if "train/loss" in record]


def test_points_are_all_combinations_of_each_block(tmp_path):
    blocks = [{"a.b": [1, 2], "c": "x"}, {"d": [[3, 4], None, True]}]
    made = load_study(write(tmp_path / "ladder" / "laptop.yaml", points=blocks, base=["seed=1"]))
    assert made.points == [["a.b=1", "c=x"], ["a.b=2", "c=x"], ["d=[3,4]"], ["d=null"], ["d=true"]]
    assert (made.name, made.base, made.kind) == ("ladder", ["seed=1"], "train")
    assert point_name(["model.patch_size=[6,6,6,1]", "task.mask_ratio=0.5"]) == "patch_size-6x6x6x1_mask_ratio-0.5"
    assert point_name(["+launcher=frontier", "model/variant=joint"]) == "launcher-frontier_variant-joint"


def test_a_study_goes_on_where_it_stopped(tmp_path, store, monkeypatch, caplog, capsys):
    """The first point is finished before the stop, the second is half done."""
    points = [{"task.mask_ratio": [0.4, 0.5]}]
    report = [["pretraining", "{runs}", "--x", "steps", "--out", "{out}"]]
    study = small(tmp_path, store, points=points, report=report)
    runs, out = tmp_path / "runs", tmp_path / "out"
    caplog.set_level(logging.INFO, logger="swift")
    original, begun = module._train, []

    def stop_in_the_second(overrides):
        begun.append(overrides)
        if len(begun) == 2:
            # As if the process had died after the validation at step 3.
            original([*overrides, "trainer.max_steps=3"])
            (runs / "mask_ratio-0.5" / "summary.json").unlink()
            frozen = runs / "mask_ratio-0.5" / "config.yaml"
            frozen.write_text(frozen.read_text().replace("max_steps: 3", "max_steps: 6"))
            raise KeyboardInterrupt
        return original(overrides)

    monkeypatch.setattr(module, "_train", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, runs, out, [])
    first = (runs / "mask_ratio-0.4" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(module, "_train", original)
    assert run_study(study, runs, out, []) == 0
    assert (runs / "mask_ratio-0.4" / "metrics.jsonl").read_bytes() == first
    assert restarts(runs / "mask_ratio-0.4") == []
    assert restarts(runs / "mask_ratio-0.5") == [3]
    assert steps(runs / "mask_ratio-0.5") == [1, 2, 3, 4, 5, 6]
    assert "mask_ratio-0.4: finished before" in caplog.text
    assert "2 points, 1 of them run now" in caplog.text
    assert (out / "pretraining.png").is_file()
    caplog.clear()
    assert run_study(study, runs, out, []) == 0
    assert "2 points, 0 of them run now" in caplog.text
    with pytest.raises(UserError, match=r"mask_ratio-0.4 holds a run with other settings \(seed\)"):
        run_study(study, runs, out, ["seed=5"])


def test_a_point_is_stopped_once_and_goes_on_in_the_middle(tmp_path, store):
    study = small(tmp_path, store, points=[{"trainer.max_steps": [30]}], interrupt={"max_steps-30": 2})
    run = tmp_path / "runs" / "max_steps-30"
    before = signal.getsignal(signal.SIGUSR1)
    assert run_study(study, tmp_path / "runs", tmp_path, []) == 0
    (at,) = restarts(run)
    assert 2 <= at < 30
    assert steps(run) == list(range(1, 31))
    assert json.loads((run / "summary.json").read_text())["steps"] == 30
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_study_makes_its_cohort_once(tmp_path):
    cohort = {"n_subjects": 3, "frames": 48, "grid": [12, 12, 12], "spacing": 16.0, "noise_white": 0.05}
    study = load_study(
        write(tmp_path / "s" / "laptop.yaml", base=["data=store"], points=[{"seed": [1]}], cohort=cohort)
    )
    store = cohort_store(study.cohort, study.path, tmp_path / "runs" / "cohort")
    spec = CohortSpec(n_subjects=3, frames=48, grid=(12, 12, 12), spacing=16.0, noise_white=0.05)
    opened = Store(store)
    assert len(opened.scans) == 3
    written = (store / "truth" / "spec.json").read_text().strip()
    assert written == spec.to_json()
    made = store.stat().st_mtime_ns
    assert cohort_store(study.cohort, study.path, store).stat().st_mtime_ns == made
    with pytest.raises(UserError, match="holds another cohort"):
        cohort_store(cohort | {"seed": 1}, study.path, store)
    with pytest.raises(UserError, match=r"cohort: got an unexpected keyword argument 'subjects'"):
        cohort_store({"subjects": 1}, study.path, tmp_path / "other")


def test_points_train_on_the_cohort_of_the_study(tmp_path, monkeypatch):
    cohort = {"n_subjects": 2, "frames": 48, "grid": [12, 12, 12], "spacing": 16.0}
    content = {"base": ["data=store"], "points": [{"seed": [1, 2]}], "cohort": cohort}
    begun: list[list[str]] = []
    monkeypatch.setattr(module, "_train", lambda overrides: begun.append(overrides) or [])
    run_study(load_study(write(tmp_path / "s" / "laptop.yaml", **content)), tmp_path / "runs", tmp_path, [])
    assert [item for point in begun for item in point if item.startswith("data.path")] == [
        f"data.path={tmp_path}/runs/cohort"
    ] * 2


def test_series_and_probes_of_trained_points(tmp_path, store, caplog):
    study = small(tmp_path, store, points=[{"model.patch_size": "[4,4,4,1]"}])
    runs = tmp_path / "runs"
    run = runs / "patch_size-4x4x4x1"
    assert run_study(study, runs, tmp_path, []) == 0
    module.describe_series(replace(study, series={"count": 2, "frames": 48, "lag": 16}), [run])
    content = json.loads((run / FILE).read_text())
    assert len(content["scans"]) == 2
    layers = content["scans"][0]["layers"]
    assert set(layers) == {"bold", "stage1", "stage2"}
    for layer in layers.values():
        assert layer["seconds"] == 2.0
        assert len(layer["ordered"]["acf"]) == 9
    assert layers["bold"]["ordered"]["acf"][1] > layers["bold"]["shuffled"]["acf"][1]
    with pytest.raises(UserError, match=r"2 subjects in .*; leaving one out needs at least three"):
        module.write_probe(run, store, "valence_bold")
    with pytest.raises(UserError, match=r"scan .* has no such column, only"):
        module.write_probe(run, store, "mood")


EXPERIMENTS = Path(swift.__file__).resolve().parents[1] / "experiments"


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_studies_of_the_repository_compose(path):
    """Each file is read, and its first and last point pass the checks of the settings."""
    study = load_study(path)
    names = [point_name(point) for point in study.points]
    assert len(set(names)) == len(names)
    stored = [] if any(item.startswith("data.path=") for item in study.base) else ["data.path=nowhere"]
    for point in (study.points[0], study.points[-1]):
        composed([*study.base, *point, *(stored if "data=store" in study.base else [])])
    for line in study.report:
        assert line[0] in report.COMMANDS


def test_list_says_how_far_every_point_is(tmp_path, capsys):
    path = write(tmp_path / "s" / "laptop.yaml", points=[{"seed": [1, 2, 3]}])
    for name, file in (("seed-1", "summary.json"), ("seed-2", "config.yaml")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).touch()
    main([str(path), "--runs", str(tmp_path / "runs"), "--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["finished", "begun", "to"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "a study needs points"),
        ({"points": []}, "no points"),
        ({"points": ["model=tiny"]}, "points must be blocks"),
        ({"points": [{"a": 1}], "pionts": 1}, "pionts is not known"),
        ({"points": [{"a": 1}], "kind": "x"}, "kind=x: must be one of train, throughput"),
        ({"points": [{"seed": [1, 1]}]}, "two points are called seed-1"),
        ({"points": [{"sead": 1}]}, "sead"),
        ({"points": [{"seed": 1}], "interrupt": ["seed-1"]}, "interrupt: wants POINT: STEP"),
        ({"points": [{"seed": 1}], "interrupt": {"seed-2": 5}}, "interrupt: seed-2: 5: wants the name of a point"),
    ],
)
def test_mistakes_are_one_error(tmp_path, capsys, content, message):
    path = write(tmp_path / "s" / "laptop.yaml", **content)
    with pytest.raises(SystemExit) as stopped:
        main([str(path), "--runs", str(tmp_path / "runs")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=1"], "give a study file"),
        (["nowhere.yaml"], "cannot be read"),
    ],
)
def test_mistakes_of_the_command_line(capsys, given, message):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_throughput_is_measured_once(tmp_path, capsys):
    base = ["data=store", "data.path=none", *MODEL, *DATA]
    study = load_study(write(tmp_path / "t" / "laptop.yaml", kind="throughput", base=base, points=[{"seed": 0}]))
    runs = tmp_path / "runs"
    assert run_study(study, runs, tmp_path, []) == 0
    file = runs / "seed-0" / "throughput.json"
    before = file.read_bytes()
    found = json.loads(before)
    assert found["device"] == "CPU"
    assert found["plan"]["step_seconds"] is None
    assert np.median(found["step_seconds"]) > 0
    assert run_study(study, runs, tmp_path, []) == 0
    assert file.read_bytes() == before


def test_figures_that_are_kept_change_only_by_an_option(tmp_path, monkeypatch):
    import swift.study.__main__ as command

    path = write(tmp_path / "s" / "laptop.yaml", points=[{"seed": [1]}])
    written = []
    monkeypatch.setattr(command, "run_study", lambda study, runs, out, settings: written.append(out) or 0)
    main([str(path)])
    main([str(path), "--keep"])
    main([str(path), "--out", "here"])
    assert written == [Path("runs/figures/s"), path.parent, Path("here")]
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--keep", "--out", "here"])
    assert ended.value.code == 2

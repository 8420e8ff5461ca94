"""python -m swift.report: table, JSON, figures, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

from swift.report import __main__ as report
from swift.report.runs import describe, load_run
from swift.utils.errors import UserError


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "first"
    path.mkdir()
    records = [{"step": s, "time": 1.0, "train/loss": 1 / s} for s in (10, 20)]
    records += [{"step": s, "val/l1": v} for s, v in ((10, 0.65), (20, 0.55), (30, 0.7))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {
        "model": "tiny",
        "parameters": 812345,
        "steps": 30,
        "val_l1": 0.7,
        "baselines": {"brain mean": 0.8, "linear interpolation": 0.6},
        "beats": ["brain mean"],
    }
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.yaml").write_text("data: {normalization: percent}\n")
    return path


EXPECTED = {
    "run": "first",
    "model": "tiny",
    "parameters": 812345,
    "steps": 30,
    "train_loss": 0.05,
    "val_l1": 0.55,
    "val_l1_step": 20,
    "val_l1_last": 0.7,
    "unit": "% signal change",
    "baselines": {"brain mean": 0.8, "linear interpolation": 0.6},
    "beats": ["brain mean"],
}


def test_json_holds_the_numbers_of_the_files(run, capsys):
    assert report.main([str(run), "--json", "--no-figures"]) == 0
    assert json.loads(capsys.readouterr().out) == [EXPECTED]


def test_table_and_figures(run, capsys):
    assert report.main([str(run), "--compare", str(run / "all.png")]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[1].split() == ["first", "tiny", "812,345", "30", "0.0500", "0.5500", "20", "0.7000", "1", "of", "2"]
    assert "  0.8000  brain mean  beaten" in lines
    assert "  0.6000  linear interpolation  not beaten" in lines
    assert (run / "figures" / "loss.png").stat().st_size > 1000
    assert (run / "all.png").stat().st_size > 1000
    assert not (run / "figures" / "reconstruction.png").exists()  # no data for it


def test_a_run_that_has_not_ended(run):
    (run / "summary.json").unlink()
    (run / "config.yaml").unlink()
    row = describe(load_run(run))
    assert (row["model"], row["parameters"], row["baselines"], row["beats"]) == (None, None, None, None)
    assert (row["steps"], row["val_l1"], row["val_l1_last"], row["unit"]) == (30, 0.55, 0.7, "normalized units")
    assert "first" in report.table([row])


def test_a_diverged_run_beats_nothing_and_is_valid_json(run):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "train/loss": "NaN"}\n{"step": 40, "val/l1": "NaN"}\n')
    summary = json.loads((run / "summary.json").read_text()) | {"val_l1": "NaN"}
    (run / "summary.json").write_text(json.dumps(summary))
    row = describe(load_run(run))
    assert (row["train_loss"], row["val_l1_last"], row["val_l1"]) == ("NaN", "NaN", 0.55)
    assert not row["beats"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.joinpath("metrics.jsonl").unlink(), "no metrics.jsonl"),
        (lambda run: run.joinpath("metrics.jsonl").write_text(""), "empty"),
        (lambda run: run.joinpath("metrics.jsonl").write_text("x\n"), "line 1"),
        (lambda run: run.joinpath("metrics.jsonl").write_text('{"step": 1}\n'), "neither train/loss"),
        (lambda run: run.joinpath("summary.json").write_text("{"), "damaged"),
        (lambda run: run.joinpath("config.yaml").write_text("- a"), "mapping"),
    ],
)
def test_damaged_runs_end_with_one_line_and_two(run, capsys, damage, message):
    damage(run)
    assert report.main([str(run)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_as_a_command_without_torch(run):
    code = "import sys; from swift.report import __main__ as report; status = report.main(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules and 'lightning' not in sys.modules; sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, str(run), "--no-figures"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout
    done = subprocess.run([sys.executable, "-m", "swift.report", str(run) + "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"swift.report: {run}x: no such run directory\n"


def test_a_subcommand_gets_its_arguments_and_its_mistakes_are_one_line(monkeypatch, capsys):
    module = types.ModuleType("table_of_squares", "Squares.")
    module.add_arguments = lambda parser: parser.add_argument("number", type=int)

    def run(args):
        if args.number < 0:
            raise UserError(f"{args.number}: must not be negative")
        print(args.number**2)
        return 0

    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(report.COMMANDS, "squares", module.__name__)
    assert report.main(["squares", "7"]) == 0
    assert capsys.readouterr().out == "49\n"
    assert report.main(["squares", "--", "-1"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "swift.report squares: -1: must not be negative\n")


@pytest.mark.parametrize("name", list(report.COMMANDS))
def test_every_subcommand_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"python -m swift.report {name}" in capsys.readouterr().out

"""The console command runs the code of `python -m swift.COMMAND`, and lists all of it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import swift
from swift.__main__ import COMMANDS

ROOT = Path(swift.__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


def test_every_module_that_is_a_command_is_listed() -> None:
    package = Path(swift.__file__).parent
    files = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    folders = {path.parent.name for path in package.glob("*/__main__.py")}
    # `python -m swift.baselines` is the command of the folder evaluate.
    assert set(COMMANDS) == files | (folders - {"evaluate"})
    assert all(find_spec(f"swift.{name}") for name in COMMANDS)


def test_it_is_declared_as_swift_fmri() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"swift-fmri": "swift.__main__:main"}


def test_help_lists_the_commands_a_line_each() -> None:
    done = run("-m", "swift", "--help")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)


def test_version_is_that_of_the_package() -> None:
    done = run("-m", "swift", "--version")
    assert done.returncode == 0
    assert done.stdout.split()[:2] == ["swift-fmri", version("swift-fmri")]


@pytest.mark.parametrize(
    ("given", "says"),
    [(["tran"], "tran is no command: did you mean train?"), (["xyzzy"], "xyzzy is no command: legal are data, train")],
)
def test_a_wrong_command_is_one_line(given: list[str], says: str) -> None:
    done = run("-m", "swift", *given)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize("given", [["health", "--help"], ["data", "info", "nowhere"], ["train", "model=51", "--help"]])
def test_the_same_code_as_python_m(given: list[str]) -> None:
    console, module = run("-m", "swift", *given), run("-m", f"swift.{given[0]}", *given[1:])
    assert (console.returncode, console.stdout, console.stderr) == (module.returncode, module.stdout, module.stderr)
    assert console.stdout or console.stderr


@pytest.mark.slow
def test_what_serves_one_command_is_not_imported_by_the_others() -> None:
    common = ["train.wiring", "train.finetune", "inference.embedding", "inference.attribution", "data.ingest.pipeline"]
    code = "import importlib, sys; [importlib.import_module('swift.' + name) for name in sys.argv[1:]]\n"
    code += "print(*sorted({'captum', 'peft', 'tensorboard', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *common], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

"""Starting small runs in process or on a command line, and comparing what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import swift
from swift.config.compose import load_frozen
from swift.parallel.setup import resolve
from swift.train.__main__ import run
from swift.train.init_weights import start_from
from swift.train.wiring import build_module
from tests.forked import python_m
from tests.small import composed, metrics

ROOT = Path(swift.__file__).resolve().parents[1]
QUIET = "trainer.figures=false"


def start(*overrides: str) -> None:
    """What the command does once Hydra has composed."""
    run(composed(*overrides), list(overrides), [])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    module = build_module(resolve(load_frozen(run_dir, [])))
    start_from(module, str(run_dir))
    return module.state_dict()


def restarts(run_dir: Path) -> list[int]:
    """The steps at which the run went on."""
    content = json.loads((run_dir / "provenance.json").read_text())
    return [restart["step"] for restart in content["restarts"]]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights and metrics are equal to the last bit."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert metrics(a) == metrics(b)


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class StopAt(pl.Callback):
    """Ctrl-C while optimizer step `step` + 1 is under way."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m swift.train` in a folder, forked from a process that has imported it."""
    return python_m("swift.train", *arguments, cwd=folder, env=environment())


def shell_from_nothing(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "swift.train", *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SWIFT_", "SLURM_"))}
    return outside | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

"""What the ranks of a test run of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift.config.compose import typed
from swift.parallel.setup import resolve
from swift.train.__main__ import settings
from swift.train.init_weights import start_from
from swift.train.run import train
from swift.train.wiring import build_data, build_module, build_trainer, tell
from tests.cohort import task_command
from tests.distributed import jobs
from tests.small import composed


def tune(folder: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """As the command does it: train, take the best weights, judge; the summary on rank 0."""
    own = task_command(folder, run_dir, "trainer.accelerator=cpu", "task=synthetic_binary", *overrides)
    return train(typed(composed(*own)), own)


def steps(folder: Path, run_dir: Path, overrides: list[str], stop: int | None = None) -> dict[str, Any]:
    """Train a task without judging it, going on from a checkpoint if there is one; what this rank saw."""
    own = task_command(folder, run_dir, "trainer.accelerator=cpu", *overrides)
    cfg = typed(composed(*own))
    module, data = build_module(resolve(cfg), empty=True), build_data(cfg)
    if cfg.init:
        start_from(module, cfg.init)
    tell(module, data)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return jobs.fitted(module, data, build_trainer(resolve(cfg), own), run_dir, stop) | {"trained": trained}


def judge_again(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Resume a finished run: there is nothing left but to judge."""
    own = [f"resume={run_dir}", *overrides]
    return train(settings(composed(f"resume={run_dir}"), own), own)

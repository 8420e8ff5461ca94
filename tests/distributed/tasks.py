"""What the ranks of a test run of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift.config.compose import typed
from swift.train import settings, train
from tests.cohort import task_command
from tests.small import composed


def tune(folder: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """As the command does it: train, take the best weights, judge; the summary on rank 0."""
    own = task_command(folder, run_dir, "trainer.accelerator=cpu", "task=synthetic_binary", *overrides)
    return train(typed(composed(*own)), own)


def judge_again(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Resume a finished run: there is nothing left but to judge."""
    own = [f"resume={run_dir}", *overrides]
    return train(settings(composed(f"resume={run_dir}"), own), own)

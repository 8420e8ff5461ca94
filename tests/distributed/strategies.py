"""How the strategies under test spread a global batch of 4 over two ranks, and what is made of the runs they leave."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from swift.inference.export import export, load
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.read import subjects_file

WHOLE = ["data.batch_size=4"]
"""On one rank."""
TWO = ["data.batch_size=2"]
PARTS = ["data.batch_size=1", "trainer.accumulate=2"]
# Torch's Adam in place of DeepSpeed's, which would be compiled here.
OFFLOAD = [*TWO, "parallel.cpu_adam=false"]
STRATEGIES = {"ddp": PARTS, "zero1": TWO, "zero2": PARTS, "zero3": PARTS, "zero3_offload": OFFLOAD, "fsdp": PARTS}
OPTIMIZERS = {"adamw": ["optimizer=adamw"], "mup": ["optimizer=adamw_mup", "optimizer.base_width=6"]}
BF16 = ["trainer.precision=bf16"]


HSDP = ["parallel=hsdp", "parallel.group=2", "parallel.unit_mb=0.001", "data.batch_size=1"]
"""On four ranks: two groups of two, weights gathered layer by layer."""
HPZ = ["parallel=zero3", "parallel.group=2", "data.batch_size=1"]
"""On four ranks: ZeRO 3 with a second copy of the weights in each group of two."""
ON_FOUR = {"hsdp": HSDP, "hpz": HPZ}


def spread(name: str) -> list[str]:
    """The settings of a strategy on two ranks."""
    return [f"parallel={name}", *STRATEGIES[name]]


def slow_but(quick: Iterable[str], names: Iterable[str] = STRATEGIES) -> list[Any]:
    """Parameters of a test: all `names`, those that are not `quick` marked as slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def exported(run_dir: Path) -> Any:
    """The model of a run, by way of `swift.export`."""
    out = run_dir.with_name(f"{run_dir.name}.safetensors")
    for left in (out, subjects_file(out)):
        left.unlink(missing_ok=True)
    export(run_dir, out)
    return load(out).model


def stopped(run_dir: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it would be if it had been stopped after `step`."""
    shutil.copytree(run_dir, folder, dirs_exist_ok=True)
    for path in checkpoint.finished(folder / "checkpoints"):
        if path.name > checkpoint.step_folder(step):
            shutil.rmtree(path)
    (folder / "checkpoints" / checkpoint.LATEST).write_text(checkpoint.step_folder(step))
    return folder

"""One rank under every strategy: the same losses as parallel=single, and a resumed run equal to one that went on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from swift.utils import jsonl
from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import SMALL
from tests.bench.gpu.stores import random_store
from tests.forked import python_m

NAMES = ("single", "ddp", "zero1", "fsdp")
STEPS, SAVED = 5, 3
LIMIT = {"bf16": 1e-2, "32": 1e-5}
"""Largest relative difference of a loss: single and ddp keep a float32 stream, zero1 and fsdp one in bf16."""
COLUMNS = (("ok", "5"), ("beside_single", "13.1e"), ("resumed", "9.1e"), ("text", "8"))


def train(folder: Path, gpu: bool, *overrides: str) -> None:
    """The training command; without a GPU forked from a process that has imported it.

    Raises:
        RuntimeError: it failed; its last line.
    """
    # No launcher's ranks, and the root of the project to import from.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SWIFT_", "SLURM_"))}
    if gpu:
        command = [sys.executable, "-m", "swift.train", *overrides]
        done = subprocess.run(command, env=outside, capture_output=True, text=True)
    else:
        done = python_m("swift.train", *overrides, cwd=Path.cwd(), env=outside)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: status {done.returncode}: {' '.join(done.stderr.split()[-40:])}")


def losses(run_dir: Path) -> list[float]:
    """Of every step, the first first."""
    found = {
        int(record["step"]): record["train/loss"]
        for record in jsonl.read(run_dir / "metrics.jsonl")
        if "train/loss" in record
    }
    return [found[step] for step in sorted(found)]


def apart(a: list[float], b: list[float]) -> float:
    """Largest relative difference."""
    if len(a) != len(b) or not a:
        return float("inf")
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def run_of(bench: Bench, name: str) -> Path:
    """A run of 5 steps with all its checkpoints; made once."""
    run_dir = bench.folder / f"run-{name}"
    if not (run_dir / "summary.json").exists():
        side = 24 if bench.small else 96
        store = random_store(bench.folder / "strategies-store", (side, side, side), 2.0, 2, 120)
        shape = SMALL if bench.small else ["data.grid=[96,96,96]"]
        train(
            run_dir,
            bench.gpu,
            f"model={'tiny' if bench.small else '7m'}",
            "data=store",
            f"data.path={store}",
            "data.spacing=2.0",
            *shape,
            "data.workers=0",
            "data.batch_size=2",
            f"parallel={name}",
            "parallel.compile=false",  # ZeRO 3 cannot, and the losses of all are compared
            *([] if name == "single" else ["parallel.devices=1"]),
            f"trainer.max_steps={STEPS}",
            f"trainer.checkpoint_every={SAVED}",
            f"trainer.val_every={STEPS}",
            "trainer.val_batches=1",
            "trainer.keep_checkpoints=9",
            "trainer.log_every=1",
            "trainer.figures=false",
            f"trainer.accelerator={'gpu' if bench.gpu else 'cpu'}",
            "optimizer.warmup_steps=1",
            "optimizer.lr=1e-3",
            f"run_dir={run_dir}",
        )
    return run_dir


def one(bench: Bench, name: str) -> Row:
    """A row."""
    first, single = run_of(bench, name), run_of(bench, "single")
    found = losses(first)
    difference = apart(found, losses(single))
    # The same run, taken back to its checkpoint of step 3.
    again = bench.folder / f"again-{name}"
    shutil.copytree(first, again)
    for path in (again / "checkpoints").glob("step-*"):
        if int(path.name.split("-")[1].split(".")[0]) > SAVED:
            shutil.rmtree(path)
    for name_of_file in ("summary.json", "metrics.jsonl"):
        (again / name_of_file).unlink()
    train(again, bench.gpu, f"resume={again}")
    resumed = apart(losses(again), found[SAVED:])
    limit = LIMIT["bf16" if bench.gpu else "32"]
    ok = difference <= limit and resumed <= limit / 10
    text = " ".join(f"{loss:.5f}" for loss in found)
    return {"ok": ok, "beside_single": difference, "resumed": resumed, "losses": found, "text": text}


def cases(bench: Bench) -> list[Case]:
    """single first: the others are compared with it."""
    return [Case(name, lambda name=name: one(bench, name)) for name in NAMES]  # type: ignore[misc]


PART = Part(f"one rank: losses of {STEPS} steps beside single's, and resumed after {SAVED}", cases, COLUMNS)

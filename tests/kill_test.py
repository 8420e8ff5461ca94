"""kill -9 at random moments, saves included: nothing is lost, and the final weights are those of an undisturbed run.

    python -m tests.kill_test --kills 100 [--parallel single|zero1|...] [--ranks N] [--seed S] [--json]

A small training on the CPU is killed again and again, all ranks or one of them, and started again until it ends. After
every kill the checkpoint that `latest` names must be whole. At the end the losses of all steps, the samples behind them
and every bit of the weights and moments must be those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from swift.parallel.checkpoint import files as checkpoint
from swift.utils import jsonl
from tests.distributed import jobs
from tests.distributed.ranks import Running
from tests.small import small_store


class Plan(NamedTuple):
    """What is to be done: kills, optimizer steps, and the seconds of a step of the undisturbed run."""

    kills: int
    steps: int
    pace: float


RUN = ["trainer.val_every=7", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=2", "trainer.log_every=1"]


def overrides(parallel: str, ranks: int, steps: int) -> list[str]:
    """Of a run with a global batch of 4."""
    return [*RUN, f"parallel={parallel}", f"data.batch_size={4 // ranks}", f"trainer.max_steps={steps}"]


def check_loadable(run_dir: Path) -> int:
    """The step of the latest checkpoint, every byte of it compared; 0 before the first."""
    found = checkpoint.candidates(run_dir / "checkpoints")
    if not found:
        assert not (run_dir / "checkpoints" / checkpoint.LATEST).exists(), "`latest` names nothing"
        return 0
    manifest = checkpoint.Manifest.read(found[0])
    checkpoint.verify(found[0], manifest)
    return manifest.step


def kill(running: Running, rng: random.Random) -> None:
    """SIGKILL for all ranks, or for one of them, whose peers then end by themselves or are ended."""
    processes = running.processes
    for process in processes if rng.random() < 0.5 else [rng.choice(processes)]:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    running.end()


def progress(run_dir: Path) -> int:
    """Lines of rank 0's trace: grows with every optimizer step that any start has done."""
    path = run_dir / "trace-0.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def moment(run_dir: Path, running: Running, delay: float, rng: random.Random) -> bool:
    """Wait for the moment to kill: while it starts, some time after its first step, or while it saves.

    Returns:
        False if the run has ended before.
    """
    how = rng.choice(("start", "step", "step", "save", "save"))
    until = time.monotonic() + rng.uniform(0, 3.0) if how == "start" else None
    before = progress(run_dir)
    while running.alive():
        if until is None and progress(run_dir) > before:
            until = time.monotonic() + delay
        if until is not None and time.monotonic() >= until:
            if how != "save" or next((run_dir / "checkpoints").glob(".unfinished-*"), None) is not None:
                return True
        else:
            time.sleep(0.002)
    return False


def disturbed(
    store: Path, run_dir: Path, run: list[str], ranks: int, plan: Plan, rng: random.Random
) -> tuple[list[int], int]:
    """Run to the end with up to as many kills as planned; the steps found after each, and kills that cut off a save."""
    found: list[int] = []
    cut = 0
    while True:
        running = Running(jobs.traced, ranks, (store, run_dir, run))
        step = found[-1] if found else 0
        share = (plan.steps - step) / (plan.kills - len(found) + 1)
        if len(found) < plan.kills and moment(run_dir, running, rng.uniform(0, 2) * share * plan.pace, rng):
            kill(running, rng)
            cut += next((run_dir / "checkpoints").glob(".unfinished-*"), None) is not None
            found.append(check_loadable(run_dir))
            assert found[-1] >= step, f"went back from step {step} to {found[-1]}"
            continue
        running.results()
        return found, cut


def trajectory(run_dir: Path, ranks: int) -> dict[int, Any]:
    """For every step what the last process that did it saw: samples and loss."""
    seen: dict[int, Any] = {}
    for rank in range(ranks):
        for record in jsonl.read(run_dir / f"trace-{rank}.jsonl"):
            step = seen.setdefault(record["step"], {"samples": {}, "loss": {}})
            step["samples"][rank], step["loss"][rank] = record["samples"], record["loss"]
    return seen


def final(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, weights and moments, as bytes."""
    path = checkpoint.candidates(run_dir / "checkpoints")[0]
    manifest = checkpoint.Manifest.read(path)
    reader = checkpoint.Reader(path, manifest)
    kinds = (checkpoint.WEIGHT, "exp_avg", "exp_avg_sq")
    return {f"{kind}/{name}": reader.whole(kind, name).numpy().tobytes() for name in manifest.shapes for kind in kinds}


def kill_test(folder: Path, parallel: str, ranks: int, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Do it all; what was found.

    Raises:
        AssertionError: a checkpoint that cannot be loaded, a sample lost or repeated, or other weights at the end.
    """
    store = small_store(folder / "store")
    run = overrides(parallel, ranks, steps)
    calm, wild = folder / "calm", folder / "wild"
    Running(jobs.traced, ranks, (store, calm, run)).results()
    times = [record["time"] for record in jsonl.read(calm / "trace-0.jsonl")]
    plan = Plan(kills, steps, (times[-1] - times[0]) / (steps - 1))
    began = time.monotonic()
    found, cut = disturbed(store, wild, run, ranks, plan, random.Random(seed))
    expected, seen = trajectory(calm, ranks), trajectory(wild, ranks)
    assert sorted(seen) == list(range(1, steps + 1)), "steps are missing"
    for step in range(1, steps + 1):
        samples = sorted(sample for part in seen[step]["samples"].values() for sample in part)
        assert samples == list(range(4 * (step - 1), 4 * step)), f"step {step} took {samples}"
        assert seen[step] == expected[step], f"step {step} differs"
    assert final(wild) == final(calm), "other weights or moments at the end"
    return {
        "parallel": parallel,
        "ranks": ranks,
        "kills": len(found),
        "steps": steps,
        "distinct steps gone on from": len(set(found)),
        "killed before the first checkpoint": found.count(0),
        "kills that cut off a save": cut,
        "seconds": round(time.monotonic() - began, 1),
        "weights": "equal bit by bit",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps (default: 6 a kill)")
    parser.add_argument("--parallel", default="single")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = options.steps or max(6 * options.kills, 20)
        found = kill_test(Path(folder), options.parallel, options.ranks, options.kills, steps, options.seed)
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()

"""Steps on several devices: one process a device, gradients averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.bench.gpu.base import Bench, Row
from tests.bench.gpu.build import Step, settings, step_row


def stepped(bench: Bench, model: str, clips: int, weights: str, overrides: list[str]) -> Row:
    """The row of rank 0 of `bench.ranks` processes; clips/s are those of all.

    Raises:
        RuntimeError: a rank has failed; what it said last.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        task = {
            "model": model,
            "clips": clips,
            "weights": weights,
            "overrides": overrides,
            "small": bench.small,
            "device": bench.device.type,
            "card": bench.card,
            "out": str(Path(folder) / "row.json"),
        }
        started = []
        for rank in range(bench.ranks):
            place = {"RANK": rank, "WORLD_SIZE": bench.ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
            environment = (
                os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            )
            command = [sys.executable, "-m", "tests.bench.gpu.several", json.dumps(task)]
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        try:
            said = [process.communicate()[1] for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
        for rank, (process, text) in enumerate(zip(started, said)):
            if process.returncode:
                raise RuntimeError(f"rank {rank}: {' '.join(text.split()[-40:])}")
        row: Row = json.loads((Path(folder) / "row.json").read_text())
        return row


def run_rank(task: dict[str, Any]) -> None:
    """What one of the processes does."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = task["device"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=5))
    bench = Bench(device, task["small"], Path("."), card=task["card"], ranks=world, rank=rank)
    cfg = settings(bench, task["model"], *task["overrides"])
    step = Step(cfg, task["clips"], device, task["weights"])
    # Its own buffers are the same everywhere.
    step.module.model = DistributedDataParallel(
        step.module.model, [device] if gpu else None, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    row = step_row(step, bench.card, fixed=1 if bench.small else 5)
    row["clips_s"] *= world
    if rank == 0:
        Path(task["out"]).write_text(json.dumps(row | {"ranks": world}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(json.loads(sys.argv[1]))

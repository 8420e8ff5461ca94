"""What the ranks of a test run of a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from swift.config.compose import typed
from swift.parallel.setup import resolve
from swift.train.__main__ import settings
from swift.train.contrastive import distances, gathered, reconstructive_contrastive
from swift.train.init_weights import start_from
from swift.train.run import train
from swift.train.wiring import build_data, build_module, build_trainer, tell
from tests.cohort import task_command
from tests.distributed import jobs
from tests.maps import map_command
from tests.small import composed


def tune(folder: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """As the command does it: train, take the best weights, judge; the summary on rank 0."""
    own = task_command(folder, run_dir, "trainer.accelerator=cpu", "task=synthetic_binary", *overrides)
    return train(typed(composed(*own)), own)


def tune_maps(folder: Path, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """The same for a task of maps."""
    own = map_command(folder, run_dir, "trainer.accelerator=cpu", *overrides)
    return train(typed(composed(*own)), own)


def contrast(world: int, rank: int) -> tuple[float, list[float]]:
    """Loss and gradient of 8 clips of 5 subjects dealt to the ranks, averaged over ranks as DDP does."""
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    draw = torch.Generator().manual_seed(0)
    subject = torch.tensor([3, 1, 4, 1, 0, 2, 2, 3])
    features, maps = torch.randn(8, 6, generator=draw), torch.randn(5, 2, 7, generator=draw)
    mine = torch.arange(8).chunk(world)[rank]
    weight = torch.ones(6, 14).mul_(0.1).requires_grad_(True)
    out = gathered((features[mine] @ weight).view(-1, 2, 7), gradient=True)
    own, other = distances(out, gathered(maps[subject[mine]]), gathered(subject[mine]), (0, 5))
    loss = reconstructive_contrastive(own, other, 0.1, 3.0)
    loss.backward()
    assert weight.grad is not None
    if world > 1:
        torch.distributed.all_reduce(weight.grad)
        weight.grad /= world
        torch.distributed.destroy_process_group()
    return float(loss.detach()), weight.grad.flatten().tolist()


def contrast_here() -> tuple[float, list[float]]:
    """`contrast` in one of the ranks that a test has started."""
    return contrast(int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))


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

"""Measures step time and memory of masked pre-training on the device at hand: one point of a study of kind throughput.

A step is that of `parallel=single`: forward, backward, clipping and AdamW on one batch of noise, with the settings'
activation checkpointing and torch.compile. Lightning's loop, data and the guard are left out. Each point runs in a
process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.report.throughput import FILE
from swift.utils.errors import UserError

if TYPE_CHECKING:
    from swift.config.schema import Config

ROUNDS = 3


def measured(overrides: Sequence[str], folder: Path) -> bool:
    """Measure one point in a fresh process and write its file, unless that is there.

    Returns:
        Whether it was measured now.

    Raises:
        UserError: settings that no run could have.
    """
    if (folder / FILE).is_file():
        return False
    # A server that has imported torch but never used it: each child starts from it, with nothing on its conscience.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["swift.models.autoencoder", "swift.plan.planning", "hydra"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure_in_child, args=(list(overrides), theirs))
    child.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        child.join()
        raise UserError(f"{folder.name}: the measuring process ended with status {child.exitcode} (memory?)") from None
    child.join()
    if "error" in result:
        raise UserError(result["error"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return True


def _measure_in_child(overrides: list[str], answer: Any) -> None:
    from hydra import compose, initialize_config_dir

    from swift.config.compose import conf_dir, typed

    try:
        with initialize_config_dir(str(conf_dir()), version_base=None):
            cfg = typed(compose("config", overrides))
        answer.send(measure(cfg))
    except UserError as error:
        answer.send({"error": str(error)})


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM the most so far; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def measure(cfg: Config, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time and memory of training steps on the device at hand, and what the plan says of them."""
    import torch

    from swift.plan.devices import load_site
    from swift.plan.flops import model_flops
    from swift.plan.planning import make_plan
    from swift.utils import device as here

    if cfg.parallel.name != "single":
        raise UserError(
            f"parallel={cfg.parallel.name}: a study of kind throughput measures one device: parallel=single"
        )
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    device = here.torch_device(here.require(cfg.trainer.accelerator, "trainer.accelerator"))
    on_gpu = not here.on_host(device)
    try:
        plan = make_plan(cfg, load_site("local"), 1, cfg.data.batch_size, 1.0)
    except ValueError as error:
        raise UserError(str(error)) from error
    _wake(device)
    before = resident("VmRSS")
    step, forward = _work(cfg, device)
    # Twice: what is compiled or made on first use, moments among it; a pass without gradients has graphs of its own.
    step()
    step()
    forward()
    seconds = {"step_seconds": _timed(step, rounds, device), "forward_seconds": _timed(forward, rounds, device)}
    peak = here.memory(device)["peak"] if on_gpu else max(resident("VmHWM") - before, 0)
    return {
        "device": here.name() if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": cfg.model.name,
        "variant": cfg.model.variant,
        "grid": list(cfg.data.grid),
        "frames": cfg.data.frames,
        "batch": cfg.data.batch_size,
        "parameters": plan.geometry.total_parameters,
        "flops_per_clip": model_flops(plan.geometry).total,
        **seconds,
        "peak_bytes": peak,
        "plan": {"bytes": plan.chosen.memory.total, "step_seconds": None if plan.time is None else plan.time.seconds},
    }


def _wake(device: Any) -> None:
    """Use torch once: what its libraries take on first use is not the model's."""
    import torch

    with device:
        layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64))
        optimizer = torch.optim.AdamW(layer.parameters())
        x = layer(torch.randn(2, 4, 8, 64))
    torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
    optimizer.step()


def _work(cfg: Config, device: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step and a forward pass on clips of noise."""
    import torch

    from swift.parallel.recompute import prepare_blocks
    from swift.parallel.setup import resolve
    from swift.train.optim import build_optimizer
    from swift.train.pretrain import PretrainModule
    from swift.train.wiring import build_module
    from swift.utils import device as here

    setup = resolve(cfg)
    module = build_module(setup).to(device).train()
    assert isinstance(module, PretrainModule)
    model, volume = module.model, (*cfg.data.grid, cfg.data.frames)
    prepare_blocks(model, setup.cfg.parallel)
    optimizer = build_optimizer(model, cfg.optimizer, module.widths)
    parameters = list(model.parameters())
    with device:
        batch = {
            "bold": torch.randn(cfg.data.batch_size, 1, *volume),
            "brain": torch.ones(cfg.data.batch_size, *volume[:3], dtype=torch.bool),
            "sample_id": torch.arange(cfg.data.batch_size),
            "valid": torch.ones(cfg.data.batch_size, dtype=torch.bool),
        }
    half = not here.on_host(device) and cfg.trainer.precision != "32"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = module.loss(batch)
        loss.backward()
        if cfg.trainer.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, cfg.trainer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            module.reconstruct(batch)

    return step, forward


def _timed(work: Callable[[], None], rounds: int, device: Any) -> list[float]:
    from swift.utils.device import synchronize

    def now() -> float:
        """Seconds, with the device's queue empty."""
        synchronize(device)
        return time.perf_counter()

    found = []
    for _ in range(rounds):
        began = now()
        work()
        found.append(now() - began)
    return found

"""A training step on the box, on brain tokens, on visible units: CPU-seconds and memory. Run by `make bench`.

    python -m tests.bench.tokens [--model 51m] [--store DIR] [--rounds N] [--threads N] [--json]

A step is mask, forward pass, loss and backward pass of one clip of 96x96x96 voxels and 20 frames in float32. All take
turns on the same clip, so that other work on the machine falls on all; the minimum of CPU-seconds (user and system
time of all threads) over the rounds is kept. Threads that wait soon sleep, as in a run of swift: spinning is no work,
and takes longer the busier the machine is. Activation memory is what autograd keeps between the forward
and the backward pass, weights left out, and the most a process of its own needs beyond what it held before, minus the
gradients of the weights. The clip is the first of a store (--store, of `python -m swift.data ingest --grid 96
--spacing 2`), or noise in an ellipsoid that touches about as many patches as a brain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from swift.config.compose import composed
from swift.config.schema import Config
from swift.models.pooling import brain_tokens
from swift.train.pretrain import PretrainModule
from swift.train.wiring import build_data
from tests.bench.encoder import MIB, memory, wait_briefly
from tests.bench.gpu.build import make_batch, make_module

MODES: dict[str, list[str]] = {
    "box": ["model.tokens=box"],
    "brain": ["model.tokens=brain"],
    "drop": ["model.tokens=box", "task.hidden=drop", "task.mask_kind=tube"],
}
"""Box is the yardstick."""
CPU = torch.device("cpu")


def settings(model: str, store: str | None, mode: str) -> Config:
    """Of a pre-training run; of the small model in the tests' form on a small grid."""
    base = [f"model={model}", "data=store", f"data.path={store or 'none'}", "data.spacing=2.0", "data.frames=20"]
    base += ["data.grid=[96,96,96]", "data.batch_size=1", "data.workers=0", "model.maps=0", "model.decoder=local"]
    return composed([*base, *MODES[mode]])[0]


def first_clip(cfg: Config) -> dict[str, Tensor]:
    """One clip, as the loader hands it over."""
    if cfg.data.path == "none":
        return make_batch(cfg, 1, CPU)
    data = build_data(cfg)
    data.setup("fit")
    return data.dense(next(iter(data.train_dataloader())))


def kept_bytes(module: PretrainModule, batch: dict[str, Tensor]) -> int:
    """What autograd keeps of a forward pass, weights and the clip left out, every storage once."""
    given = [*module.parameters(), *module.buffers(), *batch.values()]
    known, found = {one.untyped_storage().data_ptr() for one in given}, {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = module.loss(batch)
        total = sum(found.values())
    del loss
    return total


def peak(model: str, store: str | None, mode: str) -> int:
    """Bytes that a step of a fresh process needs beyond what it held before, gradients of weights left out."""
    cfg = settings(model, store, mode)
    module, batch = make_module(cfg, CPU), first_clip(cfg)
    gradients = sum(parameter.numel() * 4 for parameter in module.parameters())
    before = memory("VmRSS")
    module.loss(batch).backward()
    return memory("VmHWM") - before - gradients


def measure(model: str, store: str | None, rounds: int, threads: int) -> dict[str, Any]:
    """Figures of every mode."""
    found: dict[str, Any] = {}
    modules: dict[str, PretrainModule] = {}
    for mode in MODES:
        cfg = settings(model, store, mode)
        modules[mode] = make_module(cfg, CPU)
        batch = first_clip(cfg)
        command = [sys.executable, "-m", "tests.bench.tokens", "--model", model, "--threads", str(threads)]
        command += [*(["--store", store] if store else []), "--peak", mode]
        most = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found[mode] = {"kept_mib": kept_bytes(modules[mode], batch) / MIB, "peak_mib": most / MIB}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode, module in modules.items():
            module.zero_grad(set_to_none=True)
            began = time.process_time()
            module.loss(batch).backward()
            times[mode].append(time.process_time() - began)
    for mode, values in times.items():
        found[mode]["cpu_seconds"] = min(values)
    cfg = settings(model, store, "brain")
    shares = [
        float(brain_tokens(batch["brain"], cfg.model.patch_size, s).float().mean())
        for s in range(len(cfg.model.depths))
    ]
    return {"torch": torch.__version__, "model": model, "threads": threads, "brain_shares": shares, "modes": found}


def table(row: dict[str, Any]) -> str:
    """For people."""
    shares = ", ".join(f"{100 * share:.0f} %" for share in row["brain_shares"])
    lines = [
        f"training step of model={row['model']}, one clip of 96x96x96x20, {row['threads']} threads; "
        f"brain tokens of stages 1 to {len(row['brain_shares'])}: {shares}",
        f"{'mode':<14}" + "".join(f"{name:>12}{'to box':>8}" for name in ("CPU-seconds", "kept, MiB", "peak, MiB")),
    ]
    box = row["modes"]["box"]
    for mode, values in row["modes"].items():
        line = f"{mode:<14}"
        for name, width, digits in (("cpu_seconds", 12, 2), ("kept_mib", 12, 0), ("peak_mib", 12, 0)):
            line += f"{values[name]:>{width}.{digits}f}{values[name] / box[name]:>8.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tokens", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="51m", help="a size of conf/model (51m)")
    parser.add_argument("--store", help="a store at 96x96x96 voxels, for a real clip")
    parser.add_argument("--rounds", type=int, default=2, help="the minimum of so many turns is kept (2)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wait_briefly("tests.bench.tokens")
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.model, options.store, options.peak))
        return
    row = measure(options.model, options.store, options.rounds, options.threads)
    print(json.dumps(row, indent=2) if options.json else table(row))


if __name__ == "__main__":
    main()

"""model=v1 beside SwiFT v1's own code on a CPU: CPU-seconds, the same weights and clip.

    python -m tests.bench.v1 FOLDER [--rounds N] [--threads N] [--small] [--json]

FOLDER holds two files of Transconnectome/SwiFT at 0b07cb1 (project/module/models): swin4d_transformer_ver7.py and
patchembedding.py. They are imported from there and need monai. A clip has 96x96x96 voxels and 20 frames (--small:
24x24x24 and 4), float32. A step is a forward pass and the gradients of all weights. First outputs and gradients are
compared. Then each has a process of its own, as one needs memory that the other has given back; they take turns, so
that other work on the machine falls on both, and the minimum over the rounds is kept. CPU-seconds are user and system
time of all threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift.models.encoder import SwinEncoder
from swift.models.v1 import load_v1
from swift.utils.entry import reported
from tests.bench.encoder import seconds, settings, wait_briefly
from tests.bench.gpu.build import SMALL
from tests.bench.gpu.v1 import pair, quiet

ALLOWED = 1e-4
"""Difference of outputs and of gradients, relative to the largest value of a tensor: float32 sums in another order."""


class Both:
    """Both encoders and a clip. Work is "forward" or "step", of "v1" or "swift"."""

    def __init__(self, folder: Path, small: bool) -> None:
        grid, frames = ((24, 24, 24), 4) if small else ((96, 96, 96), 20)
        self.model = settings(["model=v1", *(SMALL[2:] if small else [])])
        torch.manual_seed(0)
        self.size = (*grid, frames)
        self.theirs, self.ours = pair(folder, self.model, grid, frames)
        self.clip = torch.randn(1, 1, *self.size)

    def work(self, who: str, kind: str) -> Tensor:
        """Do it once. The output (B, C, x, y, z, t) of the last stage; a step leaves the gradients at the weights."""
        module: nn.Module = self.theirs if who == "v1" else self.ours
        module.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(kind == "step"), quiet(gpu=False):
            found = module(self.clip)
            out: Tensor = found if who == "v1" else found[-1].movedim(-1, 1)
            if kind == "step":
                out.square().mean().backward()
        return out.detach()

    def difference(self) -> float:
        """Largest difference of outputs and gradients, relative to the largest value of each tensor.

        Raises:
            SystemExit: it is more than rounding.
        """
        outputs = [(self.work("swift", "step"), self.work("v1", "step"))]
        gradients = {name: p.grad for name, p in self.theirs.named_parameters() if p.grad is not None}
        # The import of weights brings the gradients under our names and into our shapes too.
        expected = SwinEncoder(self.model, self.size[:3], self.size[3])
        load_v1(expected, gradients)
        named = dict(expected.named_parameters())
        pairs = [(p.grad, named[name].detach()) for name, p in self.ours.named_parameters() if p.grad is not None]
        assert len(pairs) == len(gradients), "a weight has a gradient on one side only"
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in outputs + pairs)
        if not worst <= ALLOWED:
            raise SystemExit(f"outputs or gradients differ by {worst:.1e}: not worth timing")
        return worst


def serve(pipe: Connection, folder: Path, small: bool, who: str, threads: int) -> None:
    """A process of one encoder's own: it does what it is told, and answers with the CPU-seconds that took."""
    torch.set_num_threads(threads)
    both = Both(folder, small)
    while kind := pipe.recv():
        pipe.send(seconds(partial(both.work, who), kind))


def measure(folder: Path, rounds: int, threads: int, small: bool) -> dict[str, Any]:
    """CPU-seconds of both and their ratio by kind of work, and the largest difference."""
    found: dict[str, Any] = {"largest_difference": Both(folder, small).difference()}
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for who in ("v1", "swift"):
        pipes[who], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, folder, small, who, threads), daemon=True).start()
    for kind in ("forward", "step"):
        times: dict[str, list[float]] = {who: [] for who in pipes}
        for _ in range(rounds):
            for who, pipe in pipes.items():
                pipe.send(kind)
                times[who].append(pipe.recv())
        best = {who: min(values) for who, values in times.items()}
        found[kind] = {**best, "ratio": best["swift"] / best["v1"]}
    for pipe in pipes.values():
        pipe.send(None)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.v1", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with the two model files of SwiFT v1")
    parser.add_argument("--rounds", type=int, default=6, help="the minimum of so many turns is kept (6)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--small", action="store_true", help="a clip of 24x24x24x4, to try it")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(arguments)
    if arguments is None:
        wait_briefly("tests.bench.v1")
    torch.set_num_threads(options.threads)
    found = measure(options.folder, options.rounds, options.threads, options.small)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": options.threads, **found}))
        return
    print(f"torch {torch.__version__}, {options.threads} threads, minimum of {options.rounds} rounds, CPU-seconds")
    print(f"{'':<10}{'SwiFT v1':>10}{'model=v1':>10}{'ratio':>8}")
    for kind in ("forward", "step"):
        row = found[kind]
        print(f"{kind:<10}{row['v1']:>10.3f}{row['swift']:>10.3f}{row['ratio']:>8.3f}")
    print(f"outputs and gradients differ by {found['largest_difference']:.1e} of the largest value of a tensor")


if __name__ == "__main__":
    reported(main)

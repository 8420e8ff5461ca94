"""Our encoder against the slow reference: CPU-seconds and peak memory. Run by `make bench`.

    python -m tests.bench.encoder [--rounds N] [--threads N] [--json]

Both compute the same (checked here to 1e-4) from the same weights and clip, in float32. They take turns, so that other
work on the machine falls on both, and the minimum over the rounds is kept. CPU-seconds are user and system time of all
threads; a step is a forward pass and the gradients of all weights. Peak memory is what a process of its own, one for
each encoder and size, needs beyond what it held before: first for a forward pass, then for a step, which needs more.

The reference makes a full N x N softmax for every head, so it is timed on a small clip: 18x18x12 voxels and 8 frames in
patches of 3x3x3x1, that is 6x6x4x8 = 1152 tokens, windows of 4x4x4x4, E = 36, two stages of two blocks. Ours alone is
also timed at the size that people use: model=v1, E = 36, 96x96x96 voxels and 20 frames.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from swift.config.compose import conf_dir, typed
from swift.config.schema import ModelConfig
from swift.models.encoder import SwinEncoder
from tests.models import reference

SMALL = ["model.embed_dim=36", "model.depths=[2,2]", "model.num_heads=[3,6]", "model.patch_size=[3,3,3,1]"]
SMALL += ["model.window=[4,4,4,4]"]
SIZES: dict[str, tuple[list[str], tuple[int, int, int], int]] = {
    "v1": (["model/variant=v1", *SMALL], (18, 18, 12), 8),
    "joint": (["model/variant=joint", *SMALL], (18, 18, 12), 8),
    "factorized": (["model/variant=factorized", *SMALL], (18, 18, 12), 8),
    "v1 96x96x96x20": (["model=v1"], (96, 96, 96), 20),
}
WORK = ("forward", "step")
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
"""How the threads of torch wait for each other."""
MIB = 2**20


def wait_briefly(module: str) -> None:
    """Start this command anew, so that threads that wait soon sleep: as swift does for its commands.

    torch is imported by now, and read nothing. Spinning is no work, and takes longer the busier the machine is.
    """
    if not WAITING & os.environ.keys():
        os.execve(
            sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | {"GOMP_SPINCOUNT": "1000"}
        )


def settings(overrides: list[str]) -> ModelConfig:
    with initialize_config_dir(str(conf_dir()), version_base=None):
        return typed(compose("config", ["data=store", "data.path=none", *overrides])).model


def prepare(size: str, who: str) -> Callable[[str], list[Tensor]]:
    """A function that does "forward" or "step" once and gives the features, or the gradients."""
    overrides, grid, frames = SIZES[size]
    cfg = settings(overrides)
    generator = torch.Generator().manual_seed(0)
    state = reference.random_state(reference.parameter_shapes(cfg, grid, frames), generator)
    state = {name: value.float() for name, value in state.items()}
    clip = torch.randn(1, 1, *grid, frames, generator=generator)
    if who == "ours":
        model = SwinEncoder(cfg, grid, frames)
        model.load_state_dict(state)
        named = dict(model.named_parameters())

        def encode() -> list[Tensor]:
            return model(clip)
    else:
        named = state

        def encode() -> list[Tensor]:
            return reference.encode(cfg, grid, frames, state, clip)

    def work(kind: str) -> list[Tensor]:
        if kind == "forward":
            with torch.no_grad():
                return encode()
        weights = [named[name].requires_grad_(True) for name in sorted(named)]
        loss = torch.stack([feature.square().mean() for feature in encode()]).sum()
        # v1's last norm is never applied: it has no gradient.
        return [gradient for gradient in torch.autograd.grad(loss, weights, allow_unused=True) if gradient is not None]

    return work


def check(size: str, ours: Callable[[str], list[Tensor]], slow: Callable[[str], list[Tensor]]) -> float:
    """Largest difference of features and gradients, relative to the largest value of each tensor."""
    worst = 0.0
    for kind in WORK:
        for a, b in zip(ours(kind), slow(kind), strict=True):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    if worst > 1e-3:
        raise SystemExit(f"{size}: ours and the reference differ by {worst:.1e}: not worth timing")
    return worst


def seconds(work: Callable[[str], object], kind: str) -> float:
    """CPU-seconds of all threads."""
    began = time.process_time()
    work(kind)
    return time.process_time() - began


def memory(field: str) -> int:
    """Bytes of this process in memory: VmRSS, now; VmHWM, the most so far (getrusage's would count its parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("peak memory is read from /proc: Linux only")


def peaks(size: str, who: str) -> dict[str, int]:
    """Bytes that each kind of work needs at most beyond what the process holds before; of a fresh process only."""
    work = prepare(size, who)
    before = memory("VmRSS")
    found = {}
    for kind in WORK:
        work(kind)
        found[kind] = memory("VmHWM") - before
    return found


def peaks_elsewhere(size: str, who: str, threads: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.bench.encoder", "--threads", str(threads), "--peaks", size, who]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for every size and kind of work."""
    rows = []
    for size in SIZES:
        makers = {who: prepare(size, who) for who in (("ours", "reference") if " " not in size else ("ours",))}
        difference = check(size, makers["ours"], makers["reference"]) if len(makers) == 2 else None
        needed = {who: peaks_elsewhere(size, who, threads) for who in makers}
        for kind in WORK:
            times: dict[str, list[float]] = {who: [] for who in makers}
            for _ in range(rounds):
                for who, work in makers.items():
                    times[who].append(seconds(work, kind))
            row: dict[str, Any] = {"size": size, "work": kind, "largest_difference": difference}
            for who, values in times.items():
                row[who] = {"cpu_seconds": min(values), "peak_mib": needed[who][kind] / MIB}
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':<16}{'':<9}{'CPU-seconds':>24}{'':>8}  {'peak memory, MiB':>22}",
        f"{'size':<16}{'work':<9}{'ours':>10}{'reference':>14}{'ratio':>8}  {'ours':>10}{'reference':>12}",
    ]
    for row in rows:
        ours, slow = row["ours"], row.get("reference")
        line = f"{row['size']:<16}{row['work']:<9}{ours['cpu_seconds']:>10.3f}"
        line += f"{slow['cpu_seconds']:>14.3f}{ours['cpu_seconds'] / slow['cpu_seconds']:>8.3f}" if slow else " " * 22
        line += f"  {ours['peak_mib']:>10.0f}" + (f"{slow['peak_mib']:>12.0f}" if slow else "")
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="the minimum of so many turns is kept (3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--peaks", nargs=2, metavar=("SIZE", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    wait_briefly("tests.bench.encoder")
    torch.set_num_threads(options.threads)
    if options.peaks:
        print(json.dumps(peaks(*options.peaks)))
        return
    rows = measure(options.rounds, options.threads)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": options.threads, "rows": rows}, indent=2))
        return
    print(
        f"torch {torch.__version__}, float32, {options.threads} threads, minimum of {options.rounds} rounds in turn\n"
    )
    print(table(rows))
    print("\nthe first three sizes: E=36, 18x18x12 voxels, 8 frames, 1152 tokens; reference: tests/models/reference.py")


if __name__ == "__main__":
    main()

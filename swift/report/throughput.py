"""Step time and memory of masked pre-training by size, variant and clip length, measured here, beside the plan.

Reads POINT/throughput.json (made by a study of kind throughput). A step: forward, backward and AdamW on one device and
one clip of noise; each point in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swift.report.points import say
from swift.utils.errors import UserError

if TYPE_CHECKING:
    from swift.config.schema import Config

FILE = "throughput.json"
ROUNDS = 3
COLUMNS = (
    "point",
    "device",
    "model",
    "variant",
    "frames",
    "batch",
    "parameters",
    "gflop_a_clip",
    "step_s",
    "step_low_s",
    "step_high_s",
    "planned_step_s",
    "forward_s",
    "gflop_a_s",
    "peak_mib",
    "planned_mib",
)


# ------------------------------------------------------------------------------------------------------------ measuring
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

    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    cuda = torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    try:
        plan = make_plan(cfg, load_site("local"), 1, cfg.data.batch_size, 1.0)
    except ValueError as error:
        raise UserError(str(error)) from error
    _wake(device)
    before = resident("VmRSS")
    step, forward = _work(cfg, device)
    step()
    seconds = {"step_seconds": _timed(step, rounds, device), "forward_seconds": _timed(forward, rounds, device)}
    peak = torch.cuda.max_memory_allocated() if cuda else max(resident("VmHWM") - before, 0)
    return {
        "device": torch.cuda.get_device_name(0) if cuda else "CPU",
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
        "plan": {
            "bytes": plan.chosen.memory.total,
            "step_seconds": None if plan.time is None else plan.time.seconds,
        },
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

    from swift.config.check import mask_unit
    from swift.models.autoencoder import MaskedAutoencoder, reconstruction_loss
    from swift.models.masking import draw_mask, mask_voxels

    torch.manual_seed(cfg.seed)
    volume = (*cfg.data.grid, cfg.data.frames)
    with device:
        model = MaskedAutoencoder(cfg.model, cfg.data.grid, cfg.data.frames)
        clip = torch.randn(cfg.data.batch_size, 1, *volume)
        sample = torch.arange(cfg.data.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    unit = mask_unit(cfg.task, cfg.model)
    mask = draw_mask(0, sample, volume, cfg.model.patch_size, unit, cfg.task.mask_ratio, cfg.task.mask_kind)
    counted = mask_voxels(mask, cfg.model.patch_size, volume)
    half = device.type == "cuda" and cfg.trainer.precision != "32"

    def predicted() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            found: torch.Tensor = model(clip, mask)
        return found

    def step() -> None:
        reconstruction_loss(predicted(), clip, counted, cfg.task.loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            predicted()

    return step, forward


def _timed(work: Callable[[], None], rounds: int, device: Any) -> list[float]:
    import torch

    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


# ----------------------------------------------------------------------------------------------------------- the report
def load(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Measured points of folders, each with its name under "point".

    Raises:
        UserError: a folder without one, or a damaged file.
    """
    files: list[Path] = []
    for folder in folders:
        found = [folder / FILE] if (folder / FILE).is_file() else sorted(folder.glob(f"*/{FILE}"))
        if not found:
            raise UserError(
                f"{folder}: no {FILE} in it; python -m swift.study experiments/throughput/laptop.yaml makes it"
            )
        files += found
    points = []
    for file in files:
        try:
            point = json.loads(file.read_text(encoding="utf-8"))
            assert point["step_seconds"]
            assert point["plan"]["bytes"] > 0
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{file}: damaged ({error})") from error
        points.append(point | {"point": file.parent.name})
    return points


def rows(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """COLUMNS of every point: the median of the rounds, the fastest and the slowest."""
    found = []
    for point in points:
        step, work = float(np.median(point["step_seconds"])), point["flops_per_clip"] * point["batch"]
        row = {
            "gflop_a_clip": point["flops_per_clip"] / 1e9,
            "step_s": step,
            "step_low_s": float(min(point["step_seconds"])),
            "step_high_s": float(max(point["step_seconds"])),
            "planned_step_s": point["plan"]["step_seconds"],
            "forward_s": float(np.median(point["forward_seconds"])),
            "gflop_a_s": work / step / 1e9,
            "peak_mib": point["peak_bytes"] / 2**20,
            "planned_mib": point["plan"]["bytes"] / 2**20,
        }
        found.append({name: row[name] if name in row else point[name] for name in COLUMNS})
    return sorted(found, key=lambda row: (row["variant"], row["frames"], row["parameters"]))


def table(found: Sequence[dict[str, Any]]) -> str:
    """As text."""
    lines = [
        f"{'variant':<11} {'model':<7} {'frames':>6} {'parameters':>12} {'GFLOP/clip':>11} {'step, s':>9} "
        f"{'planned':>9} {'GFLOP/s':>8} {'peak MiB':>9} {'planned':>8}"
    ]
    for row in found:
        planned = "-" if row["planned_step_s"] is None else f"{row['planned_step_s']:.3f}"
        lines.append(
            f"{row['variant']:<11} {row['model']:<7} {row['frames']:>6} {row['parameters']:>12,} "
            f"{row['gflop_a_clip']:>11.2f} {row['step_s']:>9.3f} {planned:>9} {row['gflop_a_s']:>8.1f} "
            f"{row['peak_mib']:>9.0f} {row['planned_mib']:>8.0f}"
        )
    devices = sorted({row["device"] for row in found})
    lines.append(f"device: {', '.join(devices)}")
    if any(row["planned_step_s"] is None for row in found):
        lines.append("planned step time: - where the device's peak is not known (a CPU); none is guessed")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `python -m swift.report throughput`."""
    parser.add_argument("runs", nargs="+", metavar="FOLDER", type=Path, help="of measured points, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="for the figure and CSV (.)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Read, draw, print."""
    found = rows(load(args.runs))
    from swift.report.figures.throughput import draw

    draw(found, args.out / "throughput.png")
    with (args.out / "throughput.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in found)
    print(json.dumps(found, indent=2) if args.json else table(found))
    say([f"wrote {args.out / name}" for name in ("throughput.png", "throughput.csv")])
    return 0

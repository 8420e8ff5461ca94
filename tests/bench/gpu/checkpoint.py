"""How long a save in the background stops training, and what it costs the steps beside it."""

from __future__ import annotations

import time

from swift.parallel.checkpoint.files import Manifest
from swift.parallel.checkpoint.pieces import module_pieces, parameter_shapes
from swift.parallel.checkpoint.saver import Saver
from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import Step, settings
from tests.bench.gpu.measure import milliseconds, synchronize

COLUMNS = (
    ("gb", "7.2f"),
    ("stall_ms", "9.1f"),
    ("gb_s", "7.2f"),
    ("alone_ms", "9.1f"),
    ("beside_ms", "9.1f"),
    ("disk_s", "7.2f"),
)


def one(bench: Bench, model: str, clips: int, background: bool) -> Row:
    """A row: the second save, as memory for the first has been made."""
    step = Step(settings(bench, model), clips, bench.device, "fp32" if bench.small else "mixed")
    alone = milliseconds(step, bench.device, 0.05 if bench.small else 1.0)
    saver = Saver(0, 1, 1, background, timeout=600)
    saver.where = bench.device
    shapes = {name: list(shape) for name, shape in parameter_shapes(step.module).items()}
    row: Row = {"alone_ms": alone}
    for number in (1, 2):
        draft = Manifest(number, None, {}, shapes, {}, {}, 1, number)
        synchronize(bench.device)
        began = time.perf_counter()
        saver.save(bench.folder / "checkpoints", list(module_pieces(step.module, step.optimizer, 0, 1)), draft)
        synchronize(bench.device)
        stopped = time.perf_counter()
        saver.before_step()
        for _ in range(3):
            step()
        synchronize(bench.device)
        beside = 1000 * (time.perf_counter() - stopped) / 3
        saver.finish()
        row |= {"stall_ms": 1000 * (stopped - began), "beside_ms": beside, "disk_s": time.perf_counter() - began}
    row["gb"] = 12 * sum(parameter.numel() for parameter in step.module.parameters()) / 1e9
    row["gb_s"] = row["gb"] / (row["stall_ms"] / 1000)
    return row


def cases(bench: Bench) -> list[Case]:
    """In the background, and not, for comparison."""
    shapes = [("tiny", 1)] if bench.small else [("202m", 4), ("806m", 2)]
    return [
        Case(
            f"{model} {'in the background' if background else 'synchronous'}",
            lambda k=(model, clips, background): one(bench, *k),  # type: ignore[misc]
        )
        for model, clips in shapes
        for background in (True, False)
    ]


PART = Part("stall of a checkpoint: weights and moments in fp32 to host memory, then to the disk", cases, COLUMNS)

"""Forward and backward of one block at each stage of 806m, and of each of its branches."""

from __future__ import annotations

from typing import Any

import torch

from swift.models.encoder import SwinEncoder
from swift.parallel.recompute import prepare_blocks
from swift.plan.flops import block_flops, branch_flops
from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import geometry_of, settings
from tests.bench.gpu.measure import kernels, milliseconds

COLUMNS = (("ms", "9.3f"), ("share", "7.1%"), ("mfu_card", "7.1%"), ("kernels", "7d"))


def passes(module: torch.nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Any:
    """What a call of forward and backward is, gradients dropped."""

    def work() -> None:
        module(x).backward(gradient)
        module.zero_grad(set_to_none=True)
        x.grad = None

    return work


def encoder_of(bench: Bench, model: str, compiled: bool = False) -> tuple[SwinEncoder, Any]:
    """An encoder in bf16 (float32 in small form) with random weights, and the settings."""
    cfg = settings(bench, model, f"parallel.compile={str(compiled).lower()}")
    with torch.device("meta"):
        encoder = SwinEncoder(cfg.model, cfg.data.grid, cfg.data.frames)
    encoder.to_empty(device=bench.device)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if not bench.small:
        encoder.bfloat16()
    prepare_blocks(encoder, cfg.parallel)
    return encoder, cfg


def tokens(bench: Bench, encoder: SwinEncoder, stage: int, clips: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a stage's block and a gradient of its output."""
    dtype = torch.float32 if bench.small else torch.bfloat16
    shape = (clips, *encoder.grids[stage], width)
    x = torch.randn(shape, device=bench.device, dtype=dtype, requires_grad=True)
    return x, torch.randn(shape, device=bench.device, dtype=dtype)


def one(bench: Bench, model: str, clips: int, stage: int, shifted: bool, compiled: bool) -> Row:
    """A block: its time, and each branch's."""
    encoder, cfg = encoder_of(bench, model, compiled)
    geometry = geometry_of(cfg)
    number = 1 if shifted else 0
    block = encoder.stages[stage].get_submodule(f"blocks.{number}")
    shape = geometry.stages[stage].blocks[number]
    x, gradient = tokens(bench, encoder, stage, clips, shape.width)
    seconds, rate = (0.03 if bench.small else 0.4), bench.card["matrix_tflops"] * 1e12

    def figures(work: Any, flops: float) -> Row:
        ms = milliseconds(work, bench.device, seconds)
        used = clips * flops / (ms / 1000) / rate
        return {"ms": ms, "mfu_card": used, "kernels": kernels(work, bench.device).count}

    row = figures(passes(block, x, gradient), block_flops(shape).total)
    row["branches"] = {}
    if not compiled:
        for branch in shape.branches:
            found = figures(passes(block.get_submodule(branch.name), x, gradient), branch_flops(branch).total)
            row["branches"][branch.name] = found | {"share": found["ms"] / row["ms"]}
    return row


def spread(row: Row) -> str:
    """The branches of a row in one text."""
    return "  ".join(
        f"{name} {found['ms']:.3f} ms ({found['share']:.0%}, {found['kernels']} kernels, {found['mfu_card']:.0%})"
        for name, found in row["branches"].items()
    )


def cases(bench: Bench) -> list[Case]:
    """Stage 1 first: it has the most tokens and the least arithmetic."""
    model, clips, stages = ("tiny", 1, (0, 1)) if bench.small else ("806m", 8, (0, 2, 1, 3))

    def work(stage: int, shifted: bool, compiled: bool) -> Row:
        row = one(bench, model, clips, stage, shifted, compiled)
        row["text"] = spread(row)
        return row

    kinds = [
        (stage, shifted, compiled)
        for compiled in ((False,) if bench.small else (False, True))
        for stage in stages
        for shifted in (True, False)
    ]
    return [
        Case(
            f"{model} {clips} clips stage {stage + 1} {'shifted' if shifted else 'plain'}"
            f" {'compiled' if compiled else 'eager'}",
            lambda kind=(stage, shifted, compiled): work(*kind),  # type: ignore[misc]
        )
        for stage, shifted, compiled in kinds
    ]


PART = Part(
    "a block at each stage of 806m, forward + backward, by branch", cases, (*COLUMNS[:1], *COLUMNS[2:], ("text", "8"))
)

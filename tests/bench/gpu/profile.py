"""Kernels of one step by time: what to mend first."""

from __future__ import annotations

from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import Step, settings
from tests.bench.gpu.measure import kernels, milliseconds
from tests.bench.gpu.steps import name_of, overrides

COLUMNS = (("ms", "9.1f"), ("busy_ms", "9.1f"), ("kernels", "7d"), ("names", "5d"), ("text", "8"))
TOP = 25


def one(bench: Bench, model: str, clips: int, weights: str, compiled: bool, recompute: str) -> Row:
    """A row with the longest kernels."""
    cfg = settings(bench, model, *overrides(weights, compiled, recompute))
    step = Step(cfg, clips, bench.device, weights)
    ms = milliseconds(step, bench.device, 0.05 if bench.small else 1.0, warm=3)
    seen = kernels(step, bench.device)
    top = list(seen.by_name.items())[:TOP]
    lines = [
        f"{took:9.3f} ms {took / max(seen.busy_ms, 1e-9):6.1%} x{count:<5} {name[:110]}" for name, (count, took) in top
    ]
    return {
        "ms": ms,
        "busy_ms": seen.busy_ms,
        "kernels": seen.count,
        "names": len(seen.by_name),
        "top": {name: list(value) for name, value in top},
        "text": "\n      " + "\n      ".join(lines),
    }


def cases(bench: Bench) -> list[Case]:
    """The shapes of the targets."""
    kinds = (
        [("tiny", 1, "mixed", False, "none")]
        if bench.small
        else [
            ("806m", 8, "bf16", True, "none"),
            ("806m", 8, "bf16", False, "none"),
            ("3b", 4, "bf16", True, "block"),
            ("51m", 16, "mixed", True, "none"),
            ("806m", 8, "mixed", True, "none"),
        ]
    )
    return [Case(name_of(*kind), lambda kind=kind: one(bench, *kind)) for kind in kinds]  # type: ignore[misc]


PART = Part(f"kernels of a step by time, the {TOP} longest", cases, COLUMNS)

"""The whole pre-training step: sizes, micro-batches, eager and compiled, with and without recomputation."""

from __future__ import annotations

from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import Step, settings, step_row
from tests.bench.gpu.several import stepped

PARALLEL = {"mixed": "single", "bf16": "zero1"}
FIRST = [
    # The shapes of the targets.
    ("806m", 8, "bf16", True, "none"),
    ("806m", 8, "bf16", False, "none"),
    ("3b", 4, "bf16", True, "block"),
    ("3b", 4, "bf16", False, "block"),
    ("806m", 8, "mixed", True, "none"),
    ("806m", 4, "mixed", False, "none"),
    ("51m", 16, "bf16", True, "none"),
    ("1b2", 4, "bf16", True, "none"),
    ("202m", 8, "bf16", True, "none"),
    ("51m", 16, "mixed", False, "none"),
    ("3b", 1, "bf16", True, "none"),
    ("7m", 16, "bf16", True, "none"),
]
SIZES, CLIPS = ("806m", "3b", "51m", "202m", "1b2", "7m"), (8, 4, 16, 2, 1)
COLUMNS = (
    ("ms", "9.1f"),
    ("clips_s", "8.2f"),
    ("mfu", "6.1%"),
    ("mfu_card", "6.1%"),
    ("hfu", "6.1%"),
    ("kernels", "6d"),
    ("idle", "6.1%"),
    ("waits", "4d"),
    ("peak_gib", "7.2f"),
    ("plan_gib", "7.2f"),
    ("peak/plan", "6.3f"),
)


def name_of(model: str, clips: int, weights: str, compiled: bool, recompute: str) -> str:
    """Of a case."""
    return f"{model} {clips} clips {weights} {'compiled' if compiled else 'eager'} recompute={recompute}"


def overrides(weights: str, compiled: bool, recompute: str) -> list[str]:
    """Settings of a step of this kind."""
    return [
        f"parallel={PARALLEL[weights]}",
        f"parallel.compile={str(compiled).lower()}",
        f"parallel.activation_checkpointing={recompute}",
    ]


def one(bench: Bench, model: str, clips: int, weights: str, compiled: bool, recompute: str) -> Row:
    """A row."""
    if bench.ranks > 1:
        return stepped(bench, model, clips, weights, overrides(weights, compiled, recompute))
    cfg = settings(bench, model, *overrides(weights, compiled, recompute))
    return step_row(Step(cfg, clips, bench.device, weights), bench.card, seconds=0.05 if bench.small else 1.5)


def cases(bench: Bench) -> list[Case]:
    """The shapes of the targets first, then all others."""
    if bench.small:
        chosen = [("tiny", 2, "mixed", False, "none"), ("7m", 1, "bf16", False, "block")]
    else:
        every = [
            (model, clips, weights, compiled, recompute)
            for model in SIZES
            for recompute in ("none", "block")
            for weights in ("bf16", "mixed")
            for compiled in (True, False)
            for clips in CLIPS
        ]
        chosen = FIRST + [kind for kind in every if kind not in FIRST]
    ranks = f" {bench.ranks} ranks" if bench.ranks > 1 else ""
    return [Case(name_of(*kind) + ranks, lambda kind=kind: one(bench, *kind)) for kind in chosen]  # type: ignore[misc]


PART = Part("the whole step: clips/s, MFU, kernels, idle share, memory beside the plan", cases, COLUMNS)

"""Runs as points of a study: their size, what they have seen and computed, whether they have ended. From files only.

What a step holds follows from metrics.jsonl: clips a step = perf/clips_per_second x perf/step_seconds, tokens and FLOPs
of a clip from perf/tokens_per_second and perf/tflops. So it is true for any number of ranks, and torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swift.report.runs import Run, load_run
from swift.utils.errors import UserError

TOKENISATION = (
    "model.patch_size",
    "data.grid",
    "data.spacing",
    "data.frames",
    "data.frame_stride",
    "data.normalization",
)
"""Settings that say what a token is, and in which unit the loss is."""
OBJECTIVE = ("task.name", "task.mask_ratio", "task.mask_kind", "task.mask_unit", "task.loss", "task.loss_background")
"""Settings that say what the loss measures."""


@dataclass(frozen=True)
class Point:
    """A run, in numbers.

    Attributes:
        run: Its files.
        steps: Optimizer steps done.
        max_steps: Optimizer steps wanted; None where the run does not say.
        clips_per_step: Of all ranks.
        tokens_per_clip: Patch tokens.
        flops_per_clip: Forward and backward.
        restarts: Steps from which it went on.
        finished: It has a summary and has done all its steps.
    """

    run: Run
    steps: int
    max_steps: int | None
    clips_per_step: float
    tokens_per_clip: float
    flops_per_clip: float
    restarts: tuple[int, ...]
    finished: bool

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.run.name

    @property
    def parameters(self) -> float:
        """Parameters of the model in pre-training (encoder, mask token, decoder)."""
        return float(self.run.summary["parameters"])

    @property
    def loss(self) -> float:
        """Last held-out loss."""
        return float(self.run.summary["val_l1"])

    def per_step(self, axis: str) -> float:
        """What one optimizer step adds to steps | clips | tokens | flops."""
        return {
            "steps": 1.0,
            "clips": self.clips_per_step,
            "tokens": self.clips_per_step * self.tokens_per_clip,
            "flops": self.clips_per_step * self.flops_per_clip,
        }[axis]

    def total(self, axis: str) -> float:
        """Steps, clips, tokens or FLOPs of the whole run."""
        return self.steps * self.per_step(axis)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Run directories among `paths`; a folder that is none stands for the run directories in it.

    Raises:
        UserError: a folder that neither is nor holds one, or none at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if (path / "metrics.jsonl").is_file() or (path / "config.yaml").is_file() or not path.is_dir():
            found.append(path)
            continue
        inside = sorted(child.parent for child in path.glob("*/metrics.jsonl"))
        if not inside:
            raise UserError(f"{path}: neither a run directory (no metrics.jsonl) nor a folder of some")
        found += inside
    unique = list(dict.fromkeys(found))
    if not unique:
        raise UserError("no run directory given; give at least one")
    return unique


def restarts_of(path: Path) -> tuple[int, ...]:
    """Steps at which a run was started again, from provenance.json."""
    file = path / "provenance.json"
    if not file.is_file():
        return ()
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("restarts", [])
        return tuple(int(restart["step"]) for restart in found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error})") from error


def point(path: str | Path) -> Point:
    """Read a run as a point.

    Raises:
        UserError: no run, damaged files, or no metrics of speed in it.
    """
    run = load_run(path)
    needed = ("perf/clips_per_second", "perf/step_seconds", "perf/tokens_per_second", "perf/tflops")
    series = {key: run.series(key) for key in needed}
    missing = [key for key in needed if not len(series[key][0])]
    if missing:
        raise UserError(f"{run.path}/metrics.jsonl: no {missing[0]}; it says how many clips a step has")
    rate, seconds, tokens, tflops = (series[key][1] for key in needed)
    clips = float(np.median(rate * seconds))
    batch = run.setting("data.batch_size"), run.setting("trainer.accumulate")
    ranks = round(clips / (batch[0] * batch[1])) if all(isinstance(value, int) for value in batch) else 1
    steps = max((int(record["step"]) for record in run.records if record.get("step") is not None), default=0)
    wanted = run.setting("trainer.max_steps")
    reached = wanted is None or int(run.summary.get("steps", 0)) >= wanted
    # A task may end early (patience): its summary comes last.
    finished = "val_l1" in run.summary and reached if run.target is None else "scores" in run.summary
    return Point(
        run,
        steps,
        wanted,
        float(round(clips)) if clips > 0.5 else clips,
        float(round(np.median(tokens / rate))),
        float(np.median(tflops / rate)) * 1e12 * max(ranks, 1),
        restarts_of(run.path),
        finished,
    )


def finished_points(paths: Sequence[str | Path]) -> tuple[list[Point], list[str]]:
    """Points of the runs that have ended, and a line about each that has not."""
    points = [point(path) for path in find_runs(paths)]
    left_out = [
        f"left out: {p.run.path} is not finished ({p.steps} of {p.max_steps or '?'} steps)"
        for p in points
        if not p.finished and p.run.target is None
    ]
    left_out += [f"left out: {p.run.path} is fine-tuned on {p.run.target}" for p in points if p.run.target is not None]
    kept = [p for p in points if p.finished and p.run.target is None]
    for p in kept:
        if not np.isfinite(p.loss):
            left_out.append(f"left out: {p.run.path} has diverged (val_l1 {p.run.summary['val_l1']})")
    return [p for p in kept if np.isfinite(p.loss)], left_out


def differing(points: Sequence[Point], names: Sequence[str]) -> str | None:
    """The first setting that is not the same in all runs, with two of its values; None if there is none."""
    for name in names:
        first = points[0].run.setting(name)
        for other in points[1:]:
            if other.run.setting(name) != first:
                return f"{name} is {first} in {points[0].name} and {other.run.setting(name)} in {other.name}"
    return None


def one_loss(points: Sequence[Point]) -> None:
    """Refuse runs whose tokens or losses are not comparable.

    Raises:
        UserError: names the setting, two of its values and their runs.
    """
    if not points:
        return
    if (what := differing(points, TOKENISATION)) is not None:
        raise UserError(f"{what}: runs of different tokenisation do not share one fit; give those of one kind")
    if (what := differing(points, OBJECTIVE)) is not None:
        raise UserError(f"{what}: their losses measure different things; give runs of one objective")

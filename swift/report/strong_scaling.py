"""Clips/s, efficiency and time of a step by phase over the nodes of a sweep, from run directories.

Efficiency: clips/s per rank, relative to the smallest run. Phases are parts of the steps that were profiled
(`swift.train.callbacks.phases`), times the step time that was not. Communication is what nothing computed meanwhile; it
includes the wait for the slowest rank, which stands beside it. Where a size was also run with data.repeat_batch=true,
the difference of both step times is what input costs. Intervals: 95 % bootstrap over the logged intervals of a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from swift.report.output import aligned
from swift.report.points import find_runs
from swift.report.runs import Run, load_run
from swift.utils.errors import UserError

PHASES = ("data", "compute", "communication", "other")
DRAWS = 1000
SAME = ("model.name", "model.embed_dim", "model.depths", "data.grid", "data.frames")
"""Settings that runs of one series share."""


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        run: Name of its folder.
        nodes, ranks: How many it used.
        clips_per_step: Over all ranks.
        clips_per_second: Median over the logged intervals; the first holds the warm-up and is left out.
        step_seconds: Time of an optimizer step, also a median.
        efficiency: Clips/s per rank, relative to the smallest run.
        seconds: Phase -> seconds of a step, mean over the ranks; {} where none was profiled.
        straggler: Seconds of a step that the average rank waits for the slowest; part of communication.
        input: Seconds by which a step is longer than in the run of that size without input; None: there is none.
        input_interval: 95 % bootstrap interval of it.
        rate_interval: 95 % bootstrap interval of clips_per_second.
        logged: Step times of the logged intervals behind the medians.
    """

    run: str
    nodes: int
    ranks: int
    clips_per_step: int
    clips_per_second: float
    step_seconds: float
    efficiency: float
    seconds: dict[str, float]
    straggler: float | None
    input: float | None = None
    input_interval: tuple[float, float] | None = None
    rate_interval: tuple[float, float] = (float("nan"), float("nan"))
    logged: tuple[float, ...] = field(default=(), repr=False)


def _logged(run: Run, key: str, warm: int) -> np.ndarray:
    values = run.series(key)[1]
    if not len(values):
        raise UserError(f"{run.path}/metrics.jsonl: no {key} in it; the run was too short or is not one of swift.train")
    return values[warm:] if len(values) > warm else values


def medians(values: Sequence[float] | np.ndarray, seed: int) -> np.ndarray:
    """(DRAWS,) medians of values drawn with replacement."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (DRAWS, len(values)))
    return np.median(drawn, axis=1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def row(run: Run) -> Row:
    """The numbers of one run. Its efficiency is 1 until the smallest run is known.

    Raises:
        UserError: the run has logged no speed.
    """
    nodes, devices = (int(run.setting(f"parallel.{key}") or 1) for key in ("nodes", "devices"))
    rates, logged = (_logged(run, key, 1) for key in ("perf/clips_per_second", "perf/step_seconds"))
    rate, seconds = float(np.median(rates)), float(np.median(logged))
    profiled = len(run.series("perf/phase_data")[1]) > 0
    parts = (
        {name: float(np.median(_logged(run, f"perf/phase_{name}", 0))) for name in (*PHASES, "straggler")}
        if profiled
        else {}
    )
    return Row(
        run.name,
        nodes,
        nodes * devices,
        round(rate * seconds),
        rate,
        seconds,
        1.0,
        {name: parts[name] * seconds for name in PHASES if profiled},
        parts["straggler"] * seconds if profiled else None,
        rate_interval=interval(medians(rates, 0)),
        logged=tuple(logged.tolist()),
    )


def rows(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """One row for each finished run with input, sorted by ranks and nodes, and a line for each run that is left out.

    Raises:
        UserError: no finished run, two of one size, or runs of different models or clips.
    """
    runs = [load_run(path) for path in find_runs(paths)]
    notes = [f"left out: {run.path} is not finished" for run in runs if not run.summary]
    runs = [run for run in runs if run.summary]
    if not runs:
        raise UserError("none of these runs is finished")
    for name in SAME:
        values = {str(run.setting(name)): run.name for run in runs}
        if len(values) > 1:
            (a, first), (b, second) = list(values.items())[:2]
            raise UserError(f"{name} is {a} in {first} and {b} in {second}: runs of one series differ in nodes only")
    without = {(r.nodes, r.ranks): r for r in _by_size(run for run in runs if run.setting("data.repeat_batch"))}
    found = _by_size(run for run in runs if not run.setting("data.repeat_batch"))
    if not found:
        raise UserError("all of these runs are without input (data.repeat_batch=true)")
    base = found[0].clips_per_second / found[0].ranks
    found = [replace(r, efficiency=r.clips_per_second / r.ranks / base) for r in found]
    return [_beside(r, without.get((r.nodes, r.ranks))) for r in found], notes


def _beside(row: Row, bare: Row | None) -> Row:
    """Add what input costs: the step time minus that of the run of the same size without input."""
    if bare is None:
        return row
    spread = interval(medians(row.logged, 0) - medians(bare.logged, 1))
    return replace(row, input=row.step_seconds - bare.step_seconds, input_interval=spread)


def _by_size(runs: Iterable[Run]) -> list[Row]:
    found = sorted((row(run) for run in runs), key=lambda row: (row.ranks, row.nodes))
    for before, after in itertools.pairwise(found):
        if (before.nodes, before.ranks) == (after.nodes, after.ranks):
            raise UserError(f"{before.run} and {after.run} both have {after.nodes} nodes: give one of them")
    return found


def table(found: Sequence[Row]) -> str:
    """The rows as text."""
    head = ["nodes", "ranks", "clips/step", "clips/s", "efficiency", "ms/step", *PHASES, "straggler", "input"]
    lines = [head]
    for r in found:
        parts = [
            f"{1e3 * r.seconds[name]:.1f} ({r.seconds[name] / r.step_seconds:.0%})" if r.seconds else "-"
            for name in PHASES
        ]
        late = "-" if r.straggler is None else f"{1e3 * r.straggler:.1f}"
        cost = "-"
        if r.input is not None and r.input_interval is not None:
            low, high = (f"{1e3 * value:.1f}" for value in r.input_interval)
            cost = f"{1e3 * r.input:.1f} [{low}, {high}] ({r.input / r.step_seconds:.0%})"
        sizes = [str(r.nodes), str(r.ranks), str(r.clips_per_step), f"{r.clips_per_second:.2f}"]
        lines.append([*sizes, f"{r.efficiency:.1%}", f"{1e3 * r.step_seconds:.1f}", *parts, late, cost])
    kind = "strong" if len({r.clips_per_step for r in found}) == 1 else "weak"
    notes = "phases in ms of a step; straggler: part of communication; input: beside data.repeat_batch=true"
    return "\n".join([*aligned(lines), f"{kind} scaling; {notes}"])

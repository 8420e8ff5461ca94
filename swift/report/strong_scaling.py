"""Clips/s, efficiency and time of a step by phase over the nodes of a sweep, from run directories.

Efficiency: clips/s a rank, as a part of that of the smallest run. Phases are parts of the steps that were profiled
(`swift.train.callbacks.phases`), times the step time that was not. Communication is what nothing computed meanwhile; it
includes the wait for the slowest rank, which stands beside it. Where a size was also run with data.repeat_batch=true,
the difference of both step times is what input costs. Intervals: 95 % bootstrap over the logged intervals of a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from swift.report.points import find_runs, say, setting
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
        run: Its folder's name.
        nodes, ranks: Of the run.
        clips_per_step: Of all ranks.
        clips_per_second: Median over the logged intervals; the first holds the warm-up and is left out.
        step_seconds: Of an optimizer step, likewise.
        efficiency: Clips/s a rank, as a part of that of the smallest run.
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
    """Figures of one run, its efficiency not yet known (1).

    Raises:
        UserError: the run has logged no speed.
    """
    nodes, devices = (int(setting(run, f"parallel.{key}") or 1) for key in ("nodes", "devices"))
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
    """A row a finished run with input, by nodes and ranks; and a line about each run that was left out.

    Raises:
        UserError: no finished run, two of one size, or runs of different models or clips.
    """
    runs = [load_run(path) for path in find_runs(paths)]
    notes = [f"left out: {run.path} is not finished" for run in runs if not run.summary]
    runs = [run for run in runs if run.summary]
    if not runs:
        raise UserError("none of these runs is finished")
    for name in SAME:
        values = {str(setting(run, name)): run.name for run in runs}
        if len(values) > 1:
            (a, first), (b, second) = list(values.items())[:2]
            raise UserError(f"{name} is {a} in {first} and {b} in {second}: runs of one series differ in nodes only")
    without = {(r.nodes, r.ranks): r for r in _by_size(run for run in runs if _without_input(run))}
    found = _by_size(run for run in runs if not _without_input(run))
    if not found:
        raise UserError("all of these runs are without input (data.repeat_batch=true)")
    base = found[0].clips_per_second / found[0].ranks
    found = [replace(r, efficiency=r.clips_per_second / r.ranks / base) for r in found]
    return [_beside(r, without.get((r.nodes, r.ranks))) for r in found], notes


def _beside(row: Row, bare: Row | None) -> Row:
    """With what input costs: the step time less that of the run of its size without input."""
    if bare is None:
        return row
    spread = interval(medians(row.logged, 0) - medians(bare.logged, 1))
    return replace(row, input=row.step_seconds - bare.step_seconds, input_interval=spread)


def _without_input(run: Run) -> bool:
    return bool(setting(run, "data.repeat_batch"))


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
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    kind = "strong" if len({r.clips_per_step for r in found}) == 1 else "weak"
    notes = "phases in ms of a step; straggler: part of communication; input: beside data.repeat_batch=true"
    return "\n".join([*text, f"{kind} scaling; {notes}"])


def draw(found: Sequence[Row], out: Path) -> None:
    """Clips/s with the ideal line, and the time that a clip costs on one rank by phase, with and without input."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from swift.report.style import BLUE, COLOURS, DPI, STYLE, WIDTH, gridded, plain_log, save

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
        rate, parts = figure.subplots(1, 2)
        ranks = np.array([r.ranks for r in found])
        measured = np.array([r.clips_per_second for r in found])
        bars = np.abs(np.array([r.rate_interval for r in found]).T - measured)
        rate.plot(ranks, measured[0] * ranks / ranks[0], color="0.6", ls="--", label="ideal")
        rate.errorbar(ranks, measured, bars, color=BLUE, marker="o", ms=4, capsize=3, label="measured")
        rate.set(xscale="log", yscale="log", xlabel="ranks", ylabel="clips/s, all ranks")
        rate.set_title("throughput", loc="left")
        rate.set_xticks(ranks, [str(n) for n in ranks])
        rate.xaxis.set_minor_locator(NullLocator())
        plain_log(rate, "y")
        rate.legend()
        a_clip = np.array([1e3 * r.ranks / r.clips_per_step for r in found])
        bottom = np.zeros(len(found))
        for name, colour in zip(PHASES, COLOURS[1:], strict=False):
            height = np.array([r.seconds.get(name, 0.0) for r in found]) * a_clip
            parts.bar([str(n) for n in ranks], height, bottom=bottom, label=name, width=0.6, color=colour)
            bottom += height
        both = [i for i, r in enumerate(found) if r.input is not None]
        if both:
            bare = [(found[i].step_seconds - (found[i].input or 0.0)) * a_clip[i] for i in both]
            ends = np.array([found[i].input_interval or (0.0, 0.0) for i in both]).T
            spread = np.abs(ends[::-1] - [found[i].input or 0.0 for i in both]) * a_clip[both]
            style = {"fmt": "_", "ms": 13, "mew": 1.6, "capsize": 3, "color": "black"}
            parts.errorbar(both, bare, spread, label="step without input", gid="without input", **style)
        parts.set(xlabel="ranks", ylabel="rank-milliseconds a clip")
        parts.set_title("time by phase, with input", loc="left")
        parts.legend(fontsize=7.5)
        for ax in (rate, parts):
            gridded(ax, "y")
        text = "medians over the logged intervals; bars: 95 % bootstrap"
        figure.supxlabel(text + (" (right: of the difference that input makes)" if both else ""), fontsize=8)
        save(figure, out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `python -m swift.report strong_scaling`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", type=Path, help="runs of a sweep over nodes, or its folder"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="also draw throughput and phases")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    found, notes = rows(args.runs)
    print(
        json.dumps([{k: v for k, v in asdict(r).items() if k != "logged"} for r in found], indent=2)
        if args.json
        else table(found)
    )
    if args.out:
        draw(found, args.out)
        notes.append(f"wrote {args.out}")
    say(notes)
    return 0

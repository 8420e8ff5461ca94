"""Clips/s, efficiency and time of a step by phase over the nodes of a sweep, from run directories.

Efficiency: clips/s a rank, as a part of that of the smallest run. Phases are parts of the steps that were profiled
(`swift.callbacks.phases`), times the step time that was not. Communication is what nothing computed meanwhile; it
includes the wait for the slowest rank, which stands beside it. Where a size was also run with data.repeat_batch=true,
the difference of both step times is what input costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from swift.analysis.points import find_runs, say, setting
from swift.analysis.runs import Run, load_run
from swift.utils.errors import UserError

PHASES = ("data", "compute", "communication", "other")
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


def _median(run: Run, key: str, warm: int) -> float:
    values = run.series(key)[1]
    if not len(values):
        raise UserError(f"{run.path}/metrics.jsonl: no {key} in it; the run was too short or is not one of swift.train")
    return float(np.median(values[warm:] if len(values) > warm else values))


def row(run: Run) -> Row:
    """Figures of one run, its efficiency not yet known (1).

    Raises:
        UserError: the run has logged no speed.
    """
    nodes, devices = (int(setting(run, f"parallel.{key}") or 1) for key in ("nodes", "devices"))
    rate, seconds = (_median(run, key, 1) for key in ("perf/clips_per_second", "perf/step_seconds"))
    profiled = len(run.series("perf/phase_data")[1]) > 0
    phases = {name: _median(run, f"perf/phase_{name}", 0) * seconds for name in PHASES} if profiled else {}
    straggler = _median(run, "perf/phase_straggler", 0) * seconds if profiled else None
    return Row(run.name, nodes, nodes * devices, round(rate * seconds), rate, seconds, 1.0, phases, straggler)


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
    without = {(r.nodes, r.ranks): r.step_seconds for r in _by_size(run for run in runs if _without_input(run))}
    found = _by_size(run for run in runs if not _without_input(run))
    if not found:
        raise UserError("all of these runs are without input (data.repeat_batch=true)")
    base = found[0].clips_per_second / found[0].ranks
    return [
        replace(
            r,
            efficiency=r.clips_per_second / r.ranks / base,
            input=r.step_seconds - without[r.nodes, r.ranks] if (r.nodes, r.ranks) in without else None,
        )
        for r in found
    ], notes


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
        cost = "-" if r.input is None else f"{1e3 * r.input:.1f} ({r.input / r.step_seconds:.0%})"
        sizes = [str(r.nodes), str(r.ranks), str(r.clips_per_step), f"{r.clips_per_second:.2f}"]
        lines.append([*sizes, f"{r.efficiency:.1%}", f"{1e3 * r.step_seconds:.1f}", *parts, late, cost])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    kind = "strong" if len({r.clips_per_step for r in found}) == 1 else "weak"
    notes = "phases in ms of a step; straggler: part of communication; input: beside data.repeat_batch=true"
    return "\n".join([*text, f"{kind} scaling; {notes}"])


def draw(found: Sequence[Row], out: Path) -> None:
    """Clips/s with the ideal line, and the time that a clip costs on one rank by phase."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from swift.analysis.style import BLUE, DPI, STYLE, WIDTH, save

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), dpi=DPI, layout="constrained")
        rate, parts = figure.subplots(1, 2)
        ranks = np.array([r.ranks for r in found])
        rate.plot(ranks, found[0].clips_per_second * ranks / ranks[0], color="0.6", ls="--", label="ideal")
        rate.plot(ranks, [r.clips_per_second for r in found], color=BLUE, marker="o", label="measured")
        rate.set(xscale="log", yscale="log", xlabel="ranks", ylabel="clips/s", title="throughput")
        rate.set_xticks(ranks, [str(n) for n in ranks])
        rate.minorticks_off()
        rate.legend()
        bottom = np.zeros(len(found))
        for name in PHASES:
            height = np.array([r.seconds.get(name, 0.0) * r.ranks / r.clips_per_step for r in found])
            parts.bar([str(n) for n in ranks], 1e3 * height, bottom=bottom, label=name, width=0.6)
            bottom += 1e3 * height
        parts.set(xlabel="ranks", ylabel="rank-milliseconds a clip", title="time by phase")
        parts.legend()
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
    print(json.dumps([asdict(r) for r in found], indent=2) if args.json else table(found))
    if args.out:
        draw(found, args.out)
        notes.append(f"wrote {args.out}")
    say(notes)
    return 0

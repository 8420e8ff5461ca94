"""`python -m swift.runs DIR`: the state of the runs in a folder, from their files alone."""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from swift.cluster.batch_system import queue
from swift.utils import jsonl
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

log = logging.getLogger(__name__)

ALIVE_SECONDS = 120.0
"""A heartbeat older than this is no sign of life."""


@dataclass
class State:
    """One run.

    Attributes:
        run: Its folder.
        state: submitted | starting | training | validating | queued again | stopped | failed | finished | silent (a run
            whose last sign of life is too old).
        step, max_steps: Optimizer steps done and wanted.
        loss: Last training loss.
        val: Last value of val/l1; of a task with a target, of the score that chooses its weights (task.select).
        score: Name of what val is.
        restarts: Starts after the first.
        useful_seconds: Time of the steps that count (not lost in a crash).
        job_seconds: Time in jobs, from the first start to the last sign of life, without waiting in the queue.
        wall_seconds: From the first start to the last sign of life.
        goodput: useful_seconds / wall_seconds.
        eta_seconds: Steps left at the pace of the steps done; queue and restarts left out.
        reason: Why the job ended, as its script says; or why it waits, as Slurm says.
    """

    run: str
    state: str
    step: int | None
    max_steps: int | None
    loss: float | None
    val: float | None
    score: str
    restarts: int
    useful_seconds: float
    job_seconds: float
    wall_seconds: float
    goodput: float | None
    eta_seconds: float | None
    reason: str | None


def find_runs(folder: Path) -> list[Path]:
    """Run directories at or below `folder`, those inside another run left out.

    Raises:
        UserError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found: list[Path] = []
    for path in sorted(folder.rglob("config.yaml")):
        run = path.parent
        if not any(parent in found for parent in run.parents):
            found.append(run)
    if not found:
        raise UserError(f"{folder}: no run in it (a run has a config.yaml)")
    return found


def describe(run: Path, now: float) -> State:
    """The state of one run.

    Args:
        run: Folder of the run.
        now: Unix seconds.
    """
    beats = sorted(_records(run / "heartbeats"), key=lambda beat: float(beat["began"]))
    attempts = _lines(run / "attempts.jsonl")
    metrics = _lines(run / "metrics.jsonl")
    last = beats[-1] if beats else {}
    useful, done = _useful(beats)
    began, spans = _spans(beats, attempts, now)
    wall = max((end for _, end in spans), default=began) - began
    step, most = last.get("step"), last.get("max_steps") or _max_steps(run)
    pace = useful / done if done else math.nan
    eta = None if step is None or most is None or not done else max(0, most - step) * pace
    ends = [line for line in attempts if line["event"] == "end"]
    task = _settings(run).get("task") or {}
    score = str(task.get("select") or "loss") if task.get("target") else "l1"
    starts = sum(line["event"] == "start" for line in attempts) or len(beats)
    return State(
        run=str(run),
        state=_state(run, last, attempts, now),
        step=step,
        max_steps=most,
        loss=_newest(metrics, "train/loss"),
        val=_newest(metrics, f"val/{score}"),
        score=score,
        restarts=max(0, starts - 1),
        useful_seconds=round(useful, 3),
        job_seconds=round(sum(end - start for start, end in spans), 3),
        wall_seconds=round(wall, 3),
        goodput=round(useful / wall, 4) if wall > 0 else None,
        eta_seconds=None if eta is None else round(eta, 1),
        reason=ends[-1]["reason"] if ends else None,
    )


_REASONS = {
    "PartitionTimeLimit": "its time is over its partition's limit, it never starts: scancel it, give a shorter time",
    "PartitionNodeLimit": "it has more nodes than its partition allows, it never starts: scancel it, give fewer",
    "BeginTime": "a job that is queued again is held for about two minutes",
}
"""What Slurm's words for a waiting job mean here."""


def add_reasons(states: Sequence[State]) -> None:
    """Ask Slurm, where it is, why the jobs of runs wait that have not begun or are queued again."""
    jobs = {}
    for state in states:
        if state.state in ("submitted", "queued again") and (lines := _lines(Path(state.run) / "jobs.jsonl")):
            jobs[str(lines[-1]["job"])] = state
    if not jobs or shutil.which("squeue") is None:
        return
    try:
        found = queue(list(jobs))
    except UserError as error:
        log.warning("%s", error)
        return
    for job, state in jobs.items():
        if job not in found:
            state.reason = f"job {job} is not in the queue any more"
        elif found[job].state == "PENDING":
            meaning = _REASONS.get(found[job].reason)
            state.reason = f"job {job} waits: {found[job].reason}" + (f" ({meaning})" if meaning else "")


def _useful(beats: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Seconds and number of the steps that count: those that a later start did not have to do again."""
    seconds, steps = 0.0, 0
    reached = [beat for beat in beats if "first_step" in beat and beat["step"] > beat["first_step"]]
    for number, beat in enumerate(reached):
        later = min((other["first_step"] for other in reached[number + 1 :]), default=beat["step"])
        kept = max(0, min(beat["step"], later) - beat["first_step"])
        seconds += beat["train_seconds"] * kept / (beat["step"] - beat["first_step"])
        steps += kept
    return seconds, steps


def _spans(
    beats: Sequence[dict[str, Any]], attempts: Sequence[dict[str, Any]], now: float
) -> tuple[float, list[tuple[float, float]]]:
    """When the run began, and (begin, last sign of life) of every start."""
    begins = {line["attempt"]: float(line["time"]) for line in attempts if line["event"] == "start"}
    ends = {line["attempt"]: float(line["time"]) for line in attempts if line["event"] == "end"}
    signs = {beat["attempt"]: float(beat.get("time", beat["began"])) for beat in beats}
    for beat in beats:
        begins.setdefault(beat["attempt"], float(beat["began"]))
    spans = [(begin, max(begin, ends.get(name, signs.get(name, begin)))) for name, begin in begins.items()]
    return min(begins.values(), default=now), spans


def _state(run: Path, last: dict[str, Any], attempts: Sequence[dict[str, Any]], now: float) -> str:
    if (run / "summary.json").exists() or (run / "launch" / "finished").exists():
        return "finished"
    if attempts:
        event = attempts[-1]
        if event["event"] == "end":
            again = "queued again" in event["reason"] or "to be continued" in event["reason"]
            return "queued again" if again else "stopped" if event["status"] == "75" else "failed"
        if event["attempt"] != last.get("attempt"):
            return "starting" if now - event["time"] < ALIVE_SECONDS else "silent"
    if not last:
        return "submitted" if (run / "jobs.jsonl").exists() else "starting"
    state = str(last.get("state", "starting"))
    if state in ("stopped", "failed"):
        return state
    return state if now - float(last.get("time", last["began"])) < ALIVE_SECONDS else "silent"


def _records(folder: Path) -> list[dict[str, Any]]:
    """JSON objects of the files in a folder; one that is damaged is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and "began" in content:
            found.append(content)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return jsonl.read(path) if path.exists() else []


def _newest(metrics: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((jsonl.plain(line[key]) for line in reversed(metrics) if key in line), None)


def _settings(run: Path) -> dict[str, Any]:
    content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _max_steps(run: Path) -> int | None:
    trainer = _settings(run).get("trainer")
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return steps if isinstance(steps, int) else None


def clock_text(seconds: float | None) -> str:
    """H:MM:SS, or - where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def table(states: Sequence[State]) -> str:
    """The states as aligned text, with the reasons of those that do not run below."""

    def number(value: float | str | None) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value if value is not None else "-")

    head = ("run", "state", "step", "loss", "validation", "restarts", "goodput", "left")
    rows = [
        (
            Path(state.run).name,
            state.state,
            f"{state.step if state.step is not None else '-'}/{state.max_steps or '?'}",
            number(state.loss),
            number(state.val) + (f" {state.score}" if state.val is not None else ""),
            str(state.restarts),
            "-" if state.goodput is None else f"{100 * state.goodput:.1f} %",
            "-" if state.state == "finished" else clock_text(state.eta_seconds),
        )
        for state in states
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    notes = [
        f"{Path(state.run).name}: {state.reason}" for state in states if state.reason and state.state != "finished"
    ]
    return "\n".join([*lines, *notes])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m swift.runs",
        description="The state of the runs in a folder: progress, last loss, restarts, goodput (time of the steps that "
        "count over time since the first start), time left. Read from their files; Slurm is asked why a job waits.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="a run, or a folder of runs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    set_up_logging()

    def work() -> None:
        states = [describe(run, time.time()) for run in find_runs(options.folder)]
        add_reasons(states)
        print(json.dumps([asdict(state) for state in states], indent=2) if options.json else table(states))

    reported(work)


if __name__ == "__main__":
    main()

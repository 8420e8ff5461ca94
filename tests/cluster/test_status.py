"""`python -m swift.runs`: the state of runs from their files, against sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swift.cluster.status import ALIVE_SECONDS, clock_text, describe, find_runs, main, table
from swift.utils.errors import UserError

NOW = 10_000.0


def write(
    run: Path, beats: list[dict[str, Any]], attempts: list[dict[str, Any]] | None = None, steps: int = 400
) -> Path:
    """A run directory with these heartbeats and lines of attempts.jsonl."""
    (run / "heartbeats").mkdir(parents=True)
    (run / "config.yaml").write_text(f"trainer:\n  max_steps: {steps}\n")
    for beat in beats:
        (run / "heartbeats" / f"{beat['attempt']}.json").write_text(json.dumps(beat))
    if attempts:
        (run / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    return run


def beat(attempt: str, began: float, first: int, step: int, seconds: float, time: float, state: str) -> dict[str, Any]:
    made = {"attempt": attempt, "began": began, "first_step": first, "step": step, "train_seconds": seconds}
    return made | {"time": time, "state": state, "max_steps": 400}


def event(attempt: str, event: str, time: float, status: str = "1", reason: str = "") -> dict[str, Any]:
    return {"attempt": attempt, "chain": "1", "event": event, "time": time, "status": status, "reason": reason}


KILLED = beat("1.0", 9_010, 0, 100, 50.0, 9_065, "training")
AGAIN = beat("1.1", 9_110, 80, 200, 72.0, 9_190, "training")


def test_steps_that_were_lost_are_no_useful_time(tmp_path: Path) -> None:
    """0 to 100 in 50 s, killed; from the checkpoint at 80 to 200 in 72 s: 80 x 0.5 s + 120 x 0.6 s."""
    starts = [event("1.0", "start", 9_000), event("1.0", "end", 9_070, reason="x; queued again")]
    run = write(tmp_path, [KILLED, AGAIN], [*starts, event("1.1", "start", 9_100)])
    (run / "metrics.jsonl").write_text(
        '{"step": 199, "train/loss": 0.5}\n{"step": 200, "train/loss": NaN, "val/l1": 0.75}\n{"step": 200}\n'
    )
    state = describe(run, 9_200.0)
    assert state.useful_seconds == pytest.approx(80 * 0.5 + 120 * 0.6)
    assert (state.state, state.step, state.max_steps, state.restarts) == ("training", 200, 400, 1)
    # First start at 9000, last sign of life at 9190; between the attempts it waited for 30 s.
    assert (state.wall_seconds, state.job_seconds) == (190.0, 160.0)
    assert state.goodput == pytest.approx(112 / 190, abs=1e-4)
    assert state.eta_seconds == pytest.approx(200 * 112 / 200)
    assert state.val == 0.75
    assert state.reason == "x; queued again"


def test_a_start_whose_checkpoint_was_lost_takes_all_its_steps_along(tmp_path: Path) -> None:
    run = write(tmp_path, [KILLED, beat("1.1", 9_110, 0, 40, 20.0, 9_140, "training")])
    assert describe(run, 9_150.0).useful_seconds == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("beats", "attempts", "now", "state"),
    [
        ([], [], NOW, "starting"),
        ([], [event("1.0", "start", NOW - 5)], NOW, "starting"),
        ([], [event("1.0", "start", NOW - 2 * ALIVE_SECONDS)], NOW, "silent"),
        ([KILLED], [], KILLED["time"] + 5, "training"),
        ([KILLED], [], KILLED["time"] + 2 * ALIVE_SECONDS, "silent"),
        ([KILLED | {"state": "stopped"}], [], NOW, "stopped"),
        ([KILLED | {"state": "failed"}], [], NOW, "failed"),
        ([KILLED], [event("1.0", "end", NOW, "75", "asked to stop; queued again")], NOW, "queued again"),
        ([KILLED], [event("1.0", "end", NOW, "75", "asked to stop; to be continued")], NOW, "queued again"),
        ([KILLED], [event("1.0", "end", NOW, "75", "ended from outside")], NOW, "stopped"),
        ([KILLED], [event("1.0", "end", NOW, "137", "left alone")], NOW, "failed"),
        ([KILLED], [event("1.1", "start", KILLED["time"] + 9)], KILLED["time"] + 10, "starting"),
    ],
)
def test_states(tmp_path: Path, beats: list[Any], attempts: list[Any], now: float, state: str) -> None:
    assert describe(write(tmp_path, beats, attempts), now).state == state


def test_submitted_and_finished(tmp_path: Path) -> None:
    run = write(tmp_path, [])
    (run / "jobs.jsonl").write_text('{"job": "1"}\n')
    assert describe(run, NOW).state == "submitted"
    (run / "summary.json").write_text("{}")
    assert describe(run, NOW).state == "finished"


def test_a_damaged_sign_of_life_is_left_out(tmp_path: Path) -> None:
    run = write(tmp_path, [KILLED])
    (run / "heartbeats" / "2.json").write_text('{"attempt"')
    assert describe(run, KILLED["time"]).step == 100


def test_runs_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "sweep/0_seed-1", "sweep/1_seed-2"):
        write(tmp_path / name, [])
    (tmp_path / "a" / "inside").mkdir()
    (tmp_path / "a" / "inside" / "config.yaml").touch()
    names = [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert names == ["a", "sweep/0_seed-1", "sweep/1_seed-2"]
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "gone")
    with pytest.raises(UserError, match="no run in it"):
        find_runs(tmp_path / "a" / "heartbeats")


def test_the_table(tmp_path: Path) -> None:
    assert [clock_text(value) for value in (None, float("nan"), 0.4, 3_725)] == ["-", "-", "0:00:00", "1:02:05"]
    ended = event("1.0", "end", 9_070, reason="left alone")
    state = describe(write(tmp_path / "one", [KILLED], [event("1.0", "start", 9_000), ended]), NOW)
    lines = table([state]).splitlines()
    assert lines[1].split() == ["one", "failed", "100/400", "-", "-", "0", "71.4", "%", "0:02:30"]
    assert lines[2] == "one: left alone"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one", [KILLED])
    main([str(tmp_path), "--json"])
    [state] = json.loads(capsys.readouterr().out)
    assert (state["run"], state["state"], state["step"]) == (str(tmp_path / "one"), "silent", 100)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "gone")])
    assert stop.value.code == 2
    assert "no such folder" in capsys.readouterr().err

"""What Slurm answers (lines as Slurm 22.05 prints them), and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift.cluster.batch_system import Limits, Queued, limits, queue
from swift.cluster.status import State, add_reasons, table
from swift.cluster.submit import _check_limits
from swift.config.compose import typed
from swift.config.schema import LauncherConfig
from swift.utils.errors import UserError
from tests.small import composed

PARTITIONS = """PartitionName=long Default=NO MaxNodes=UNLIMITED MaxTime=7-00:00:00 State=UP TotalNodes=4
PartitionName=local Default=YES MaxNodes=2 MaxTime=01:30:00 State=UP TotalNodes=4
PartitionName=free Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=4
"""
SCONTROL = """#!/bin/bash
[ "$1 $2 $3" = "--oneliner show partition" ] || exit 9
if [ -n "$4" ]; then grep "^PartitionName=$4 " "$(dirname "$0")/partitions"; else cat "$(dirname "$0")/partitions"; fi
"""
SQUEUE = """#!/bin/bash
[ ! -e "$(dirname "$0")/broken" ] || { cat "$(dirname "$0")/broken" >&2; exit 1; }
cat "$(dirname "$0")/queue"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands that answer as the files beside them say."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "partitions").write_text(PARTITIONS)
    for name, text in (("scontrol", SCONTROL), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.mark.usefixtures("slurm")
def test_limits_of_a_partition() -> None:
    assert limits("long") == Limits("long", 7 * 24 * 3600, None)
    assert limits("free") == Limits("free", None, None)
    assert limits(None) == Limits("local", 5400, 2)
    assert limits("gone") is None


def launcher(*overrides: str) -> LauncherConfig:
    cfg = typed(composed("+launcher=slurm", "launcher.account=abc123", *overrides))
    assert cfg.launcher is not None
    return cfg.launcher


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["launcher.time=01:30:01"], "launcher.time=01:30:01: jobs of partition local take 01:30:00 at most, this one"),
        (
            ["launcher.time=01:00:00", "launcher.nodes=3"],
            "launcher.nodes=3: jobs of partition local have 2 nodes at most",
        ),
        (["launcher.time=01:00:00", "launcher.nodes=2", "launcher.pack=2"], "and this one would have 4"),
    ],
)
def test_a_job_that_would_never_start_is_refused(
    overrides: list[str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=says):
        _check_limits(launcher(*overrides))
    assert caplog.text == ""
    # A quality of service may lift the limits, and a dry run submits nothing.
    for lifted in ("launcher.qos=long", "launcher.dry_run=true"):
        caplog.clear()
        _check_limits(launcher(*overrides, lifted))
        assert says in caplog.text


@pytest.mark.usefixtures("slurm")
def test_a_job_within_the_limits_is_not(caplog: pytest.LogCaptureFixture) -> None:
    _check_limits(launcher("launcher.time=01:30:00", "launcher.nodes=2"))
    _check_limits(launcher("launcher.time=100:00:00", "launcher.nodes=90", "launcher.partition=long"))
    # Options of the user's own stand after the launcher's in the job's head, and win.
    _check_limits(launcher("launcher.time=02:00:00", "launcher.batch_options=['--partition=long']"))
    assert caplog.text == ""


def test_the_queue(slurm: Path) -> None:
    (slurm / "queue").write_text("7_1|PENDING|BeginTime\n8|RUNNING|None\n")
    assert queue(["7_1", "8", "9"]) == {"7_1": Queued("PENDING", "BeginTime"), "8": Queued("RUNNING", "None")}
    (slurm / "broken").write_text("slurm_load_jobs error: Invalid job id specified\n")
    assert queue(["9"]) == {}
    (slurm / "broken").write_text("slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
    with pytest.raises(UserError, match="squeue: slurm_load_jobs error: Unable to contact"):
        queue(["8"])


def waiting(run: Path, job: str, state: str = "submitted") -> State:
    run.mkdir()
    (run / "jobs.jsonl").write_text(json.dumps({"job": "1"}) + "\n" + json.dumps({"job": job}) + "\n")
    return State(str(run), state, None, 10, None, None, "val/l1", 0, 0.0, 0.0, 0.0, None, None, None)


def test_runs_that_wait_say_why(slurm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (slurm / "queue").write_text(
        "7|PENDING|PartitionTimeLimit\n8_2|PENDING|BeginTime\n9|PENDING|Priority\n11|RUNNING|None\n"
    )
    states = [
        waiting(tmp_path / "never", "7"),
        waiting(tmp_path / "again", "8_2", "queued again"),
        waiting(tmp_path / "later", "9"),
        waiting(tmp_path / "gone", "10"),
        waiting(tmp_path / "begins", "11"),
        waiting(tmp_path / "other", "7", "failed"),
    ]
    add_reasons(states)
    assert [state.reason for state in states] == [
        "job 7 waits: PartitionTimeLimit (its time is over its partition's limit, it never starts: scancel it, give a "
        "shorter time)",
        "job 8_2 waits: BeginTime (a job that is queued again is held for about two minutes)",
        "job 9 waits: Priority",
        "job 10 is not in the queue any more",
        None,
        None,
    ]
    assert "never: job 7 waits: PartitionTimeLimit" in table(states)
    (slurm / "broken").write_text("down\n")
    states = [waiting(tmp_path / "unknown", "7")]
    add_reasons(states)
    assert states[0].reason is None
    assert "squeue: down" in caplog.text

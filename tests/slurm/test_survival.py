"""Whatever happens to a job, the run goes on by itself and ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import ALL_NODES, STEPS, Cluster, Run, end, eventually
from tests.small import DATA, MODEL

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def lose_a_node(run: Run, which: int) -> None:
    def starts() -> list[str]:
        return [str(line["nodes"]) for line in run.lines("attempts.jsonl") if line["event"] == "start"]

    name = run.cluster.call("scontrol", "show", "hostnames", starts()[0]).split()[which]
    run.cluster.node("stop-node", name)
    eventually(f"{name} is down", lambda: "down" in run.cluster.call("sinfo", "-h", "-n", name, "-o", "%T"))
    # Other nodes take its place; it comes back when the job is there.
    eventually("a second start", lambda: len(starts()) > 1)
    run.cluster.node("start-node", name)


def reach_the_limit(run: Run) -> None:
    """Hold the ranks until Slurm has sent its signal, up to a minute before the time asked for, then let them go on."""
    ranks = [run.rank(number) for number in (0, 1)]
    for pid in ranks:
        end(pid, signal.SIGSTOP)
    eventually("the signal before the limit", lambda: "USR1: the run is asked to save" in run.log(), 180)
    for pid in ranks:
        end(pid, signal.SIGCONT)


LIMIT = ["launcher.time=00:03:00", "launcher.save_seconds=60"]
DISTURBANCES: dict[str, tuple[Callable[[Run], object], list[str], str]] = {
    "lost node": (lambda run: lose_a_node(run, 1), [], ""),
    "lost node that runs the job's script": (lambda run: lose_a_node(run, 0), [], ""),
    "USR1": (lambda run: run.cluster.call("scancel", "--batch", "--signal=USR1", run.job), [], "asked to stop; queued"),
    "TERM": (lambda run: run.cluster.call("scancel", "--signal=TERM", run.job), [], "asked to stop; queued"),
    "kill -9 of a rank": (lambda run: end(run.rank(1)), [], "a rank failed"),
    "time limit": (reach_the_limit, LIMIT, "asked to stop; queued again"),
    "a rank that hangs": (lambda run: end(run.rank(1), signal.SIGSTOP), ["launcher.hang_minutes=1.25"], "the run hung"),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(
    cluster: Cluster, undisturbed: Run, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disturb, words, reason = DISTURBANCES[name]
    # How nodes are checked is seen elsewhere; it takes as long as a run.
    run = cluster.submit(tmp_path / "run", "launcher.health=false", *words)
    run.wait_for_step(30)
    disturb(run)
    run.wait()
    assert "the run is finished" in run.log(), run.log()
    assert run.checkpoint() == undisturbed.checkpoint()
    assert series(run) == series(undisturbed)
    starts = [line for line in run.lines("attempts.jsonl") if line["event"] == "start"]
    assert len(starts) >= 2
    assert starts[-1]["checkpoint"] != "none"
    assert len({line["chain"] for line in starts}) == 1
    ends = [str(line["reason"]) for line in run.lines("attempts.jsonl") if line["event"] == "end"]
    assert any(reason in text for text in ends), ends
    state = run.state()
    assert (state["state"], state["step"], state["restarts"]) == ("finished", STEPS, len(starts) - 1)
    with capsys.disabled():
        print(f"\n{name}: goodput {100 * float(state['goodput']):.1f} % of {state['wall_seconds']} s")  # type: ignore[arg-type]


def series(run: Run) -> list[tuple[object, ...]]:
    """(step, loss, rate) as logged: one trajectory, no step twice, none missing."""
    lines = run.lines("metrics.jsonl")
    return [(line["step"], line["train/loss"], line["train/lr"]) for line in lines if "train/loss" in line]


def test_one_point_of_an_array_is_queued_again_and_the_others_are_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The last task's number is that of the whole array, which must not be what is queued again."""
    words = [f"data.path={cluster.store}", "data=store", *MODEL, *DATA, "trainer.figures=false", "trainer.threads=1"]
    words += ["trainer.max_steps=150", "trainer.val_every=150", "trainer.val_batches=1", "trainer.checkpoint_every=20"]
    words += ["launcher.array=true", "launcher.nodes=1", "launcher.health=false", "seed=1,2,3"]
    done = cluster.train("-m", f"hydra.sweep.dir={tmp_path}/sweep", "+launcher=local", *words)
    assert done.returncode == 0, done.stderr
    points = sorted(path for path in (tmp_path / "sweep").iterdir() if (path / "config.yaml").exists())
    runs = [Run(cluster, point, str(json.loads((point / "jobs.jsonl").read_text())["job"])) for point in points]
    assert len(runs) == 3
    last = runs[-1]
    array = last.job.partition("_")[0]
    assert [run.job for run in runs] == [f"{array}_{index}" for index in range(3)]
    last.wait_for_step(30)
    assert f"JobId={array} " in cluster.call("scontrol", "--oneliner", "show", "job", last.job)
    cluster.call("scancel", "--batch", "--signal=USR1", last.job)
    eventually("end of the array", lambda: not cluster.states(), 600)
    for run in runs:
        assert run.state()["state"] == "finished", run.log()
    starts = [sum(line["event"] == "start" for line in run.lines("attempts.jsonl")) for run in runs]
    assert starts == [1, 1, 2]
    assert {line["chain"] for line in last.lines("attempts.jsonl")} == {last.job}


def test_who_cancels_a_job_does_not_want_it_back(cluster: Cluster, tmp_path: Path) -> None:
    long = ["trainer.max_steps=5000", "trainer.val_every=5000"]
    run = cluster.submit(tmp_path / "run", "launcher.health=false", *long)
    run.wait_for_step(2)
    cluster.call("scancel", run.job)
    run.wait(300)
    assert "ended from outside and is not queued again" in run.log()
    assert len([line for line in run.lines("attempts.jsonl") if line["event"] == "start"]) == 1
    assert run.state()["state"] != "finished"


def frozen(run_dir: Path, cluster: Cluster, name: str, old: str, new: str, *words: str) -> Run:
    """Submit a run while the nodes are closed, change one of its own frozen shell files, open the nodes."""
    cluster.call("scontrol", "update", f"nodename={ALL_NODES}", "state=drain", "reason=test")
    try:
        run = cluster.submit(run_dir, *words)
        path = run.path / "launch" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    finally:
        cluster.call("scontrol", "update", f"nodename={ALL_NODES}", "state=resume")
    return run


def test_a_bad_node_is_named_and_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """The first node says that it has no space; the job of one node is queued again without it and runs on another."""
    first = '[ -e "$SWIFT_RUN/bad" ] || echo "$node" >"$SWIFT_RUN/bad"\n'
    bad = (
        'use_node "$node"\n'
        + first
        + '[ "$node" != "$(cat "$SWIFT_RUN/bad")" ] || export SWIFT_MIN_FREE_GB=1000000000\n'
    )
    one = ["launcher.nodes=1", "parallel=single", "trainer.max_steps=4", "trainer.val_every=4"]
    run = frozen(tmp_path / "run", cluster, "rank.sh", 'use_node "$node"\n', bad, *one)
    run.wait()
    name = (run.path / "bad").read_text().strip()
    assert f"{name}: space: " in run.log(), run.log()
    first, second = [line["nodes"] for line in run.lines("attempts.jsonl") if line["event"] == "start"]
    assert first == name
    assert second != name
    assert f"ExcNodeList={name}" in cluster.call("scontrol", "--oneliner", "show", "job", run.job)
    assert run.state()["state"] == "finished"


def test_a_run_that_gets_nowhere_is_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    crash = "launcher.health=false", "launcher.fruitless_restarts=1"
    run = frozen(tmp_path / "run", cluster, "rank.sh", '"$SWIFT_PYTHON" -m swift.train', "false", *crash)
    run.wait()
    starts = [line for line in run.lines("attempts.jsonl") if line["event"] == "start"]
    assert len(starts) == 2, run.log()
    assert "1 restarts without a new checkpoint: left alone" in run.log()
    assert run.state()["state"] == "failed"

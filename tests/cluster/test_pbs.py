"""A job of PBS from its script to its end. Stand-ins for qsub, qstat and mpiexec of PALS; everything else is real."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import pytest

from swift.utils import jsonl
from tests.distributed import ranks
from tests.forked import python_m
from tests.runs import ROOT, assert_same_run, start
from tests.small import DATA, MODEL

pytestmark = pytest.mark.slow

QSUB = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/calls"
echo "$((76 + $(wc -l <"$(dirname "$0")/calls"))).server"
"""
QSTAT = """#!/bin/bash
# The job that asks runs; those before it have ended.
if [ "$2" = "$PBS_JOBID" ]; then echo "    job_state = R"; else echo "    job_state = F"; fi
"""
MPIEXEC = """#!/bin/bash
# Starts -n copies on this machine; ends all when one fails; hands signals to those it has started, not to theirs.
while :; do
    case $1 in
    -n) ranks=$2; shift 2 ;;
    -ppn) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
children=()
for rank in $(seq 0 "$((ranks - 1))"); do
    PALS_RANKID=$rank PALS_LOCAL_RANKID=$rank "$@" &
    children+=("$!")
done
trap 'kill -USR1 "${children[@]}" 2>/dev/null' USR1
trap 'kill "${children[@]}" 2>/dev/null; exit 143' TERM
worst=0
for child in "${children[@]}"; do
    while :; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if [ "$status" -ne 0 ]; then
        worst=$status
        kill "${children[@]}" 2>/dev/null
    fi
done
exit "$worst"
"""
STEPS = 80


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with commands of a batch system."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("qsub", QSUB), ("qstat", QSTAT), ("mpiexec", MPIEXEC)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def settings(store: Path, run: Path) -> list[str]:
    """Of the training itself."""
    small = [*MODEL, *DATA, f"trainer.max_steps={STEPS}", "trainer.val_every=40", "trainer.val_batches=1"]
    quiet = ["trainer.figures=false", "trainer.threads=1", "trainer.accelerator=cpu"]
    return ["data=store", f"data.path={store}", f"run_dir={run}", "parallel=ddp", *small, *quiet]


def submit(commands: Path, store: Path, run: Path) -> None:
    words = ["+launcher=aurora", "launcher.account=abc123", "launcher.bins=[]", "launcher.machine=null"]
    words += ["launcher.nodes=1", "launcher.ranks_per_node=2", "launcher.cores_per_rank=1", "launcher.device=cpu"]
    words += ["launcher.site=generic", "launcher.step_options=[]", "launcher.min_free_gb=0.01"]
    words += [f"launcher.node_local={run.parent}/scratch"]
    done = python_m("swift.train", *settings(store, run), *words, cwd=run.parent, env=environment(commands))
    assert done.returncode == 0, done.stderr
    assert "job 77.server submitted on aurora: 1 nodes x 2 ranks" in done.stdout


def environment(commands: Path) -> dict[str, str]:
    dropped = ("SLURM_", "SWIFT_", "PBS_", "PALS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"PATH": f"{commands}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}


def job(commands: Path, run: Path, number: int, **more: str) -> subprocess.Popen[bytes]:
    """What PBS would start."""
    hosts = commands / "hosts"
    hosts.write_text(f"{platform.node()}\n")
    env = environment(commands) | {"PBS_JOBID": f"{number}.server", "PBS_NODEFILE": str(hosts), **more}
    return subprocess.Popen(["bash", str(run / "job.pbs")], env=env, stdout=(run / "log" / str(number)).open("wb"))


def test_a_job_stops_on_request_a_following_one_goes_on(commands: Path, store: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.run(start, 2, *settings(store, whole))  # by no job
    submit(commands, store, parts)
    first = job(commands, parts, 77)
    limit = time.monotonic() + 600
    while not (parts / "metrics.jsonl").exists():
        assert first.poll() is None, (parts / "log" / "77").read_text()
        assert time.monotonic() < limit
        time.sleep(0.1)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(300) == 75, (parts / "log" / "77").read_text()
    # PBS lets nobody queue a job again: a following one takes its place and counts as the same chain.
    assert (commands / "calls").read_text().splitlines()[1:] == [
        f"-W depend=afterany:77.server -v SWIFT_CHAIN=77 {parts}/job.pbs"
    ]
    assert job(commands, parts, 78, SWIFT_CHAIN="77").wait(600) == 0, (parts / "log" / "78").read_text()
    assert_same_run(whole, parts)
    events = [(line["event"], line["attempt"], line["chain"]) for line in jsonl.read(parts / "attempts.jsonl")]
    assert events == [("start", "77", "77"), ("end", "77", "77"), ("start", "78", "77"), ("end", "78", "77")]
    assert not list((tmp_path / "scratch").iterdir())

"""`+launcher=local` on a real Slurm: submitted, staged, checked, trained on two nodes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ALL_NODES, STEPS, Cluster, Run, copy_code, eventually
from tests.small import DATA, MODEL

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_run_trains_on_two_nodes_and_ends(undisturbed: Run) -> None:
    run = undisturbed.path
    log = undisturbed.log()
    assert "the run is finished" in log, log
    assert (run / "launch" / "finished").exists()
    manifest = json.loads((run / "checkpoints" / f"step-{STEPS:07d}" / "manifest.json").read_text())
    assert manifest["manifest"]["world"] == 2
    state = undisturbed.state()
    assert (state["state"], state["step"], state["max_steps"], state["restarts"]) == ("finished", STEPS, STEPS, 0)
    assert 0 < float(state["goodput"]) < 1  # type: ignore[arg-type]
    assert isinstance(state["loss"], float)


def test_the_packed_environment_and_the_code_came_by_sbcast(undisturbed: Run) -> None:
    notes = sorted((undisturbed.path / "health").rglob("rank-*.json"))
    found = {note["node"]: note for note in map(json.loads, (path.read_text() for path in notes))}
    assert sorted(found) == ["n1", "n2"]
    for node, note in found.items():
        # Neither the interpreter that submitted nor the packed folder: the copy of this node, which is gone by now.
        assert note["python"].endswith(f"/{node}/environment/bin/python"), note
        assert not Path(note["python"]).exists()
        assert note["failed"] is None
    asked = json.loads((undisturbed.path / "submitted.json").read_text())
    made = json.loads((undisturbed.path / "provenance.json").read_text())
    assert made["git"] == asked["git"]


def test_start_up_is_timed_by_phase_and_nodes_are_watched(undisturbed: Run) -> None:
    phases = [line["phase"] for line in undisturbed.lines("startup.jsonl")]
    before = ["modules", "staging", "health"]
    assert phases == [*before, "python", "meeting of the ranks", "model, data and checkpoint", "first step"]
    assert all(float(line["seconds"]) >= 0 for line in undisturbed.lines("startup.jsonl"))  # type: ignore[arg-type]
    for node in ("n1", "n2"):
        with (undisturbed.path / "monitor" / f"{node}.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert rows
        assert all(float(row["memory_used_gb"]) > 0 for row in rows)


def test_later_edits_of_conf_and_code_change_nothing(cluster: Cluster, undisturbed: Run, tmp_path: Path) -> None:
    copy = copy_code(tmp_path / "checkout")
    edited = Cluster(cluster.folder, cluster.store, cluster.environment, copy, cluster.env)
    cluster.call("scontrol", "update", f"nodename={ALL_NODES}", "state=drain", "reason=test")
    try:
        run = edited.submit(tmp_path / "edited", "launcher.health=false")
        assert cluster.states()[run.job] == "PENDING"
        (copy / "conf" / "config.yaml").write_text("everything: else\n")
        (copy / "conf" / "optimizer" / "adamw.yaml").write_text("lr: 100\n")
        (copy / "swift" / "train" / "__main__.py").write_text("raise SystemExit('edited')\n")
        (copy / "launch" / "rank.sh").write_text("exit 1\n")
    finally:
        cluster.call("scontrol", "update", f"nodename={ALL_NODES}", "state=resume")
    run.wait()
    assert "the run is finished" in run.log(), run.log()
    assert run.checkpoint() == undisturbed.checkpoint()


def test_tiny_with_zero1_as_typed(cluster: Cluster, tmp_path: Path) -> None:
    """The command of the documentation, on the synthetic cohort (the real scans need a registry)."""
    words = ["+launcher=local", "model=tiny", "parallel=zero1", "data=synthetic", f"run_dir={tmp_path}/tiny"]
    short = ["trainer.max_steps=4", "trainer.val_every=4", "trainer.val_batches=1", "trainer.figures=false"]
    done = cluster.train(*words, *short)
    assert done.returncode == 0, done.stderr
    run = Run(cluster, tmp_path / "tiny", done.stdout.split()[1])
    run.wait()
    assert json.loads((run.path / "summary.json").read_text())["steps"] == 4, run.log()


SMALL = [*(word for word in MODEL if "patch_size" not in word), *DATA]
QUICK = ["trainer.figures=false", "trainer.threads=1", "trainer.val_batches=1", "launcher.health=false"]


def sweep(cluster: Cluster, folder: Path, *words: str) -> list[Path]:
    """Submit a sweep of small runs, wait, and return the folders of its points."""
    small = ["data=store", f"data.path={cluster.store}", *SMALL, *QUICK, "launcher.monitor_seconds=0"]
    done = cluster.train("-m", f"hydra.sweep.dir={folder}", "+launcher=local", *small, *words)
    assert done.returncode == 0, done.stderr
    eventually("end of the sweep", lambda: not cluster.states(), 900)
    points = sorted(path for path in folder.iterdir() if (path / "config.yaml").exists())
    logs = {path.name: "".join(log.read_text() for log in path.glob("log/*")) for path in [folder, *points]}
    assert all((path / "launch" / "finished").exists() for path in points), logs
    return points


def report(cluster: Cluster, *words: str) -> str:
    command = [sys.executable, "-m", "swift.report", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cluster.folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["launcher.pack=2", "launcher.array=true", "launcher.pack=1"])
def test_mask_ratio_by_patch_size_and_the_table(cluster: Cluster, tmp_path: Path, how: str) -> None:
    """Two points side by side in each of two jobs, one array, a job a point."""
    two_steps = ["launcher.nodes=1", "trainer.max_steps=2", "trainer.val_every=2", "trainer.log_every=1"]
    sizes = "model.patch_size=[4,4,4,2],[4,4,4,4]"
    names = ["0_patch_size-4x4x4x2", "1_patch_size-4x4x4x4"]
    if how == "launcher.pack=2":
        two_steps.append("task.mask_ratio=0.4,0.8")
        names = [
            "0_mask_ratio-0.4_patch_size-4x4x4x2",
            "1_mask_ratio-0.4_patch_size-4x4x4x4",
            "2_mask_ratio-0.8_patch_size-4x4x4x2",
            "3_mask_ratio-0.8_patch_size-4x4x4x4",
        ]
    points = sweep(cluster, tmp_path / "sweep", *two_steps, sizes, how)
    assert [point.name for point in points] == names
    jobs = {json.loads((point / "jobs.jsonl").read_text())["job"].partition("_")[0] for point in points}
    assert len(jobs) == {"launcher.pack=2": 2, "launcher.array=true": 1, "launcher.pack=1": 2}[how]
    rows = {row["run"]: row for row in json.loads(report(cluster, "--json", "--no-figures", *map(str, points)))}
    assert sorted(rows) == [point.name for point in points]
    for point in points:
        summary = json.loads((point / "summary.json").read_text())
        assert rows[point.name]["val_l1_last"] == pytest.approx(summary["val_l1"])
    printed = report(cluster, "--no-figures", *map(str, points))
    assert all(point.name in printed for point in points)


def test_strong_scaling_from_one_command(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One, two and four nodes (simulated: they share the processors of this machine), one after another."""
    steps = ["+sweep=strong_scaling", "launcher.global_batch=4", "trainer.max_steps=12", "trainer.phases_every=4"]
    one_by_one = "launcher.batch_options=['--job-name=scaling','--dependency=singleton']"
    words = [*steps, "model.patch_size=[4,4,4,2]", "parallel=zero1", "launcher.nodes=1,2,4", one_by_one]
    points = sweep(cluster, tmp_path / "sweep", *words, "trainer.log_every=2", "data.batch_size=2")
    assert [point.name for point in points] == ["0_nodes-1", "1_nodes-2", "2_nodes-4"]
    rows = json.loads(report(cluster, "strong_scaling", "--json", *map(str, points)))
    assert [(row["nodes"], row["ranks"], row["clips_per_step"]) for row in rows] == [(n, n, 4) for n in (1, 2, 4)]
    for row in rows:
        assert sum(row["seconds"].values()) == pytest.approx(row["step_seconds"])
        assert row["clips_per_second"] == pytest.approx(4 / row["step_seconds"], rel=0.3)
        assert min(row["seconds"][phase] for phase in ("data", "compute", "other")) > 0
    assert rows[0]["seconds"]["communication"] < rows[1]["seconds"]["communication"]
    assert rows[0]["efficiency"] == 1
    with capsys.disabled():
        print("\n" + report(cluster, "strong_scaling", str(tmp_path / "sweep")))


def test_a_refusal_of_slurm_is_passed_on(cluster: Cluster, tmp_path: Path) -> None:
    small = ["data=store", f"data.path={cluster.store}", *MODEL, *DATA, "parallel=zero1", f"run_dir={tmp_path}/run"]
    done = cluster.train("+launcher=local", "launcher.partition=gone", *small)
    assert done.returncode == 2
    assert "invalid partition specified: gone" in done.stderr.splitlines()[-1]
    assert not cluster.states()


def test_srun_in_a_job_of_ones_own_starts_ranks_that_know_each_other(cluster: Cluster, tmp_path: Path) -> None:
    """salloc calls its job "interactive"; two tasks without --ntasks-per-node are what a first script asks for."""
    small = ["data=store", f"data.path={cluster.store}", *SMALL, *QUICK[:3], "model.patch_size=[4,4,4,2]"]
    words = [*small, "parallel=ddp", f"run_dir={tmp_path}/run", "trainer.max_steps=4", "trainer.val_every=4"]
    command = ["salloc", "--nodes=1", "--ntasks=2", "--overcommit", "srun", sys.executable, "-m", "swift.train", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=cluster.env | {"PYTHONPATH": str(cluster.code)}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("figures and checkpoints") == 1
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-0000004" / "manifest.json").read_text())
    assert manifest["manifest"]["world"] == 2


def test_a_job_over_the_limit_of_its_partition(cluster: Cluster, tmp_path: Path) -> None:
    """Refused; one that was queued all the same says in `python -m swift.runs` why it waits."""
    small = ["data=store", f"data.path={cluster.store}", *MODEL, *DATA, "parallel=zero1", "+launcher=local"]
    done = cluster.train(*small, f"run_dir={tmp_path}/refused", "launcher.time=02:00:00")
    assert done.returncode == 2
    assert "launcher.time=02:00:00: jobs of partition local take 01:00:00 at most" in done.stderr.splitlines()[-1]
    assert not cluster.states()
    done = cluster.train(*small, f"run_dir={tmp_path}/waits", "launcher.batch_options=['--time=02:00:00']")
    assert done.returncode == 0, done.stderr
    run = Run(cluster, tmp_path / "waits", done.stdout.split()[1])
    try:
        eventually("a reason", lambda: "PartitionTimeLimit" in str(run.state()["reason"]), 60)
        assert run.state()["state"] == "submitted"
    finally:
        cluster.call("scancel", run.job)


def test_a_second_job_of_a_run_ends_and_the_first_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    # So many steps that it goes on whatever the machine does meanwhile.
    long = ["trainer.max_steps=5000", "trainer.val_every=5000"]
    one_node = ["launcher.nodes=1", "launcher.health=false", "parallel=single", *long]
    run = cluster.submit(tmp_path / "run", *one_node)
    run.wait_for_step(10)
    second = cluster.call("sbatch", "--parsable", str(run.path / "job.sbatch"))
    eventually("end of the second job", lambda: second not in cluster.states(), 120)
    assert f"job {run.job} trains this run: job {second} ends" in run.log()
    # A command in the same folder, while the job trains on another "node".
    env = cluster.env | {"PYTHONPATH": str(cluster.code)}
    command = [sys.executable, "-m", "swift.train", f"resume={run.path}", "parallel=single"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "is training in it" in done.stderr
    run.wait_for_step(run.step() + 10)
    cluster.call("scancel", run.job)
    run.wait(300)
    assert len([line for line in run.lines("attempts.jsonl") if line["event"] == "start"]) == 1

"""Submitting: what is checked, what is frozen, what is said. The batch system is a stand-in that notes its calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from swift.cluster.submit import point_dir
from swift.config.compose import load_frozen, typed
from swift.config.launcher import dealt, frozen_device
from swift.data.store.reader import Store
from swift.train import __main__ as command
from swift.utils.bits import from_text
from swift.utils.errors import UserError
from tests.forked import python_m
from tests.small import DATA, MODEL, TRAINER, composed, small_store

SBATCH = """#!/bin/bash
env | sort >"$(dirname "$0")/environment"
echo "$@" >>"$(dirname "$0")/calls"
if grep -q 'partition=gone' "${@: -1}"; then
    echo "sbatch: error: invalid partition specified: gone" >&2
    echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
    exit 1
fi
echo 4711
"""
SQUEUE = """#!/bin/bash
[ ! -e "$(dirname "$0")/state" ] || echo "4711|$(cat "$(dirname "$0")/state")|None"
"""
SCONTROL = """#!/bin/bash
exit 1
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands of a batch system, first in PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    for name in ("SWIFT_ACCOUNT", "SBATCH_ACCOUNT", "SWIFT_ENVIRONMENT", "SWIFT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return commands


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("data") / "store")


def overrides(run: Path, store: Path, *words: str) -> list[str]:
    small = [*MODEL, *DATA, *TRAINER, "parallel=ddp", "+launcher=frontier", "launcher.machine=null"]
    return ["data=store", f"data.path={store}", f"run_dir={run}", *small, *words]


def train(run: Path, store: Path, *words: str) -> subprocess.CompletedProcess[str]:
    flags, rest = [word for word in words if word == "-m"], [word for word in words if word != "-m"]
    return python_m("swift.train", *flags, *overrides(run, store, *rest), cwd=run.parent, env=dict(os.environ))


ACCOUNT = "launcher.account=abc123"


def test_a_run_is_frozen_submitted_and_announced(cluster: Path, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "first"
    done = train(run, store, ACCOUNT, "launcher.nodes=3", "trainer.max_steps=77")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "job 4711 submitted on frontier: 3 nodes x 8 ranks, 02:00:00, batch",
        f"run directory: {run}",
    ]
    assert f"python -m swift.runs {run}" in done.stdout
    assert (cluster / "calls").read_text() == f"--parsable {run}/job.sbatch\n"
    frozen = load_frozen(run, [])
    assert (frozen.launcher, frozen.parallel.nodes, frozen.parallel.devices) == (None, 3, 8)
    # Not auto: on a node whose driver fails the job would train on the CPU.
    assert frozen.trainer.accelerator == "cuda"
    assert (frozen.trainer.max_steps, frozen.data.path, frozen.run_dir) == (77, str(store), str(run))
    assert frozen.data.stage_dir == "/mnt/bb/$USER/swift-shards"
    assert yaml.safe_load((run / "launcher.yaml").read_text())["account"] == "abc123"
    asked = json.loads((run / "submitted.json").read_text())
    assert "trainer.max_steps=77" in asked["overrides"]
    with tarfile.open(run / "launch" / "code.tar.gz") as archive:
        names = archive.getnames()
        revision = archive.extractfile("swift/swift-revision.json")
        assert revision is not None
        assert json.loads(revision.read()) == asked["git"]
    assert {"swift/train/__main__.py", "conf/config.yaml", "conf/model/tiny.yaml"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    assert json.loads((run / "jobs.jsonl").read_text())["job"] == "4711"


def test_a_job_gets_the_tokens_of_its_cohort(cluster: Path, store: Path, tmp_path: Path) -> None:
    """Its ranks then need not look at all masks; a dry run does not either, and the job would."""
    words = [ACCOUNT, "model.tokens=brain", "data.brain=cohort"]
    for name, extra in (("dry", ["launcher.dry_run=true"]), ("run", [])):
        done = train(tmp_path / name, store, *words, *extra)
        assert done.returncode == 0, done.stderr
    assert load_frozen(tmp_path / "dry", []).model.cohort is None
    cohort = load_frozen(tmp_path / "run", []).model.cohort
    assert cohort is not None
    opened = Store(store)
    brain = np.any([opened.mask(place) for place in range(len(opened.scans))], axis=0)
    np.testing.assert_array_equal(from_text(cohort), brain.reshape(3, 4, 3, 4, 3, 4).any((1, 3, 5)))


def test_the_batch_system_gets_a_clean_environment(
    cluster: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADEDMODULES", "something/1.0")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    assert train(tmp_path / "run", store, ACCOUNT).returncode == 0
    names = {line.partition("=")[0] for line in (cluster / "environment").read_text().splitlines()}
    assert not names & {"LOADEDMODULES", "SLURM_JOB_ID", "VIRTUAL_ENV", "PYTHONPATH"}
    assert {"HOME", "PATH", "USER", "SLURM_CONF"} <= names


def test_a_dry_run_shows_the_job_without_account_or_data_and_calls_nothing(cluster: Path, tmp_path: Path) -> None:
    run = tmp_path / "dry"
    done = train(run, tmp_path / "no-store", "launcher.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (run / "job.sbatch").read_text()
    assert "no account" in done.stderr
    assert "no store.json" in done.stderr
    assert not (cluster / "calls").exists()


BAD = [
    ([], "no account; set SWIFT_ACCOUNT"),
    ([ACCOUNT, "launcher.partition=gone"], "launcher.partition=gone: frontier has batch, extended"),
    (
        [ACCOUNT, "launcher.time=03:00:00"],
        "launcher.time=03:00:00: a job of 16 nodes in batch of frontier may take 02:00",
    ),
    ([ACCOUNT, "launcher.time=two"], "launcher.time=two: must be HH:MM:SS"),
    ([ACCOUNT, "launcher.nodes=9999"], "launcher.nodes=9999: jobs in batch of frontier have 1 to 91"),
    ([ACCOUNT, "launcher.partition=extended", "launcher.nodes=65"], "launcher.nodes=65: jobs in extended"),
    ([ACCOUNT, "launcher.nodes=0"], "launcher.nodes=0: must be at least 1"),
    ([ACCOUNT, "parallel.nodes=4"], "parallel.nodes=4: does not match launcher.nodes=16 x launcher.ranks_per_node=8"),
    ([ACCOUNT, "parallel.devices=2"], "parallel.devices=2: does not match"),
    ([ACCOUNT, "parallel=single"], "parallel=single: one rank, but launcher.nodes=16"),
    ([ACCOUNT, "launcher.global_batch=192"], "launcher.global_batch=192: must be a multiple of the 128 ranks"),
    ([ACCOUNT, "launcher.site=moon"], "launcher.site=moon: no launch/sites/moon.sh"),
    ([ACCOUNT, "launcher.environment=/gone.tar.gz"], "launcher.environment=/gone.tar.gz: no such file"),
    ([ACCOUNT, "data.path=/gone"], "/gone: no store.json and no manifest.csv in it"),
    ([ACCOUNT, "launcher.batch_options=[exclusive]"], "each must begin with -"),
    ([ACCOUNT, "launcher.save_seconds=7200"], "must be longer than the 7200 s"),
    (["launcher.account='a b'"], "launcher.account=a b: must be one word"),
]


@pytest.mark.parametrize(("words", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_gets_one_line_and_queues_nothing(
    cluster: Path, store: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    run = tmp_path / "run"
    given, jobs = overrides(run, store, *words), []
    with pytest.raises(UserError) as caught:
        command.run(composed(*given), given, jobs)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert jobs == []
    assert not (cluster / "calls").exists()
    assert not run.exists()


@pytest.mark.parametrize(("words", "says"), [BAD[0], ([ACCOUNT, "launcher.nods=3"], "nods")])
def test_the_command_says_so_and_ends_with_2(
    cluster: Path, store: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    run = tmp_path / "run"
    done = train(run, store, *words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (cluster / "calls").exists()
    assert not run.exists()


def test_a_file_system_that_takes_nothing(cluster: Path, store: Path) -> None:
    done = train(Path("/proc/swift-run"), store, ACCOUNT)
    assert done.returncode == 2
    # The line before it may say that the tree has uncommitted changes.
    assert done.stderr.splitlines()[-1].startswith("error: run_dir=/proc/swift-run cannot be written")
    assert "Traceback" not in done.stderr
    assert not (cluster / "calls").exists()


@pytest.mark.parametrize(("clips", "batch", "accumulate"), [(96, 4, 1), (24, 1, 1), (1200, 10, 5), (264, 11, 1)])
def test_one_batch_is_dealt_to_the_ranks(clips: int, batch: int, accumulate: int) -> None:
    """Of 24 ranks each takes 11 clips at a time at most, and as few times as share them evenly."""
    words = ["launcher.nodes=3", f"launcher.global_batch={clips}", "data.batch_size=11", "trainer.accumulate=7"]
    cfg = typed(composed("+launcher=frontier", ACCOUNT, "parallel=ddp", *words))
    assert dealt(cfg) == (batch, accumulate)


@pytest.mark.parametrize(
    ("launcher", "words", "frozen"),
    [
        ("aurora", [], "xpu"),
        ("aurora", ["trainer.accelerator=gpu"], "xpu"),
        ("frontier", [], "cuda"),
        ("local", [], "cpu"),
        ("slurm", [], "gpu"),
        ("slurm", ["trainer.accelerator=xpu"], "xpu"),
        ("aurora", ["trainer.accelerator=cpu"], "cpu"),
        ("aurora", ["trainer.accelerator=cuda"], "trainer.accelerator=cuda: launcher=aurora has launcher.device=xpu; "),
        ("local", ["trainer.accelerator=gpu"], "trainer.accelerator=gpu: launcher=local has launcher.device=cpu; "),
    ],
)
def test_a_job_freezes_the_device_of_its_machine(launcher: str, words: list[str], frozen: str) -> None:
    cfg = typed(composed(f"+launcher={launcher}", "parallel=ddp", *words))
    if " " not in frozen:
        assert frozen_device(cfg) == frozen
        return
    with pytest.raises(UserError) as caught:
        frozen_device(cfg)
    assert str(caught.value) == f"{frozen}leave it out and it follows"


def test_points_of_different_jobs_share_none(cluster: Path, store: Path, tmp_path: Path) -> None:
    words = ["-m", ACCOUNT, f"hydra.sweep.dir={tmp_path}/sweep", "launcher.nodes=1,2", "launcher.array=true"]
    done = train(tmp_path / "unused", store, *words)
    assert done.returncode == 2
    assert "0_nodes-1 and 1_nodes-2 ask for different jobs" in done.stderr
    assert not (cluster / "calls").exists()


def test_a_machine_without_sbatch(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = train(tmp_path / "run", store, ACCOUNT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "sbatch is not on this machine; submit on a login node" in done.stderr


def test_a_refusal_of_the_batch_system_is_passed_on(cluster: Path, store: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "run", store, ACCOUNT, "launcher.bins=[]", "launcher.partition=gone")
    assert done.returncode == 2
    assert "Invalid partition name specified" in done.stderr.splitlines()[-1]


def test_the_memory_is_checked_by_the_plan(cluster: Path, tmp_path: Path) -> None:
    store = tmp_path / "not-there-yet"  # so the grid is that of the published sizes
    big = ["model=14b5", "parallel=ddp", "launcher.machine=frontier", "launcher.nodes=1"]
    words = ["data=store", f"data.path={store}", f"run_dir={tmp_path}/run", *big, "+launcher=frontier", ACCOUNT]
    done = python_m("swift.train", *words, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 2
    assert "model=14b5 parallel=ddp does not fit frontier: micro-batch 1 needs" in done.stderr
    assert not (cluster / "calls").exists()


def test_a_folder_that_holds_another_run_or_a_busy_one(cluster: Path, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, store, ACCOUNT).returncode == 0
    other = train(run, store, ACCOUNT, "task.mask_ratio=0.4")
    assert other.returncode == 2
    assert "holds a run with other settings (task.mask_ratio)" in other.stderr
    (cluster / "state").write_text("RUNNING\n")
    busy = train(run, store, ACCOUNT)
    assert busy.returncode == 2
    assert "job 4711 of this run is RUNNING" in busy.stderr
    (cluster / "state").unlink()
    assert train(run, store, ACCOUNT).returncode == 0


def test_a_sweep_is_checked_whole_and_has_a_folder_a_point(cluster: Path, store: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = ["-m", ACCOUNT, f"hydra.sweep.dir={sweep}", "task.mask_ratio=0.4,0.6"]
    units = "task.mask_unit=[4,4,4,2],[8,4,4,2]"
    done = train(tmp_path / "unused", store, *words, units)
    assert done.returncode == 0, done.stderr
    points = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert points == [
        "0_mask_ratio-0.4_mask_unit-4x4x4x2",
        "1_mask_ratio-0.4_mask_unit-8x4x4x2",
        "2_mask_ratio-0.6_mask_unit-4x4x4x2",
        "3_mask_ratio-0.6_mask_unit-8x4x4x2",
    ]
    assert len((cluster / "calls").read_text().splitlines()) == 4
    assert load_frozen(sweep / points[2], []).task.mask_ratio == 0.6
    (cluster / "calls").unlink()
    # The second point is wrong: the first is not queued either.
    again = train(tmp_path / "unused", store, *words[:-1], f"hydra.sweep.dir={sweep}2", "task.mask_ratio=0.4,2")
    assert again.returncode == 2
    assert not (cluster / "calls").exists()


@pytest.mark.parametrize(
    ("option", "jobs"), [("launcher.array=true", ["array"]), ("launcher.pack=2", ["pack-0", "pack-1"])]
)
def test_points_share_jobs(cluster: Path, store: Path, tmp_path: Path, option: str, jobs: list[str]) -> None:
    sweep = tmp_path / "sweep"
    done = train(tmp_path / "unused", store, "-m", ACCOUNT, f"hydra.sweep.dir={sweep}", "seed=1,2,3", option)
    assert done.returncode == 0, done.stderr
    assert (cluster / "calls").read_text() == "".join(f"--parsable {sweep}/{job}.sbatch\n" for job in jobs)
    listed = [line for job in jobs for line in (sweep / f"{job}.txt").read_text().splitlines()]
    assert listed == [f"{sweep}/{number}_seed-{number + 1}" for number in range(3)]
    numbers = [json.loads((Path(run) / "jobs.jsonl").read_text())["job"] for run in listed]
    assert numbers == (["4711_0", "4711_1", "4711_2"] if "array" in option else ["4711"] * 3)


def test_names_of_points(tmp_path: Path) -> None:
    numbered = tmp_path / "3"
    numbered.mkdir()
    words = ["-m", "model=tiny", "model.patch_size=[6,6,6,1],[6,6,6,2]", "trainer.wandb=true", "model/variant=v1,joint"]
    point = ["model=tiny", "model.patch_size=[6,6,6,2]", "trainer.wandb=True", "model/variant=joint"]
    assert point_dir(numbered, point, words) == tmp_path / "3_patch_size-6x6x6x2_model-variant-joint"
    assert not numbered.exists()


def test_importing_it_loads_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, swift.cluster.submit, swift.cluster.status\n"
        "print([name for name in ('torch', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

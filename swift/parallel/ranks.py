"""Where this process stands among the ranks of a run, and starting the ranks of one machine.

Ranks come from srun, from torchrun, or from `start_ranks`: `python -m swift.train parallel=ddp parallel.devices=2`
starts two copies of itself and watches them. Importing this module is cheap: no torch, no Lightning.
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
    """none: alone | swift: started by `start_ranks` | torchrun | mpiexec | slurm."""

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return self.world // self.local_world


def current_place(env: Mapping[str, str] = os.environ) -> Place:
    """Where a launcher's environment puts this process."""

    def number(name: str, default: int | None = None) -> int:
        return int(env[name]) if default is None else int(env.get(name, default))

    if SETTINGS in env:
        return Place(number("RANK"), number("LOCAL_RANK"), number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE"), "swift")
    if "TORCHELASTIC_RUN_ID" in env:
        return Place(number("RANK"), number("LOCAL_RANK"), number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE"), "torchrun")
    if "PALS_RANKID" in env:
        # mpiexec of Cray PALS; launch/rank.sh adds the sizes.
        return Place(number("RANK"), number("LOCAL_RANK"), number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE"), "mpiexec")
    # An interactive job's shell or a batch script has SLURM_NTASKS too; only srun gives a process its own number, and
    # a shell started by srun (salloc's default step, `srun --pty bash`) is named so by Slurm.
    if "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive") and "SLURM_STEP_ID" in env:
        world = number("SLURM_NTASKS", 1)
        local = world // number("SLURM_NNODES", 1)
        return Place(number("SLURM_PROCID"), number("SLURM_LOCALID", 0), world, local, "slurm")
    return Place(0, 0, 1, 1, "none")


def first_to_report(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this rank is the first on its node to say that the run failed: the others then keep silent."""
    names = (
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
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

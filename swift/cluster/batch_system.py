"""Questions to the batch system, asked in a clean environment."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from swift.utils.errors import UserError

_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


@dataclass(frozen=True)
class Limits:
    """What jobs of a partition may ask for; None: as much as they like."""

    partition: str
    seconds: int | None
    nodes: int | None


@dataclass(frozen=True)
class Queued:
    """A job that Slurm knows: PENDING, RUNNING, ...; and why it waits."""

    state: str
    reason: str


def clean_environment() -> dict[str, str]:
    """What a login shell starts from: a job must not depend on modules or environments that happen to be active."""
    kept = ("HOME", "LANG", "SHELL", "SLURM_CONF", "TERM", "TZ")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    user = getpass.getuser()
    return env | {"USER": user, "LOGNAME": user, "PATH": "/usr/local/bin:/usr/bin:/bin"}


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of the batch system.

    Raises:
        UserError: it is not on this machine, or gives no answer.
    """
    executable = shutil.which(command[0])
    if executable is None:
        raise UserError(f"{command[0]} is not on this machine")
    try:
        return subprocess.run(
            [executable, *command[1:]], env=clean_environment(), capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} gives no answer: the batch system is down or busy, try again later") from error


def limits(partition: str | None) -> Limits | None:
    """The limits of a partition of Slurm, None where Slurm does not know it.

    Args:
        partition: Its name; None: the default one.
    """
    if shutil.which("scontrol") is None:
        return None
    answer = ask(["scontrol", "--oneliner", "show", "partition", *([partition] if partition else [])])
    for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if partition or fields.get("Default") == "YES":
            nodes = fields.get("MaxNodes", "")
            return Limits(
                fields.get("PartitionName", ""),
                _seconds(fields.get("MaxTime", "")),
                int(nodes) if nodes.isdigit() else None,
            )
    return None


def _seconds(text: str) -> int | None:
    """Seconds of Slurm's [days-]hours:minutes:seconds, None for UNLIMITED and the like."""
    found = _TIME.fullmatch(text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def queue(jobs: Sequence[str]) -> dict[str, Queued]:
    """Those of `jobs` (numbers, of a job array ARRAY_INDEX) that are in Slurm's queue.

    Raises:
        UserError: Slurm gives no answer.
    """
    answer = ask(["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={','.join(jobs)}"])
    # Of one job that is long gone Slurm says this.
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"squeue: {' '.join(answer.stderr.split()) or f'status {answer.returncode}'}")
    rows = [line.strip().split("|") for line in answer.stdout.splitlines()]
    return {row[0]: Queued(row[1], row[2]) for row in rows if len(row) == 3}

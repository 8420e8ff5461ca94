"""What the examples of the gallery share: swift's commands as a shell would run them, and the figures they leave."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "gallery"
"""Where the examples work: cohort, store and runs."""

shown: list[Path] = []
"""Figures that swift wrote and that are not on the page yet."""


def swift(command: str, last: int = 0) -> None:
    """Run `swift-fmri COMMAND` in WORK, and print it with what it says (its `last` lines; 0: all).

    Raises:
        SystemExit: it failed; the last lines that it wrote are the message.
    """
    print(f"$ swift-fmri {command}", flush=True)
    # One thread: the models are tiny, and a shared machine is not slowed down.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    WORK.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "swift", *shlex.split(command)],
        cwd=WORK,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(f"swift-fmri {command}\nended with status {done.returncode}:\n{done.stdout[-2000:]}")
    lines = done.stdout.splitlines()[-last:]
    print("\n".join(lines), flush=True)


def needs(*names: str, example: str) -> None:
    """Stop unless these lie in WORK; `example` makes them."""
    missing = [name for name in names if not (WORK / name).exists()]
    if missing:
        raise SystemExit(f"{', '.join(missing)} is not in {WORK}: run docs/gallery/{example} first")


def show(figure: str) -> None:
    """Put a picture of WORK on the page; in a shell: say where it is."""
    shown.append(WORK / figure)
    print(f"figure: {figure}")

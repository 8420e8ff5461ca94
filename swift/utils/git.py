"""Which revision of the code this is: of a git checkout, or of a copy that a job was given."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

NOT_GIT = "not a git checkout"
REVISION_FILE = "swift-revision.json"
"""Stands in the package in a copy of the code; holds what `git_state` returned where the copy was made."""


def git_state(folder: Path) -> dict[str, Any]:
    """Revision of the checkout that `folder` is tracked in.

    A package installed below somebody's repository (a virtual environment inside a checkout) is not part of it: files
    in `folder` must be tracked.

    Returns:
        {"revision": 40 hex digits, "dirty": bool} (dirty: changed or untracked files), or {"revision": why there is
        none, "dirty": None}.
    """
    # variables of a calling git hook would point git at another repository
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"LC_ALL": "C"}

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20, env=env, check=True
        )
        return done.stdout.strip()

    copied = folder / REVISION_FILE
    if copied.is_file():
        state: dict[str, Any] = json.loads(copied.read_text(encoding="utf-8"))
        return state
    try:
        if not git("ls-files", "--", "."):
            return {"revision": NOT_GIT, "dirty": None}
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().partition("\n")[0]
        return {"revision": NOT_GIT if "not a git repository" in reason else f"unknown: {reason}", "dirty": None}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"revision": f"unknown: {type(error).__name__}", "dirty": None}

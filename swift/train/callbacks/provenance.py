"""provenance.json: with which code, packages and machine a run was made, and how often it was started again."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from swift.utils.errors import UserError
from swift.utils.files import replace_text
from swift.utils.git import git_state
from swift.utils.machine import host, packages

FILE = "provenance.json"


def collect(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What is known about this process.

    Args:
        overrides: The settings given on the command line, as typed.

    Returns:
        JSON-ready: "time" (UTC, ISO 8601), "overrides", "git" (see `swift.utils.git`), "packages" (name -> version),
        "python", "host" (see `host`).
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "overrides": list(overrides),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "packages": packages(),
        "python": platform.python_version(),
        "host": host(),
    }


def record(run_dir: str | Path, now: dict[str, Any], step: int = 0) -> dict[str, Any]:
    """Write or continue RUN/provenance.json.

    The first start is kept as it was; each later one is added to "restarts" with its time, its step and whatever
    differs from the first start.

    Args:
        run_dir: Folder of the run.
        now: From `collect`.
        step: Optimizer steps done.

    Returns:
        The content of the file.

    Raises:
        UserError: The file cannot be written.
    """
    path = Path(run_dir) / FILE
    try:
        content = _previous(path)
        if content is None:
            content = {"started": now["time"], **{k: v for k, v in now.items() if k != "time"}, "restarts": []}
        else:
            changed = {k: v for k, v in now.items() if k != "time" and v != content.get(k)}
            content["restarts"].append({"time": now["time"], "step": step, "changed": changed})
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another run_dir=") from error
    return content


def _previous(path: Path) -> dict[str, Any] | None:
    """Content of an earlier start, or None. A damaged file is set aside: it must not keep a run from going on."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if isinstance(content, dict) and isinstance(content.get("restarts"), list):
        return content
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    rank_zero_warn(f"{path} is damaged; kept as {aside.name}, a new one is begun")
    return None


class Provenance(pl.Callback):
    """Writes RUN/provenance.json when training starts, on rank zero.

    Args:
        run_dir: Folder of the run.
        overrides: The settings given on the command line, as typed.
    """

    def __init__(self, run_dir: str | Path, overrides: Sequence[str] = ()) -> None:
        self.run_dir = Path(run_dir)
        self.overrides = list(overrides)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after a checkpoint is restored, so that a restart knows its step."""
        if trainer.is_global_zero:
            record(self.run_dir, collect(self.overrides), trainer.global_step)

"""What a job reads from its run directory, written whole: settings, the code of today, shell files, what was asked."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from swift.cluster.job_text import launch_dir
from swift.config.compose import FROZEN, conf_dir, freeze
from swift.config.schema import Config, LauncherConfig
from swift.utils.files import replace_text
from swift.utils.git import REVISION_FILE

FINISHED = "finished"
"""RUN/launch/finished stands once a job has ended well."""
_SHELL_FILES = ("job.sh", "place.sh", "rank.sh", "unpack.sh", "monitor.sh", "pack.sh")


def freeze_run(cfg: Config, launcher: LauncherConfig, run: Path, overrides: Sequence[str], git: dict[str, Any]) -> None:
    """Put everything into `run` that its jobs will read.

    Args:
        cfg: Settings as they run in the job.
        launcher: How the job was asked for.
        run: Folder of the run; made if need be.
        overrides: The settings given on the command line, as typed.
        git: From `swift.utils.git.git_state`.

    Raises:
        OSError: the folder cannot be written.
    """
    launch = run / "launch"
    (run / "log").mkdir(parents=True, exist_ok=True)
    launch.mkdir(exist_ok=True)
    (launch / FINISHED).unlink(missing_ok=True)
    write_code(launch / "code.tar.gz", git)
    sources = {name: name for name in _SHELL_FILES}
    sources |= {"scheduler.sh": f"{launcher.scheduler}.sh", "site.sh": f"sites/{launcher.site}.sh"}
    for name, source in sources.items():
        replace_text(launch / name, (launch_dir() / source).read_text(encoding="utf-8"), executable=True)
    replace_text(run / "launcher.yaml", OmegaConf.to_yaml(OmegaConf.structured(launcher)))
    asked = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "overrides": list(overrides),
        "git": git,
        "python": sys.executable,
    }
    replace_text(run / "submitted.json", json.dumps(asked, indent=2) + "\n")
    # Last: with this file the folder is a run.
    freeze(cfg, run / FROZEN)


def write_code(path: Path, git: dict[str, Any]) -> None:
    """The package and conf/ as one archive; the same bytes for the same code.

    Args:
        path: The .tar.gz to write.
        git: Goes along, so that a run from the copy knows its revision.
    """
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for name, source in _code_files():
            _add(archive, name, source.read_bytes())
        _add(archive, f"swift/{REVISION_FILE}", (json.dumps(git) + "\n").encode())
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def _code_files() -> Iterator[tuple[str, Path]]:
    """(name in the archive, file) of the package and of conf/, which a wheel has inside the package."""
    package = Path(__file__).resolve().parents[1]
    roots = [("swift", package)] if package in conf_dir().parents else [("swift", package), ("conf", conf_dir())]
    for name, root in roots:
        for source in sorted(root.rglob("*")):
            inside = source.relative_to(root)
            if source.is_file() and source.name != REVISION_FILE and not {"__pycache__", "launch"} & set(inside.parts):
                yield f"{name}/{inside.as_posix()}", source


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = 0o644
    archive.addfile(entry, io.BytesIO(content))

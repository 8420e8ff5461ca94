"""From the settings of a launcher to the text of a job: the templates of launch/, filled in."""

from __future__ import annotations

import shlex
import string
from pathlib import Path

from swift.config.launcher import seconds
from swift.config.schema import LauncherConfig

SUFFIX = {"slurm": "sbatch", "pbs": "pbs"}
"""launcher.scheduler -> ending of its job files."""
HEALTH_SECONDS = 300
"""How long the look at all nodes before a run may take."""


class _Template(string.Template):
    """Placeholders are @@{name}, because $ and { } are the shell's."""

    delimiter = "@@"


def launch_dir() -> Path:
    """Folder of the shell files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "launch"
    return inside if inside.is_dir() else package.parent / "launch"


def site_files() -> list[str]:
    """Names that launcher.site can have."""
    return sorted(path.stem for path in (launch_dir() / "sites").glob("*.sh"))


def _options(cfg: LauncherConfig) -> list[str]:
    """Lines of the head that not every job has."""
    if cfg.scheduler == "pbs":
        account = [f"-A {cfg.account}"] if cfg.account else []
        queue = [f"-q {cfg.partition}"] if cfg.partition else []
        return [f"#PBS {option}" for option in [*account, *queue, *cfg.batch_options]]
    named = {"account": cfg.account, "partition": cfg.partition, "qos": cfg.qos}
    options = [f"--{name}={value}" for name, value in named.items() if value]
    if cfg.save_seconds:
        # B: to this script, which then asks the ranks; else every process would get it, data workers too.
        options.append(f"--signal=B:USR1@{cfg.save_seconds}")
    return [f"#SBATCH {option}" for option in [*options, *cfg.batch_options]]


def _settings(cfg: LauncherConfig, python: str, data: Path | None, cache: str | None) -> list[str]:
    """What the shell files read."""
    values = {
        "NODES": cfg.nodes,
        "RANKS_PER_NODE": cfg.ranks_per_node,
        "CORES_PER_RANK": cfg.cores_per_rank,
        "CORES_PER_NODE": cfg.cores_per_rank * cfg.ranks_per_node,
        "TIME_SECONDS": seconds(cfg.time),
        "SAVE_SECONDS": cfg.save_seconds,
        "HANG_SECONDS": round(cfg.hang_minutes * 60),
        "FRUITLESS_RESTARTS": cfg.fruitless_restarts,
        "HEALTH": "true" if cfg.health else "false",
        "HEALTH_SECONDS": HEALTH_SECONDS,
        "MIN_FREE_GB": cfg.min_free_gb,
        "DEVICE": cfg.device,
        "MONITOR_SECONDS": cfg.monitor_seconds,
        "DATA": data or "",
        "ENVIRONMENT": cfg.environment or "",
        "SUBMIT_PYTHON": python,
        "SUFFIX": SUFFIX[cfg.scheduler],
    }
    lines = [f"export SWIFT_{name}={shlex.quote(str(value))}" for name, value in values.items()]
    # Not quoted: the node's own shell fills in $USER.
    lines.append(f'export SWIFT_NODE_LOCAL="{cfg.node_local or ""}"')
    if cache:
        lines.append(f"export SWIFT_CACHE={shlex.quote(cache)}")
    return lines


def _filled(name: str, cfg: LauncherConfig, run: Path, nodes: int, **more: object) -> str:
    template = _Template((launch_dir() / "templates" / name).read_text(encoding="utf-8"))
    shape = {"ranks_per_node": cfg.ranks_per_node, "cores_per_rank": cfg.cores_per_rank, "time": cfg.time}
    options = "\n".join(_options(cfg))
    text = template.substitute(
        machine=cfg.name, job_name=job_name(run), run=run, nodes=nodes, options=options, **shape, **more
    )
    return text.replace("\n\n\n", "\n\n")


def job_name(run: Path) -> str:
    """The folder's name, as short as PBS wants it (15 characters of old, 230 today)."""
    return f"swift-{run.name}"[:230]


def job_script(cfg: LauncherConfig, run: Path, python: str, data: Path | None, cache: str | None = None) -> str:
    """The job of one run.

    Args:
        cfg: The launcher.
        run: Absolute run directory.
        python: Interpreter that runs where no environment is sent.
        data: Folder that every node must be able to read, if known.
        cache: $SWIFT_CACHE of the submitting shell.
    """
    return _filled(
        f"job.{SUFFIX[cfg.scheduler]}",
        cfg,
        run,
        cfg.nodes,
        settings="\n".join(_settings(cfg, python, data, cache)),
        step_options="\n".join(f"    '{option}'" for option in cfg.step_options),
    ).replace("STEP_OPTIONS=(\n\n)", "STEP_OPTIONS=()")


def array_script(cfg: LauncherConfig, sweep: Path, points: int, listing: Path) -> str:
    """One job array of `points` runs, whose folders `listing` names."""
    name = f"array.{SUFFIX[cfg.scheduler]}"
    return _filled(name, cfg, sweep, cfg.nodes, last=points - 1, points=shlex.quote(str(listing)))


def pack_script(cfg: LauncherConfig, sweep: Path, points: int, listing: Path) -> str:
    """One job of `points` runs side by side, whose folders `listing` names."""
    return _filled("pack.sbatch", cfg, sweep, cfg.nodes * points, points=shlex.quote(str(listing)))

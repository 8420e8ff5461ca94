"""A run as a job of a cluster: check, freeze, write the job, submit it, return.

What is frozen into the run directory is what runs: the composed settings (config.yaml), the code as it is now
(launch/code.tar.gz) and the shell files of launch/. Later edits reach no queued job. Imports neither torch nor
Lightning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swift.cluster.batch_system import ask, limits, queue
from swift.cluster.job_files import freeze_run
from swift.cluster.job_text import SUFFIX, array_script, job_script, pack_script, site_files
from swift.config.compose import FROZEN, as_begun, differences, load_frozen, whole_paths, writable
from swift.config.launcher import check_ranks, dealt, frozen_device, seconds
from swift.config.schema import Config, LauncherConfig
from swift.utils import jsonl
from swift.utils.errors import UserError
from swift.utils.files import replace_text
from swift.utils.git import git_state

log = logging.getLogger(__name__)

JOBS = "jobs.jsonl"
"""In a run directory: a line for every job submitted."""
_COMMANDS = {"slurm": "sbatch", "pbs": "qsub"}
# Such a path needs no quoting anywhere, neither in the head of a job file nor in the shell.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+=@,-]+")


@dataclass(frozen=True)
class Prepared:
    """A run whose directory holds all that a job needs."""

    cfg: Config
    """As composed, with its launcher."""
    run_dir: Path
    script: Path


def prepare(
    cfg: Config, overrides: Sequence[str], make_data: Callable[[Config], Path], settle: Callable[[Config], Config]
) -> Prepared:
    """Check a run, and put everything its job needs into its directory.

    Args:
        cfg: Settings with a launcher.
        overrides: The settings given on the command line, as typed.
        make_data: Gives the folder of a store, made first where it does not exist yet (sample, synthetic).
        settle: Fills in what the data decide on, so that the ranks need not; a dry run leaves that to the job.

    Raises:
        UserError: a wrong value, or a missing file or command.
    """
    assert cfg.launcher is not None
    environment = cfg.launcher.environment
    launcher = replace(cfg.launcher, environment=str(Path(environment).absolute()) if environment else None)
    check_ranks(cfg)
    _check_site(launcher)
    run = _run_dir(cfg)
    frozen = as_begun(_as_it_will_run(cfg, run), run)
    if not writable(run):
        raise UserError(f"run_dir={run} cannot be written: choose another")
    _check_same_run(run, frozen)
    check_memory(cfg)
    data = _checked_data(frozen, launcher, make_data)
    if not launcher.dry_run:
        frozen = settle(frozen)
    git = git_state(Path(__file__).resolve().parents[1])
    if git["dirty"]:
        log.warning("uncommitted changes: the job gets the code as it is now, %s with changes", git["revision"][:12])
    if not launcher.dry_run:
        _check_idle(launcher, run)
    _check_limits(launcher)
    script = run / f"job.{SUFFIX[launcher.scheduler]}"
    try:
        freeze_run(frozen, launcher, run, overrides, git)
        # Health looks for what the run will use.
        launcher = replace(launcher, device=frozen.trainer.accelerator)
        text = job_script(launcher, run, sys.executable, data, os.environ.get("SWIFT_CACHE"))
        replace_text(script, text, executable=True)
    except OSError as error:
        raise UserError(f"run_dir={run} cannot be written: {error.strerror or error}") from error
    return Prepared(cfg, run, script)


def submit(points: Sequence[Prepared]) -> None:
    """Queue the jobs of one run, or of all points of a sweep: a job a point, one array, or packs side by side.

    Returns as soon as the batch system has them.

    Raises:
        UserError: the batch system refuses; what was queued before has been announced.
    """
    launcher = points[0].cfg.launcher
    assert launcher is not None
    for number, (script, members) in enumerate(_jobs(launcher, points)):
        if launcher.dry_run:
            if number == 0:
                print(script.read_text(encoding="utf-8"), end="")
            log.info("dry run: nothing was submitted; the job stands in %s", script)
        else:
            announce(launcher, script.parent, _queue(launcher, script, members), len(members))


def _jobs(launcher: LauncherConfig, points: Sequence[Prepared]) -> list[tuple[Path, Sequence[Prepared]]]:
    """Job files and the runs in each; those of several runs are written here, into the folder of the sweep."""
    if len(points) == 1 or not (launcher.array or launcher.pack > 1):
        return [(point.script, [point]) for point in points]
    sweep = points[0].run_dir.parent
    for point in points:
        if point.cfg.launcher != launcher:
            raise UserError(
                f"launcher.array, launcher.pack: {points[0].run_dir.name} and {point.run_dir.name} ask for different "
                "jobs, but points that share one have the same launcher settings: leave it out"
            )
    suffix = SUFFIX[launcher.scheduler]
    size = len(points) if launcher.array else launcher.pack
    jobs: list[tuple[Path, Sequence[Prepared]]] = []
    (sweep / "log").mkdir(exist_ok=True)
    for first in range(0, len(points), size):
        members = points[first : first + size]
        name = "array" if launcher.array else f"pack-{len(jobs)}"
        listing, script = sweep / f"{name}.txt", sweep / f"{name}.{suffix}"
        replace_text(listing, "".join(f"{point.run_dir}\n" for point in members))
        fill = array_script if launcher.array else pack_script
        replace_text(script, fill(launcher, sweep, len(members), listing), executable=True)
        jobs.append((script, members))
    return jobs


def point_dir(numbered: Path, overrides: Sequence[str], given: Sequence[str]) -> Path:
    """Folder of one point of a sweep, named by what is swept: 2_mask_ratio-0.4_patch_size-6x6x6x1.

    Args:
        numbered: Folder that Hydra has made for the point, named by its number; removed where it is empty.
        overrides: Settings of this point.
        given: The settings on the command line, swept ones with all their values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([word for word in given if word[:1] != "-" and "=" in word])
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    parts = [numbered.name]
    for override in overrides:
        name, _, value = override.partition("=")
        if name.lstrip("+") in swept:
            words = re.sub(r"[^A-Za-z0-9.+]+", "x", value).strip("x")
            parts.append(f"{name.lstrip('+').rpartition('.')[2].replace('/', '-')}-{words}")
    with contextlib.suppress(OSError):
        numbered.rmdir()
    return numbered.parent / "_".join(parts)[:200]


def _check_site(launcher: LauncherConfig) -> None:
    if launcher.site not in site_files():
        raise UserError(f"launcher.site={launcher.site}: no launch/sites/{launcher.site}.sh; there are {site_files()}")
    if launcher.pack > 1 and launcher.scheduler != "slurm":
        raise UserError(f"launcher.pack={launcher.pack}: only Slurm; {launcher.name} has PBS, use launcher.array=true")
    environment = launcher.environment
    if environment and not Path(environment).is_file():
        raise UserError(f"launcher.environment={environment}: no such file; make it with launch/pack_env.sh")
    account = f"launcher={launcher.name}: no account; set SWIFT_ACCOUNT to your project, or launcher.account=PROJECT"
    command = _COMMANDS[launcher.scheduler]
    missing = (
        f"launcher={launcher.name}: {command} is not on this machine; submit on a login node, "
        "or see the job with launcher.dry_run=true"
    )
    _require_here(launcher, not launcher.needs_account or bool(launcher.account), account)
    _require_here(launcher, shutil.which(command) is not None, missing)


def _require_here(launcher: LauncherConfig, holds: bool, message: str) -> None:
    """Refuse what only the login node knows to be wrong; in a dry run, anywhere, it is a warning."""
    if not holds:
        if not launcher.dry_run:
            raise UserError(message)
        log.warning("on submitting: %s", message)


def _run_dir(cfg: Config) -> Path:
    run = Path(cfg.run_dir).absolute()
    if not _PLAIN_PATH.fullmatch(str(run)):
        raise UserError(
            f"run_dir={run}: the folder of a job may have letters, digits and . _ + = @ , - in its name only"
        )
    return run


def _as_it_will_run(cfg: Config, run: Path) -> Config:
    """The settings in the job: no launcher, its ranks and its device, and paths that hold in any folder."""
    launcher = cfg.launcher
    assert launcher is not None

    single = cfg.parallel.name == "single"
    parallel = cfg.parallel if single else replace(cfg.parallel, nodes=launcher.nodes, devices=launcher.ranks_per_node)
    batch, accumulate = dealt(cfg)
    stage_dir = f"{launcher.node_local}/swift-shards" if launcher.stage_data else None
    cfg = whole_paths(cfg)
    data = replace(cfg.data, stage_dir=cfg.data.stage_dir or stage_dir, batch_size=batch)
    trainer = replace(cfg.trainer, accumulate=accumulate, accelerator=frozen_device(cfg))
    return replace(cfg, launcher=None, run_dir=str(run), parallel=parallel, data=data, trainer=trainer)


def _check_same_run(run: Path, frozen: Config) -> None:
    if not (run / FROZEN).exists():
        return
    changed = differences(replace(load_frozen(run, []), run_dir=frozen.run_dir), frozen)
    if changed:
        raise UserError(
            f"run_dir={run} holds a run with other settings ({', '.join(changed)}): choose another run_dir, "
            f"or go on with that run by submitting its job file again"
        )


def check_memory(cfg: Config) -> None:
    """Refuse a run that the plan says does not fit the devices or the hosts of the machine.

    Raises:
        UserError: what does not fit, and what would.
    """
    launcher = cfg.launcher
    assert launcher is not None
    if launcher.machine is None:
        return
    # The plan counts parameters on torch's meta device: seconds, spared where nothing is known of the machine.
    from swift.plan.devices import load_site
    from swift.plan.planning import make_plan, why_not

    site = replace(load_site(launcher.machine), devices_per_node=launcher.ranks_per_node)
    plan = make_plan(cfg, site, launcher.nodes, dealt(cfg)[0], clips=1.0)
    if not plan.chosen.fits:
        remedy = f"; what would fit: {plan.suggestions[0]}" if plan.suggestions else ""
        raise UserError(
            f"model={cfg.model.name} parallel={cfg.parallel.name} does not fit {launcher.name}: {why_not(plan)}{remedy}"
        )


def _checked_data(frozen: Config, launcher: LauncherConfig, make_data: Callable[[Config], Path]) -> Path | None:
    """Folder of the store, if it is known yet."""
    if frozen.data.name != "store":
        # Compute nodes reach no registry: the sample scans are fetched here. A dry run fetches nothing.
        return None if launcher.dry_run else make_data(frozen).absolute()
    stores = [cohort.path for cohort in frozen.data.mixture] or [frozen.data.path or ""]
    for store in stores:
        missing = [name for name in ("store.json", "manifest.csv") if not (Path(store) / name).is_file()]
        message = f"{store}: no {' and no '.join(missing)} in it; make a store with python -m swift.data ingest"
        _require_here(launcher, not missing, message)
    return Path(stores[0])


def _check_idle(launcher: LauncherConfig, run: Path) -> None:
    """Refuse a second job for a run that has one."""
    path = run / JOBS
    if launcher.scheduler != "slurm" or not path.exists():
        return
    job = str(jsonl.read(path)[-1]["job"])
    found = queue([job]).get(job)
    if found and found.state in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING"):
        raise UserError(f"run_dir={run}: job {job} of this run is {found.state}; scancel {job} ends it")


def _check_limits(launcher: LauncherConfig) -> None:
    """Refuse a job that its partition never starts: Slurm queues it all the same."""
    options = " ".join(launcher.batch_options)
    if launcher.scheduler != "slurm" or re.search(r"(^| )(--partition|--time|-p|-t)\b", options):
        return
    most = limits(launcher.partition)
    if most is None:
        return
    problem = None
    if most.seconds is not None and (seconds(launcher.time) or 0) > most.seconds:
        longest = f"{most.seconds // 3600:02d}:{most.seconds // 60 % 60:02d}:{most.seconds % 60:02d}"
        problem = (
            f"launcher.time={launcher.time}: jobs of partition {most.partition} take {longest} at most, this one would "
            "wait for ever; a longer run goes on by itself in the next job"
        )
    nodes = launcher.nodes * launcher.pack
    if most.nodes is not None and nodes > most.nodes:
        problem = f"launcher.nodes={launcher.nodes}: jobs of partition {most.partition} have {most.nodes} nodes at most"
        problem += f", and this one would have {nodes}" if launcher.pack > 1 else ""
    if problem and launcher.qos:
        # A quality of service may lift the limits of a partition.
        log.warning("unless launcher.qos=%s allows it: %s", launcher.qos, problem)
    elif problem:
        _require_here(launcher, False, problem)


def _queue(launcher: LauncherConfig, script: Path, points: Sequence[Prepared]) -> str:
    """Hand a job file to the batch system; returns the job's number, and notes it in every run."""
    command = _COMMANDS[launcher.scheduler]
    done = ask([command, *(["--parsable"] if launcher.scheduler == "slurm" else []), str(script)])
    if done.returncode:
        why = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise UserError(f"{command} refuses {script}: {why or f'status {done.returncode}'}")
    job = done.stdout.strip().splitlines()[-1].partition(";")[0]
    for index, point in enumerate(points):
        own = f"{job}_{index}" if launcher.array else job
        jsonl.append(point.run_dir / JOBS, {"job": own, "time": round(time.time(), 3), "script": str(script)})
    return job


def announce(launcher: LauncherConfig, run: Path, job: str, points: int) -> None:
    """Say what was submitted and how to follow it.

    Args:
        launcher: How.
        run: Folder of the run, or of the sweep.
        job: Number of the job.
        points: Runs in it.
    """
    where = launcher.partition or launcher.qos
    what = f"{points} points, each " if points > 1 else ""
    print(
        f"job {job} submitted on {launcher.name}: {what}{launcher.nodes} nodes x {launcher.ranks_per_node} ranks, "
        f"{launcher.time}{f', {where}' if where else ''}"
    )
    print(f"run directory: {run}")
    status = f"squeue -j {job}" if launcher.scheduler == "slurm" else f"qstat {job}"
    print(f"follow it: {status}; tail -F {run}/log/*; python -m swift.runs {run}")

"""Checks of `+launcher=`: mistakes that show before a job is queued."""

from __future__ import annotations

import math
import re

from swift.config.schema import Config, LauncherConfig, ParallelConfig
from swift.utils.errors import UserError, require

_TIME = re.compile(r"(\d{1,3}):([0-5]\d):([0-5]\d)")
# Everything that stands in the head of a job script: there the batch system reads it, quoted by nobody.
_WORD = re.compile(r"[A-Za-z0-9._+@:,-]+")


def seconds(time: str) -> int | None:
    """Seconds of HH:MM:SS, None for anything else."""
    found = _TIME.fullmatch(time)
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3]) if found else None


def _require(condition: bool, name: str, value: object, legal: str) -> None:
    require(condition, f"launcher.{name}", value, legal)


def check_launcher(cfg: LauncherConfig) -> None:
    """Raise UserError for values that no job can have on the machine of `cfg`."""
    _require(cfg.scheduler in ("slurm", "pbs"), "scheduler", cfg.scheduler, "must be one of slurm, pbs")
    for name in ("nodes", "ranks_per_node", "cores_per_rank", "pack", "fruitless_restarts"):
        _require(getattr(cfg, name) >= 1, name, getattr(cfg, name), "must be at least 1")
    for name in ("monitor_seconds", "save_seconds", "min_free_gb"):
        _require(getattr(cfg, name) >= 0, name, getattr(cfg, name), "must not be negative")
    _require(0 < cfg.hang_minutes < math.inf, "hang_minutes", cfg.hang_minutes, "must be a number of minutes above 0")
    kinds = ("gpu", "cpu", "cuda", "xpu")
    _require(cfg.device in kinds, "device", cfg.device, f"must be one of {', '.join(kinds)}")
    for name in ("name", "site"):
        _require(bool(_WORD.fullmatch(getattr(cfg, name))), name, getattr(cfg, name), "must be one word")
    for name in ("account", "partition", "qos"):
        # Empty is what an empty environment variable gives: none.
        value = getattr(cfg, name) or "none"
        _require(bool(_WORD.fullmatch(value)), name, value, "must be one word")
    _require(not (cfg.array and cfg.pack > 1), "pack", cfg.pack, "must be 1 with launcher.array=true: one or the other")
    for name in ("batch_options", "step_options"):
        for option in getattr(cfg, name):
            legal = "each must begin with - and stand on one line, without quotes"
            _require(option.startswith("-") and not set(option) & set("\n'\"\\"), name, option, legal)
    for name in ("environment", "stage_data"):
        value = getattr(cfg, name)
        _require(not value or bool(cfg.node_local), name, value, "needs launcher.node_local, where to put it")
    _check_time(cfg)


def _check_time(cfg: LauncherConfig) -> None:
    """The time, and the bins of the partition."""
    time = seconds(cfg.time)
    if time is None:
        raise UserError(f"launcher.time={cfg.time}: must be HH:MM:SS")
    legal = (
        f"must be longer than the {cfg.save_seconds} s before its end at which the run saves (launcher.save_seconds)"
    )
    _require(time > cfg.save_seconds, "time", cfg.time, legal)
    if not cfg.bins:
        return
    field, where = ("partition", cfg.partition) if cfg.partition else ("qos", cfg.qos)
    bins = [part for part in cfg.bins if part.partition == where]
    if not bins:
        known = ", ".join(dict.fromkeys(part.partition for part in cfg.bins))
        raise UserError(f"launcher.{field}={where}: {cfg.name} has {known}")
    fitting = [part for part in bins if part.min_nodes <= cfg.nodes * cfg.pack <= part.max_nodes]
    if not fitting:
        sizes = ", ".join(f"{part.min_nodes} to {part.max_nodes}" for part in bins)
        given = f"launcher.nodes={cfg.nodes}" + (f" x launcher.pack={cfg.pack}" if cfg.pack > 1 else "")
        raise UserError(f"{given}: jobs in {where} of {cfg.name} have {sizes} nodes")
    longest = max(fitting, key=lambda part: seconds(part.time) or 0)
    legal = (
        f"a job of {cfg.nodes * cfg.pack} nodes in {where} of {cfg.name} may take {longest.time} at most; "
        "a longer run goes on by itself in the next job"
    )
    _require(time <= (seconds(longest.time) or 0), "time", cfg.time, legal)


def dealt(cfg: Config) -> tuple[int, int]:
    """data.batch_size and trainer.accumulate of a rank: together a step of all has launcher.global_batch clips.

    Raises:
        UserError: the ranks cannot share them evenly.
    """
    assert cfg.launcher is not None
    clips, ranks = cfg.launcher.global_batch, cfg.launcher.nodes * cfg.launcher.ranks_per_node
    if clips is None:
        return cfg.data.batch_size, cfg.trainer.accumulate
    legal = f"must be a multiple of the {ranks} ranks (launcher.nodes x launcher.ranks_per_node)"
    _require(clips >= 1 and clips % ranks == 0, "global_batch", clips, legal)
    each = clips // ranks
    batch = max(size for size in range(1, min(each, cfg.data.batch_size) + 1) if each % size == 0)
    return batch, each // batch


def frozen_device(cfg: Config) -> str:
    """The device that a job freezes: the one of its machine, unless another is asked for. Never auto.

    `auto` in a job would train on the CPU, in silence, on a node whose driver fails or with a torch of another kind.

    Raises:
        UserError: trainer.accelerator names one that the machine has not.
    """
    assert cfg.launcher is not None
    wanted, there = cfg.trainer.accelerator, cfg.launcher.device
    if wanted == "auto" or (wanted == "gpu" and there != "cpu"):
        return there
    legal = f"launcher={cfg.launcher.name} has launcher.device={there}; leave it out and it follows"
    require(wanted in ("cpu", there) or (there == "gpu" and wanted != "cpu"), "trainer.accelerator", wanted, legal)
    return wanted


def shard_group(cfg: ParallelConfig, ranks: int, ranks_per_node: int) -> int:
    """Ranks that share a copy: hsdp of weights and optimizer, zero3 of the compute weights (hpZ); 0: no groups.

    Args:
        cfg: `parallel=`.
        ranks: Of the run.
        ranks_per_node: Of these, on a node.

    Raises:
        UserError: the groups do not divide the ranks.
    """
    if cfg.name != "hsdp" and not cfg.group:
        return 0
    group = cfg.group or min(ranks_per_node, ranks)
    legal = f"the run has {ranks} ranks; a group can be no larger"
    require(group <= ranks, "parallel.group", group, legal)
    legal = f"must divide the {ranks} ranks of the run"
    require(ranks % group == 0, "parallel.group", group, legal)
    return group


def check_ranks(cfg: Config) -> None:
    """Raise UserError where `parallel=` cannot have the ranks that the launcher starts."""
    assert cfg.launcher is not None
    nodes, ranks = cfg.launcher.nodes, cfg.launcher.ranks_per_node
    given = f"launcher.nodes={nodes} x launcher.ranks_per_node={ranks}"
    dealt(cfg)
    if cfg.parallel.name == "single":
        if nodes * ranks > 1:
            raise UserError(f"parallel=single: one rank, but {given}; choose parallel=ddp, zero1 or another")
        return
    shard_group(cfg.parallel, nodes * ranks, ranks)
    if cfg.parallel.nodes not in (1, nodes):
        raise UserError(f"parallel.nodes={cfg.parallel.nodes}: does not match {given}; leave it out and it follows")
    if cfg.parallel.devices not in (0, ranks):
        raise UserError(f"parallel.devices={cfg.parallel.devices}: does not match {given}; leave it out and it follows")

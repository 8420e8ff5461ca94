"""What a run asks of the file system that all nodes share, and what failures and saves leave of its time.

Counted are files of swift: the store, the run directory and its checkpoints. What Python opens while it imports is not;
that belongs on the nodes' own disks. A test counts the same on running ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from swift.config.derive import log_every
from swift.config.schema import Config
from swift.data.clips.ring import PREFETCH, TABLE_BYTES
from swift.data.store.reader import Store
from swift.data.store.shards import OPEN_SHARDS
from swift.data.store.stats import NEEDS
from swift.plan.devices import Site
from swift.plan.geometry import usual_brain
from swift.plan.memory import Sharding
from swift.plan.step_time import StepTime

HEARTBEAT_SECONDS = 2.0
"""Between two signs of life of a run (`swift.train.callbacks.signals`)."""
MONITOR_SECONDS = 30.0
"""Between two readings of the machine (`swift.train.callbacks.monitor`)."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: fp32 weight and two moments."""
RESUME_OPENS = 3
"""On the same number of ranks: the manifest, the file that a rank checks, the one that it takes its states from."""
LINES, VALUES = 2, 8
"""Lines of metrics.jsonl a logged point (speed; loss), and values in them: TensorBoard opens its file for each. With a
known device MFU besides."""
SAVED_LINES, SAVED_VALUES = 2, 3
"""The same at a validation and the save that follows it."""
READ_LINES, READ_VALUES, READ_DEVICE_VALUES = 1, 3, 4
"""The same of a reading of the machine, and of its device if it has one."""


@dataclass(frozen=True)
class Scans:
    """What clips are read from: means over the scans of a store, or of scans as they usually are."""

    voxels: float
    """In the brain."""
    frames: float
    """Of a scan."""
    shards: float
    """Files; infinite: unknown."""
    scans: float
    """Infinite: unknown."""

    @property
    def known(self) -> bool:
        """Whether a store was looked at."""
        return math.isfinite(self.scans)


def scans_of(cfg: Config) -> Scans:
    """The scans of data.path or data.mixture where these are stores; else as many as one likes, of a usual brain.

    Raises:
        UserError: a store that cannot be opened.
    """
    paths = [Path(path) for path in [*(cohort.path for cohort in cfg.data.mixture), cfg.data.path] if path]
    paths = paths[:-1] if cfg.data.mixture and cfg.data.path else paths
    if not paths or not all((path / "store.json").is_file() for path in paths):
        brain = float(usual_brain(tuple(cfg.data.grid)).sum())
        return Scans(brain, cfg.data.frames * cfg.data.frame_stride, math.inf, math.inf)
    stores = [Store(path) for path in paths]
    scans = [scan for store in stores for scan in store.scans]
    voxels, frames = sum(scan.voxels for scan in scans), sum(scan.frames for scan in scans)
    shards = sum(len({scan.shard for scan in store.scans}) for store in stores)
    return Scans(voxels / len(scans), frames / len(scans), shards, len(scans))


def table_bytes(cfg: Config, scans: Scans) -> float:
    """Read to make a scan's table: its mask and per-voxel vectors."""
    return math.prod(cfg.data.grid) + 4 * scans.voxels * (2 + len(NEEDS.get(cfg.data.normalization, ())))


def clip_bytes(cfg: Config, scans: Scans) -> float:
    """Read for a clip: codes, checksums of the scan's frames, and the scan's table where it could not be kept."""
    codes = 2 * scans.voxels * cfg.data.frames
    checksums = 8 * scans.frames if cfg.data.verify or cfg.data.frame_stride > 1 else 0.0
    kept = min(1.0, TABLE_BYTES // (12 * scans.voxels) / scans.scans)
    return codes + checksums + (1 - kept) * table_bytes(cfg, scans)


def first_opens(cfg: Config, scans: Scans, micro_batch: int) -> int:
    """Files that a rank opens up to its first step, at most: each clip may lie in a shard of its own.

    A shard is opened twice, by HDF5 and to read from, and by each worker.
    """
    data = cfg.data
    stores = 2 * max(1, len(data.mixture))
    asked = micro_batch * (data.workers * PREFETCH + cfg.trainer.accumulate + 1)
    shards = min(asked, max(1, data.workers) * scans.shards)
    return int(stores + (data.split is not None) + 2 * shards)


@dataclass(frozen=True)
class Demand:
    """What a run asks of the file system. None: not known without a step time, or without a rate of the file system."""

    scans: Scans
    clip: float
    """Bytes read for a clip."""
    input: float | None
    """Bytes a second of all ranks; 0 where the nodes' own disks are read (data.stage_dir)."""
    nodes: int | None
    """So many nodes at most can read at the rate of their steps."""
    opens: int
    """Of a rank, up to its first step, at most."""
    reopened: float | None
    """Shards that all ranks open again in a second, as a process keeps OPEN_SHARDS; None also for unknown shards."""
    checkpoint_files: int
    """Left in a folder; as many notes come and go while it is written."""
    checkpoint_bytes: int
    """Without headers and the manifest."""
    checkpoint_seconds: float | None
    """To write it at the file system's rate."""
    heartbeats: float | None
    """Files that rank 0 replaces in a second."""
    log_writes: float | None
    """Times a second that rank 0 adds to metrics.jsonl or to TensorBoard's file."""


def times_a_second(every: float, seconds: float) -> float:
    """How often what is due after `every` seconds is done at the first end of a batch from then on.

    Args:
        every: Seconds.
        seconds: Of a batch.
    """
    return 1 / (math.ceil(every / seconds - 1e-9) * seconds)


def steps_between_saves(cfg: Config) -> int:
    """Optimizer steps: a save follows each validation, and comes every trainer.checkpoint_every steps."""
    trainer = cfg.trainer
    return min(trainer.val_every, trainer.checkpoint_every or trainer.val_every, trainer.max_steps)


def log_writes(cfg: Config, on_cpu: bool, seconds: float) -> float:
    """Lines and values that rank 0 writes in a second.

    Args:
        cfg: Of the run.
        on_cpu: A CPU logs more often.
        seconds: Of a step.
    """
    points = (LINES + VALUES + (not on_cpu)) / log_every(cfg.trainer, on_cpu)
    saves = (SAVED_LINES + SAVED_VALUES) / steps_between_saves(cfg)
    reading = READ_LINES + READ_VALUES + (0 if on_cpu else READ_DEVICE_VALUES)
    read = reading * times_a_second(MONITOR_SECONDS, seconds / cfg.trainer.accumulate)
    return (points + saves) / seconds + read


def demand(
    cfg: Config, site: Site, nodes: int, sharding: Sharding, parameters: int, micro_batch: int, time: StepTime | None
) -> Demand:
    """What a run asks of the file system.

    Args:
        cfg: Its settings.
        site: The machine.
        nodes: Of the run.
        sharding: How it is spread.
        parameters: Of the model.
        micro_batch: Clips a device in one pass.
        time: Of a step.

    Raises:
        UserError: data.path names a store that cannot be opened.
    """
    scans = scans_of(cfg)
    clip = clip_bytes(cfg, scans)
    read = None if time is None else time.clips_per_second * clip
    if cfg.data.stage_dir or cfg.data.repeat_batch:
        read = 0.0
    reopened = None
    if time is not None and scans.known:
        reopened = 2 * time.clips_per_second * max(0.0, 1 - OPEN_SHARDS / scans.shards)
    most = int(nodes * site.filesystem / read) if read and site.filesystem else None
    size = STATE_BYTES * parameters
    return Demand(
        scans=scans,
        clip=clip,
        input=read,
        nodes=most,
        opens=first_opens(cfg, scans, micro_batch),
        reopened=reopened,
        checkpoint_files=sharding.ranks + 1,
        checkpoint_bytes=size,
        checkpoint_seconds=size / site.filesystem if site.filesystem else None,
        heartbeats=None if time is None else times_a_second(HEARTBEAT_SECONDS, time.seconds / sharding.accumulate),
        log_writes=None if time is None else log_writes(cfg, sharding.on_cpu, time.seconds),
    )


@dataclass(frozen=True)
class Goodput:
    """Part of a run's time that stays, where nodes fail at random."""

    between: float
    """Seconds between two failures of the whole run."""
    stall: float
    """Seconds that a save holds training up."""
    every: int
    """Steps between saves, as set."""
    share: float
    """Of the time, as set."""
    best_every: int
    """Steps between saves by Young's rule."""
    best_share: float


def kept_share(every: float, stall: float, between: float, restart: float) -> float:
    """Part of the time that is training that stays, with failures at random (Daly 2006, eq. 20).

    Args:
        every: Seconds of training between saves.
        stall: Seconds of a save.
        between: Mean seconds between failures, which may strike saves and restarts too.
        restart: Seconds from a failure to training again.
    """
    spent = (every + stall) / between
    return 0.0 if spent > 500 else every / between / math.expm1(spent) * math.exp(-restart / between)


def goodput(
    cfg: Config, site: Site, sharding: Sharding, parameters: int, time: StepTime | None, writing: float | None
) -> Goodput | None:
    """What failures at the site's rate leave, as set and at best; None without a step time or that rate.

    A save holds training up while states are copied to the host; with trainer.checkpoint_background=false until they
    are written. Two saves are never nearer than one takes to be written.

    Args:
        cfg, site, sharding, parameters, time: As in `demand`.
        writing: Seconds to write a checkpoint; None: unknown, taken as none.
    """
    if time is None or site.failure_hours is None:
        return None
    between = site.failure_hours * 3600 / sharding.ranks
    stall = STATE_BYTES * parameters / sharding.ranks / site.host_link
    stall += 0.0 if cfg.trainer.checkpoint_background else writing or 0.0
    every = steps_between_saves(cfg)
    least = max(math.sqrt(2 * stall * between), writing or 0.0)  # Young 1974
    best = max(1, round(least / time.seconds))

    def share(steps: int) -> float:
        return kept_share(steps * time.seconds, stall, between, site.restart)

    return Goodput(between, stall, every, share(every), best, share(best))

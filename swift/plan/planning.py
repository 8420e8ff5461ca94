"""A training run before it is started: what it holds, computes, sends and takes, and what would make it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from swift.config.check import FP32_GRADIENTS
from swift.config.schema import Config
from swift.plan.activations import CHECKPOINTING
from swift.plan.devices import GIB, Site
from swift.plan.file_system import Demand, Goodput, demand, goodput
from swift.plan.geometry import Geometry, geometry_of
from swift.plan.memory import MB, Memory, Sharding, largest_micro_batch, linear_layers, memory, sharding_of
from swift.plan.step_time import StepTime, step_time
from swift.utils.errors import UserError

# Part of a node's host memory that training may fill; the rest is the system's, the loaders' and the page cache's.
USABLE_HOST = 0.8
MOST_SUGGESTIONS = 4
LARGEST_GROUP = 1024
"""Ranks of a group of hsdp that is proposed."""
_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


@dataclass(frozen=True)
class Option:
    """A memory prediction for one way of checkpointing."""

    memory: Memory
    fits: bool
    largest: int
    """Largest micro-batch that fits."""


@dataclass(frozen=True)
class Plan:
    """Everything that `python -m swift.plan` prints."""

    cfg: Config
    site: Site
    nodes: int
    micro_batch: int
    clips: float
    geometry: Geometry
    sharding: Sharding
    options: dict[str, Option]
    """By activation checkpointing."""
    time: StepTime | None
    """Of the run as it is set; None where the device's peak is not known."""
    time_largest: StepTime | None
    """With the largest micro-batch that fits."""
    suggestions: list[str]
    files: Demand
    """Of the run as it is set, on the file system."""
    goodput: Goodput | None
    """None where a step's time or the site's failures are not known."""
    faster: str | None = None
    """hsdp: a group that fits and takes less time, and how much."""

    @property
    def chosen(self) -> Option:
        """The run as it is set."""
        return self.options[self.sharding.checkpointing]

    @property
    def global_batch(self) -> int:
        """Clips an optimizer step."""
        return self.micro_batch * self.sharding.accumulate * self.sharding.ranks


def available_bytes(site: Site) -> float:
    """What a device has for training."""
    return site.device_memory * site.usable_memory


def host_fits(site: Site, sharding: Sharding, found: Memory) -> bool:
    """Whether the ranks of a node find room on their host."""
    return found.host * min(sharding.ranks, site.devices_per_node) <= site.host_memory * USABLE_HOST


def option(geometry: Geometry, sharding: Sharding, site: Site, micro_batch: int) -> Option:
    """What one way to run would hold, and whether that fits."""
    found, available = memory(geometry, sharding, micro_batch), available_bytes(site)
    on_host = host_fits(site, sharding, found)
    largest = largest_micro_batch(geometry, sharding, available) if on_host else 0
    return Option(found, found.total <= available and on_host, largest)


def ranks_of(cfg: Config, site: Site, nodes: int) -> int:
    """Ranks of a run on some nodes of a machine.

    Raises:
        UserError: parallel=single on several nodes.
    """
    if cfg.parallel.name == "single":
        if nodes > 1:
            raise UserError(f"nodes={nodes}: parallel=single has one device; choose parallel=zero1 or another")
        return 1
    return nodes * (cfg.parallel.devices or site.devices_per_node)


def uses_bf16(cfg: Config, site: Site) -> bool:
    """Whether products run in bf16: all known devices have it, and a CPU is planned in float32 unless asked."""
    return cfg.trainer.precision == "bf16" or (cfg.trainer.precision == "auto" and site.device is not None)


def _candidates(geometry: Geometry, sharding: Sharding) -> Iterator[tuple[list[str], Sharding]]:
    """Other ways to run on the same ranks, fewest changes first, milder ones before harsher ones."""
    strategies = [sharding.strategy]
    if sharding.ranks > 1:
        strategies += [name for name in _STAGES if name != sharding.strategy and _harsher(name, sharding)]
    elif sharding.strategy != "zero3_offload":
        strategies.append("zero3_offload")
    checkpointing = CHECKPOINTING[CHECKPOINTING.index(sharding.checkpointing) :]
    # A bucket that holds the largest gradient: in ZeRO 1 larger ones stay whole on every device until the step.
    bucket = math.ceil(geometry.sizes[0] * sharding.element / MB / 50) * 50 * MB
    found = []
    for strategy, kept, large in itertools.product(strategies, checkpointing, (False, True)):
        changed, changes = sharding, []
        if strategy != sharding.strategy:
            offload = strategy == "zero3_offload"
            stage = _STAGES[strategy]
            changed = replace(
                changed,
                strategy=strategy,
                zero_stage=stage,
                offload_optimizer=offload,
                offload_parameters=offload,
                group=0,
            )
            changes.append(f"parallel={strategy}")
            if changed.fp32_gradients and strategy not in FP32_GRADIENTS:
                changed = replace(changed, fp32_gradients=False)
                changes.append("parallel.fp32_gradients=false")
        if kept != sharding.checkpointing:
            changed = replace(changed, checkpointing=kept)
            changes.append(f"parallel.activation_checkpointing={kept}")
        if large:
            if changed.zero_stage != 1 or changed.reduce_bucket >= bucket or changed.accumulate > 1:
                continue
            changed = replace(changed, reduce_bucket=bucket)
            changes.append(f"parallel.reduce_bucket_mb={bucket / MB:.0f}")
        if changes:
            found.append((changes, changed))
    yield from sorted(found, key=lambda pair: len(pair[0]))


def _harsher(name: str, sharding: Sharding) -> bool:
    order = ["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"]
    now = "zero3" if sharding.sharded else sharding.strategy
    return order.index(name) > order.index(now)


def suggest(geometry: Geometry, sharding: Sharding, site: Site, nodes: int) -> list[str]:
    """Settings that would make a run fit with micro-batch 1, fewest changes first; or how many nodes would."""
    if sharding.strategy == "hsdp" and (found := _larger_groups(geometry, sharding, site)):
        return found
    found = []
    fewest = None
    for changes, changed in _candidates(geometry, sharding):
        if fewest is not None and len(changes) > fewest:
            break
        result = option(geometry, changed, site, 1)
        if result.fits:
            fewest = len(changes)
            found.append(f"{' '.join(changes)} (micro-batch up to {result.largest})")
    if found or sharding.strategy in ("single", "ddp"):
        return found[:MOST_SUGGESTIONS]
    for factor in (2, 4, 8, 16, 32, 64, 128):
        more = replace(sharding, ranks=sharding.ranks * factor, checkpointing="block")
        if option(geometry, more, site, 1).fits:
            also = "" if sharding.checkpointing == "block" else " parallel.activation_checkpointing=block"
            return [f"nodes={nodes * factor}{also}"]
    return []


def _larger_groups(geometry: Geometry, sharding: Sharding, site: Site) -> list[str]:
    """The smallest group of hsdp that makes a run fit with micro-batch 1; by itself, else with smaller units too."""
    least = max(linear for stage in geometry.stages for block in stage.blocks for linear in linear_layers(block))
    unit = math.ceil(least * (2 if sharding.bf16 else 4) / MB)
    milder = [
        (sharding.checkpointing, sharding.unit),
        ("block", sharding.unit),
        ("block", min(sharding.unit, unit * MB)),
    ]
    for kept, limit in dict.fromkeys(milder):
        changed = replace(sharding, group=sharding.ranks, checkpointing=kept, unit=limit)
        if memory(geometry, changed, 1).total > available_bytes(site):
            continue
        group = sharding.group
        while group <= sharding.ranks:
            changed = replace(changed, group=group)
            if sharding.ranks % group == 0 and memory(geometry, changed, 1).total <= available_bytes(site):
                changes = [f"parallel.group={group}"] if group != sharding.group else []
                changes += [f"parallel.activation_checkpointing={kept}"] if kept != sharding.checkpointing else []
                changes += [f"parallel.unit_mb={unit}"] if limit != sharding.unit else []
                return [f"{' '.join(changes)} (micro-batch up to {option(geometry, changed, site, 1).largest})"]
            group *= 2
    return []


def faster_group(geometry: Geometry, sharding: Sharding, site: Site, micro_batch: int) -> tuple[int, StepTime] | None:
    """The group of hsdp with which a step takes the least time, if it fits and saves 5 % or more.

    Smaller groups send less inside and as much between them in all; a rank keeps more.
    """
    now = step_time(geometry, sharding, site, micro_batch)
    if sharding.strategy != "hsdp" or now is None:
        return None
    found: tuple[int, StepTime] | None = None
    least = 0.95 * now.seconds
    for group in (size for size in range(1, sharding.ranks + 1) if sharding.ranks % size == 0):
        changed = replace(sharding, group=group)
        if group > LARGEST_GROUP or memory(geometry, changed, micro_batch).total > available_bytes(site):
            continue
        time = step_time(geometry, changed, site, micro_batch)
        if time is not None and time.seconds < least:
            found, least = (group, time), time.seconds
    return found


def make_plan(cfg: Config, site: Site, nodes: int, micro_batch: int, clips: float) -> Plan:
    """Plan a run.

    Args:
        cfg: Its settings.
        site: The machine.
        nodes: How many of its nodes.
        micro_batch: Clips a device in one forward and backward pass.
        clips: Clips that the node-hours are for.

    Raises:
        UserError: the model does not fit the clip, or there are more ranks than parameters to share out.
    """
    geometry = geometry_of(cfg)
    ranks, bf16 = ranks_of(cfg, site, nodes), uses_bf16(cfg, site)
    if cfg.parallel.name not in ("single", "ddp") and ranks > geometry.total_parameters:
        raise UserError(
            f"nodes={nodes}: {ranks:,} ranks are more than the {geometry.total_parameters:,} parameters of "
            f"model={cfg.model.name} that parallel={cfg.parallel.name} would share out among them"
        )
    sharding = replace(sharding_of(cfg, geometry, ranks, bf16, ranks // nodes), on_cpu=site.device_name == "CPU")
    options = {
        kept: option(geometry, replace(sharding, checkpointing=kept), site, micro_batch) for kept in CHECKPOINTING
    }
    chosen = options[sharding.checkpointing]
    better = faster_group(geometry, sharding, site, micro_batch) if chosen.fits else None
    faster = None
    if better is not None:
        faster = f"parallel.group={better[0]} ({better[1].seconds:.3f} s, {better[1].clips_per_second:,.1f} clips/s)"
    time = step_time(geometry, sharding, site, micro_batch)
    files = demand(cfg, site, nodes, sharding, geometry.total_parameters, micro_batch, time)
    return Plan(
        cfg=cfg,
        site=site,
        nodes=nodes,
        micro_batch=micro_batch,
        clips=clips,
        geometry=geometry,
        sharding=sharding,
        options=options,
        time=time,
        time_largest=step_time(geometry, sharding, site, chosen.largest) if chosen.largest else None,
        suggestions=[] if chosen.fits else suggest(geometry, sharding, site, nodes),
        files=files,
        goodput=goodput(cfg, site, sharding, geometry.total_parameters, time, files.checkpoint_seconds),
        faster=faster,
    )


def why_not(plan: Plan) -> str:
    """What does not fit, in one sentence."""
    found, available = plan.chosen.memory, available_bytes(plan.site)
    if not host_fits(plan.site, plan.sharding, found):
        need = found.host * min(plan.sharding.ranks, plan.site.devices_per_node)
        return (
            f"offload keeps {need / GIB:,.0f} GiB on the host of each node, of which "
            f"{plan.site.host_memory * USABLE_HOST / GIB:,.0f} GiB can be had"
        )
    kind, most = max(found.kinds().items(), key=lambda pair: pair[1])
    return (
        f"micro-batch {plan.micro_batch} needs {found.total / GIB:,.1f} GiB of {available / GIB:,.1f} GiB on a device "
        f"({found.moment}; most of it {kind}, {most / GIB:,.1f} GiB)"
    )

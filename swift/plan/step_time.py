"""How long a training step will take: arithmetic, memory traffic, communication, and what of it does not overlap.

A model of four assumptions, all of them values of a site file: the part of the peak that matrix products reach, the
part of the memory bandwidth that elementwise operations reach, the part of a link that collectives reach, and what a
doubling of ranks adds to the latency of a collective. Rings carry all collectives: each rank sends (N - 1) / N of the
volume, and between nodes all network cards of a node together carry one ring's traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swift.plan.activations import Widths, predicted_voxels
from swift.plan.devices import Site
from swift.plan.flops import block_flops, model_flops
from swift.plan.geometry import Geometry
from swift.plan.memory import LIVE_PARAMETERS, Sharding

# Of an AdamW step: fp32 weight, gradient and two moments read, weight and moments written.
OPTIMIZER_TRAFFIC = 28
# A CPU steps from memory, not from its caches: host bandwidth of a node, shared by its ranks.
HOST_BANDWIDTH = 150e9


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, by what they are."""

    gradients: float
    """Reduced; overlaps the backward pass where parallel.overlap says so."""
    weights: float
    """Gathered: after the step in ZeRO 1 and 2 (nothing overlaps that), during the passes in ZeRO 3, fsdp and hsdp."""
    host: float
    """Between device and host, offload only."""
    collectives: int
    """How many collectives these are, those across groups left out."""
    across: float = 0.0
    """hsdp: gradients, summed inside the groups, between them."""
    across_collectives: int = 0
    inside: float = 0.0
    """zero3 with groups (hpZ): the part of `weights` that is gathered from a group."""

    @property
    def network(self) -> float:
        """Bytes over links between devices."""
        return self.gradients + self.weights + self.across


def traffic(geometry: Geometry, sharding: Sharding) -> Traffic:
    """Communication of one optimizer step of one rank."""
    ranks, total = sharding.ranks, geometry.total_parameters
    if ranks == 1 and not sharding.offload_optimizer:
        return Traffic(0.0, 0.0, 0.0, 0)
    # hsdp: weights are gathered and gradients reduced inside a group, whatever the number of groups.
    inside = sharding.group if sharding.strategy == "hsdp" else ranks
    ring, element = (inside - 1) / inside, sharding.element
    micro = sharding.accumulate
    in_bucket = sharding.summed if sharding.zero_stage == 3 else element
    buckets = math.ceil(total * in_bucket / sharding.reduce_bucket)
    blocks = sum(len(stage.blocks) for stage in geometry.stages)
    if sharding.strategy == "ddp":
        # Lightning leaves out the reduction on all micro-batches but the last.
        return Traffic(2 * ring * 4 * total, 0.0, 0.0, buckets)
    if sharding.zero_stage in (1, 2):
        times = micro if sharding.zero_stage == 2 else 1
        gathers = math.ceil(total * element / sharding.gather_bucket)
        # One all-reduce a bucket where float32 is asked for, else what is counted for ZeRO: a reduction to the owner.
        sent = times * ring * sharding.summed * total * (2 if sharding.wide else 1)
        return Traffic(sent, ring * element * total, 0.0, times * buckets + gathers)
    host = 0.0
    if sharding.offload_optimizer:
        # Gradients go down in their own type, weights come up again as often as they are gathered.
        host = micro * total * element / ranks * (3 if sharding.offload_parameters else 1) + total * element / ranks
    width = element if sharding.zero_stage == 3 else (2 if sharding.bf16 else 4)
    reduced = sharding.summed if sharding.zero_stage == 3 else 4
    # Gathered for the forward and again for the backward pass, except what stays gathered in between.
    kept = min(total, LIVE_PARAMETERS) if sharding.zero_stage == 3 else 0
    gathered = micro * ring * width * (2 * total - kept)
    within = 0.0
    if sharding.zero_stage == 3 and sharding.group:
        # The first forward pass of a step gathers from all ranks and leaves the second copy, from which the rest comes.
        first = ring * width * total
        within = (sharding.group - 1) / sharding.group * width * (micro * (2 * total - kept) - total)
        gathered = first + within
    count = micro * (3 * blocks if sharding.sharded else 2 * blocks + buckets)
    groups = ranks // inside
    across = micro * 2 * (groups - 1) / groups * reduced * total / inside
    between = micro * blocks * (groups > 1)
    return Traffic(micro * ring * reduced * total, gathered, host, count, across, between, within)


def elementwise_bytes(geometry: Geometry, widths: Widths) -> float:
    """Memory traffic of one clip's forward pass outside matrix products.

    With the attention kernel a branch reads or writes its stream 9 times (norm 2, kernel 4, residual 3), else about 14
    times (reorder and back, rotation); an MLP 5 times, and its hidden layer twice.
    """
    total = 0.0
    for stage in geometry.stages:
        for block in stage.blocks:
            for branch in block.branches:
                elements = branch.tokens * branch.width
                if branch.is_attention:
                    times = 9 if widths.kernel and branch.fits_kernel else 14 if branch.rotary else 10
                    total += elements * times * widths.stream
                else:
                    total += elements * 5 * widths.stream + 2 * branch.tokens * branch.hidden * widths.product
        total += 4 * stage.merged_rows * 8 * stage.width * widths.stream
    # Cutting into patches and back, the mask, and the loss.
    return total + 24 * predicted_voxels(geometry) * 4


def recomputed_flops(geometry: Geometry, checkpointing: str) -> float:
    """FLOPs of one clip that activation checkpointing runs a second time."""
    if checkpointing != "block":
        return 0.0
    return sum(block_flops(block).forward for stage in geometry.stages for block in stage.blocks)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what follows from them. `mfu` is None where the device's peak is not known."""

    compute: float
    """Arithmetic and memory traffic of all micro-batches."""
    communication: float
    """All communication, overlapped or not."""
    exposed: float
    """The part of it that the device waits for."""
    optimizer: float
    clips: int
    """Of all ranks."""
    mfu: float
    hfu: float
    """With recomputation counted as work."""
    across: float = 0.0
    """The part of the communication that is between groups (hsdp)."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.exposed + self.optimizer

    @property
    def clips_per_second(self) -> float:
        """Of all ranks."""
        return self.clips / self.seconds

    def node_hours(self, clips: float, nodes: int) -> float:
        """For a number of clips."""
        return clips / self.clips_per_second * nodes / 3600


def link_seconds(sent: float, site: Site, ranks: int, collectives: int) -> float:
    """Time of collectives in which each rank sends `sent` bytes along a ring."""
    if ranks == 1:
        return 0.0
    rate = site.link if ranks <= site.devices_per_node else min(site.link, site.node_link)
    return sent / (rate * site.link_fraction) + collectives * site.latency * math.log2(ranks)


def across_seconds(sent: Traffic, sharding: Sharding, site: Site) -> float:
    """Time of the all-reduces between groups of hsdp, of which all ranks of a group have one under way at a time.

    Those of a node share its network cards; where a node has several groups, rings go over the links inside it too.
    """
    groups = sharding.ranks // max(sharding.group, 1)
    if groups == 1 or not sent.across:
        return 0.0
    rate = site.link if sharding.group < site.devices_per_node else math.inf
    if sharding.ranks > site.devices_per_node:
        rate = min(rate, site.node_link / min(sharding.group, site.devices_per_node))
    return sent.across / (rate * site.link_fraction) + sent.across_collectives * site.latency * math.log2(groups)


def exposed_units(
    forward: float, backward: float, gathered: float, reduced: float, across: float, shared: bool
) -> float:
    """What a device waits for where weights are gathered unit by unit (ZeRO 3, fsdp, hsdp).

    The forward pass hides its half of the gathers, the backward pass the other half and all gradients. What goes
    between groups has its own stream and, where a group lies in a node, its own links: it runs beside what goes inside.

    Args:
        forward: Seconds of arithmetic.
        backward: Seconds of arithmetic.
        gathered: Seconds of weights for both passes, and of what goes to the host.
        reduced: Seconds of gradients inside a group.
        across: Seconds of gradients between groups.
        shared: A group reaches over several nodes: both use the same network cards.
    """
    inside = gathered / 2 + reduced
    sent = inside + across if shared else max(inside, across)
    return max(0.0, gathered / 2 - forward) + max(0.0, sent - backward)


def step_time(geometry: Geometry, sharding: Sharding, site: Site, micro_batch: int) -> StepTime | None:
    """Predicted time of one optimizer step, or None where the device's peak is not known.

    Args:
        geometry: The model and its clip.
        sharding: How it is spread.
        site: The machine.
        micro_batch: Clips a device in one forward and backward pass.
    """
    if site.device is None:
        return None
    peak = site.device.peak("bf16" if sharding.bf16 else "32")
    flops, again = model_flops(geometry), recomputed_flops(geometry, sharding.checkpointing)
    clips = micro_batch * sharding.accumulate
    moved = elementwise_bytes(geometry, sharding.widths)
    passes = 3 + (1 if again else 0)
    rate, bandwidth = peak * site.matmul_fraction, site.device.bandwidth * site.bandwidth_fraction
    compute = clips * ((flops.total + again) / rate + passes * moved / bandwidth)
    # Two thirds of the arithmetic and more belong to the backward pass.
    backward_all = compute * (flops.backward + again) / (flops.total + again)
    backward = backward_all / sharding.accumulate
    sent = traffic(geometry, sharding)
    reduce_count = max(sent.collectives, 1)
    inside = sharding.group if sharding.strategy == "hsdp" else sharding.ranks
    gradients = link_seconds(sent.gradients, site, inside, reduce_count)
    weights = link_seconds(sent.weights - sent.inside, site, inside, 0)
    weights += link_seconds(sent.inside, site, max(sharding.group, 1), 0)
    across = across_seconds(sent, sharding, site)
    host = sent.host / (site.host_link * site.link_fraction)
    if sharding.zero_stage == 3 or sharding.sharded:
        shared = inside > site.devices_per_node
        exposed = exposed_units(compute - backward_all, backward_all, weights + host, gradients, across, shared)
    else:
        hidden = backward * (sharding.accumulate if sharding.zero_stage == 2 else 1) if sharding.overlap else 0.0
        exposed = max(0.0, gradients - hidden) + weights
    share = geometry.total_parameters / (sharding.ranks if sharding.zero_stage else sharding.holders)
    optimizer = share * OPTIMIZER_TRAFFIC / bandwidth
    if sharding.offload_optimizer:
        optimizer = share * OPTIMIZER_TRAFFIC * min(sharding.ranks, site.devices_per_node) / HOST_BANDWIDTH
    seconds = compute + exposed + optimizer
    useful = clips * flops.total / seconds / peak
    return StepTime(
        compute,
        gradients + weights + across + host,
        exposed,
        optimizer,
        clips * sharding.ranks,
        useful,
        useful * (flops.total + again) / flops.total,
        across,
    )

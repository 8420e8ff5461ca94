"""Bytes on one device, by kind, under every `parallel=`: known before a node-hour is spent.

P parameters, N ranks, e bytes of a gradient element (4 in fp32, 2 in bf16). What DeepSpeed 0.19 and torch really hold
was watched on running engines (every storage of every tensor, at its peak); tests/parallel holds the measurements.

| parallel= | weights | optimizer (fp32 weights, two moments) | gradients | buffers |
|---|---|---|---|---|
| single | 4P | 8P | 4P | - |
| ddp | 4P | 8P | 4P | reduction buckets 4P |
| zero1 | eP | 12P/N | eP/N; eP if accumulated | two reduction buckets |
| zero2 | eP | 12P/N | eP/N; twice if accumulated | two reduction buckets |
| zero3 | eP/N; with groups eP/G more | 12P/N | eP/N | gathered weights, two reduction buckets, one of gathering |
| zero3_offload | host | host | host | as zero3 |
| fsdp | 4P/N | 8P/N | 4P/N | gathered weights of two blocks, their gradients |
| hsdp | 4P/G | 8P/G | 4P/G | as fsdp; G ranks of a group |

With parallel.fp32_gradients the gradients of zero2 and zero3 are 4P/N, and zero2 has a float32 copy of a bucket.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, fields

from swift.config.launcher import shard_group
from swift.config.schema import Config
from swift.plan.activations import Moment, Widths, moments
from swift.plan.geometry import Block, Geometry

MB = 1_000_000
BUCKET = 100 * MB
"""Of gradients, where the settings leave it open."""
# DeepSpeed's defaults: gathered weights kept for reuse, and parameters too small to shard.
LIVE_PARAMETERS = 1_000_000_000
PERSISTENT_PARAMETER = 100_000
HELD_BYTES = 2 << 30
"""Batches of an optimizer step that the guard holds on the device until it is judged; others are read again."""


@dataclass(frozen=True)
class Sharding:
    """What of the settings decides about memory and traffic."""

    strategy: str
    ranks: int
    bf16: bool
    checkpointing: str
    accumulate: int
    reduce_bucket: float
    """Bytes."""
    gather_bucket: float
    """Bytes."""
    overlap: bool
    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    loss: str
    guarded: bool = False
    """The guard holds the batches of a step until it is judged."""
    group: int = 0
    """hsdp: ranks that share all; zero3: ranks that share a second copy of the weights (hpZ), 0: there is none."""
    unit: float = math.inf
    """fsdp, hsdp: bytes of gathered weights above which a block is gathered layer by layer."""
    fp32_gradients: bool = False
    """ZeRO 2 and 3: gradients of bf16 weights are summed in float32."""
    on_cpu: bool = False
    """ZeRO's step on a CPU was seen to take two temporaries of what is updated; on others one is counted."""

    @property
    def sharded(self) -> bool:
        """Whether fully_shard spreads the weights."""
        return self.strategy in ("fsdp", "hsdp")

    @property
    def holders(self) -> int:
        """Without DeepSpeed: ranks over which weights, gradients and optimizer are spread."""
        return {"fsdp": self.ranks, "hsdp": self.group}.get(self.strategy, 1)

    @property
    def widths(self) -> Widths:
        """Bytes of activations. DeepSpeed and fully_shard hold bf16 weights; the others compute in autocast."""
        if not self.bf16:
            return Widths("fp32", not self.on_cpu)
        return Widths("bf16" if self.zero_stage or self.sharded else "autocast", not self.on_cpu)

    @property
    def element(self) -> int:
        """Bytes of a gradient element as the backward pass makes it."""
        return 2 if self.bf16 and self.zero_stage else 4

    @property
    def wide(self) -> bool:
        """Whether gradients are summed in a wider type than they are made in."""
        return self.fp32_gradients and self.element == 2 and self.zero_stage in (2, 3)

    @property
    def summed(self) -> int:
        """Bytes of an element of a gradient that is summed over ranks and micro-batches."""
        return 4 if self.wide else self.element


def reduce_bucket(cfg: Config, largest: int, bf16: bool) -> float:
    """Bytes of a bucket in which gradients are reduced.

    Args:
        cfg: Of the run.
        largest: Elements of the largest parameter.
        bf16: Whether products run in bf16.
    """
    parallel = cfg.parallel
    if parallel.reduce_bucket_mb is not None:
        return parallel.reduce_bucket_mb * MB
    # Accumulated gradients are whole on every device anyway.
    holds_largest = parallel.zero_stage == 1 and cfg.trainer.accumulate == 1
    return max(BUCKET, largest * (2 if bf16 else 4) if holds_largest else 0)


def sharding_of(cfg: Config, geometry: Geometry, ranks: int, bf16: bool, ranks_per_node: int) -> Sharding:
    """The part of a run's settings that `memory` needs.

    Raises:
        UserError: groups of hsdp that the ranks cannot have.
    """
    parallel = cfg.parallel
    return Sharding(
        strategy=parallel.name,
        ranks=ranks,
        bf16=bf16,
        checkpointing=parallel.activation_checkpointing,
        accumulate=cfg.trainer.accumulate,
        reduce_bucket=reduce_bucket(cfg, geometry.sizes[0], bf16),
        gather_bucket=parallel.gather_bucket_mb * MB,
        overlap=parallel.overlap,
        zero_stage=parallel.zero_stage,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        loss=cfg.task.loss,
        guarded=cfg.guard.action != "off",
        fp32_gradients=parallel.fp32_gradients,
        unit=math.inf if parallel.unit_mb is None else parallel.unit_mb * MB,
        group=shard_group(parallel, ranks, ranks_per_node),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a step, and what its rank keeps on the host."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    buffers: float
    moment: str
    """When the peak is."""
    host: float

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.buffers

    def kinds(self) -> dict[str, float]:
        """Bytes by kind, the host left out."""
        kept = ("moment", "host")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in kept}


def small_parameters(geometry: Geometry) -> int:
    """Parameters in tensors too small for ZeRO 3 to shard."""
    return sum(size for size in geometry.sizes if size < PERSISTENT_PARAMETER)


def largest_block(geometry: Geometry) -> int:
    """Parameters of the largest block."""
    return max(block.parameters for stage in geometry.stages for block in stage.blocks)


def outside_blocks(geometry: Geometry) -> int:
    """Parameters that belong to no block: embedding, merging, norms, decoder."""
    return geometry.total_parameters - sum(block.parameters for stage in geometry.stages for block in stage.blocks)


def mergings(geometry: Geometry) -> list[int]:
    """Parameters of the linear layer of each patch merging, from 8C to 2C without bias."""
    return [16 * stage.width**2 for stage in geometry.stages if stage.merging_parameters]


def linear_layers(block: Block) -> list[int]:
    """Parameters of the linear layers of a block: qkv and projection of attention, the two of an MLP."""
    found = []
    for branch in block.branches:
        width, hidden = branch.width, branch.hidden
        if branch.is_attention:
            found += [3 * width * (width + 1), width * (width + 1)]
        else:
            found += [hidden * (width + 1), width * (hidden + 1)]
    return found


def unit_size(block: Block, limit: float) -> int:
    """Parameters of a block that are gathered at once, see `gathered_unit`."""
    layers = linear_layers(block)
    return block.parameters if block.parameters <= limit else max(layers) + block.parameters - sum(layers)


def gathered_unit(geometry: Geometry, limit: float) -> int:
    """Parameters of the largest unit that fully_shard gathers at once, beside what belongs to no unit.

    A block over the limit is gathered layer by layer, and what is left of it (norms, scales) as long as it runs.

    Args:
        geometry: The model.
        limit: Parameters of a block above which its layers are gathered one by one.
    """
    units = [size for size in mergings(geometry) if size > limit]
    return max(units + [unit_size(block, limit) for stage in geometry.stages for block in stage.blocks])


def gathers(sharding: Sharding) -> bool:
    """ZeRO 3: whether weights are gathered; one rank without offload computes with its shard, which is all of them."""
    return sharding.ranks > 1 or sharding.offload_parameters


def weight_bytes(geometry: Geometry, sharding: Sharding) -> float:
    """Weights on the device; with ZeRO 3 the shard and what is too small to be sharded."""
    total = geometry.total_parameters
    if sharding.zero_stage in (1, 2):
        return total * sharding.element
    if sharding.zero_stage == 3:
        shard = 0.0 if sharding.offload_parameters else total * sharding.element / sharding.ranks
        return shard + small_parameters(geometry) * sharding.element * gathers(sharding)
    return 4 * total / sharding.holders


def live_parameters(geometry: Geometry) -> int:
    """Parameters that ZeRO 3 keeps gathered between the forward and the backward pass."""
    return min(geometry.total_parameters, LIVE_PARAMETERS + largest_block(geometry))


def secondary_bytes(geometry: Geometry, sharding: Sharding, gathered: int = 0) -> float:
    """ZeRO 3 with groups (hpZ): the part of the second copy, until the end of the step.

    DeepSpeed makes it of a parameter, also of one too small to be sharded, when it lets the gathered one go.

    Args:
        geometry: The model.
        sharding: How it is spread.
        gathered: Parameters that are still whole.
    """
    if sharding.zero_stage < 3 or not sharding.group:
        return 0.0
    return (geometry.total_parameters - gathered) * sharding.element / sharding.group


def optimizer_bytes(geometry: Geometry, sharding: Sharding) -> float:
    """Two moments, and with ZeRO the fp32 weights that the optimizer steps on."""
    total = geometry.total_parameters
    if sharding.offload_optimizer:
        return 0.0
    if sharding.zero_stage:
        return 12 * total / sharding.ranks
    return 8 * total / sharding.holders


def unit_buffers(geometry: Geometry, sharding: Sharding, moment: str) -> float:
    """What fully_shard gathers and reduces while a block runs backward, as seen on running ranks.

    The next block is gathered, and what belongs to no unit; the block's gradients are whole, in the type of its
    weights, and copied in float32 to be sent (its own weights are let go before that, and are no larger); the copy of
    the block before lies there until then.

    Args:
        geometry: The model.
        sharding: fsdp or hsdp.
        moment: Name of a moment of the backward pass.
    """
    width = 2 if sharding.bf16 else 4
    limit = sharding.unit / width
    # A merging over the limit is a unit of its own.
    rest = outside_blocks(geometry) - sum(size for size in mergings(geometry) if size > limit)
    names = [f"stage {i}, block {j}" for i, s in enumerate(geometry.stages, 1) for j in range(1, len(s.blocks) + 1)]
    blocks = [block for stage in geometry.stages for block in stage.blocks]
    sizes = [unit_size(block, limit) for block in blocks]
    if moment not in names:
        # Beside a block: one unit gathered, the gradients of one on their way, and those of what belongs to no unit. A
        # merging may be the largest unit.
        return gathered_unit(geometry, limit) * (width + 4) + rest * (2 * width + 4)
    at = names.index(moment)
    split = sizes[at] < blocks[at].parameters
    following = sizes[at - 1] if at and not split else sizes[at] * split
    before = sizes[at + 1] if at + 1 < len(sizes) and not split else sizes[at] * split
    return (following + rest) * width + sizes[at] * (width + 4) + 4 * before


def buffer_bytes(geometry: Geometry, sharding: Sharding, moment: str = "") -> float:
    """Buckets, gathered weights and the largest gradient on its way into a bucket.

    Args:
        geometry: The model.
        sharding: How it is spread.
        moment: Of the backward pass, which decides under fsdp and hsdp.
    """
    total, largest, element = geometry.total_parameters, geometry.sizes[0], sharding.element
    if sharding.strategy == "single":
        return 0.0
    if sharding.strategy == "ddp":
        return 4.0 * total
    if sharding.sharded:
        return unit_buffers(geometry, sharding, moment)
    if sharding.zero_stage < 3:
        # Summed in float32, a bucket of bf16 is copied, and so is a gradient that no bucket holds.
        filled = min(sharding.reduce_bucket / element, total)
        sent = 4 * max(filled, largest * (largest > filled)) if sharding.wide else 0
        return (2 if sharding.overlap else 1) * sharding.reduce_bucket + largest * element + sent
    if not gathers(sharding):
        return 2 * sharding.reduce_bucket + largest * element
    live = live_parameters(geometry)
    # Parameters are gathered in one flat tensor and copied out of it; gradients are copied into the bucket, and from
    # there, put in order for the ranks, into another of its size. A model that stays gathered is so before its backward
    # pass begins, else both happen at once.
    gathering, reducing = min(sharding.gather_bucket, total * element), sharding.reduce_bucket
    extra = max(gathering, reducing) if live == total else gathering + reducing
    # What is too small to be sharded is among the weights already.
    return sharding.reduce_bucket + largest * element + extra + (live - small_parameters(geometry)) * element


def gradient_bytes(geometry: Geometry, sharding: Sharding, made: int) -> float:
    """Gradients when those of `made` parameters exist in this micro-batch."""
    total, element, ranks = geometry.total_parameters, sharding.element, sharding.ranks
    accumulated = sharding.accumulate > 1
    if sharding.zero_stage == 3:
        return 0.0 if sharding.offload_optimizer else total * sharding.summed / ranks
    if sharding.zero_stage == 2:
        # In float32 a micro-batch is added to the sum where it is.
        return total * sharding.summed / ranks * (2 if accumulated and not sharding.wide else 1)
    if sharding.zero_stage == 1:
        # A gradient in a bucket lives there; one larger than a bucket stays where it is until the pass ends.
        large = sum(size for size in geometry.sizes if size > sharding.reduce_bucket / element)
        if accumulated:
            return (total + large / ranks) * element
        if not sharding.overlap:
            return (made + total / ranks) * element
        return (min(made, large) * (1 - 1 / ranks) + total / ranks) * element
    if sharding.sharded:
        return 4 * (total if accumulated else made) / sharding.holders
    return 4.0 * (total if accumulated else made)


def host_bytes(geometry: Geometry, sharding: Sharding, trained: int | None = None) -> float:
    """What offload moves to the host for one rank: fp32 weights, moments and gradients, and their bf16 originals.

    Args:
        geometry: The model.
        sharding: How it is spread.
        trained: Parameters with gradients and moments; None: all.
    """
    total, ranks, element = geometry.total_parameters, sharding.ranks, sharding.element
    moved = (16 + element) * (total if trained is None else trained) / ranks if sharding.offload_optimizer else 0.0
    return moved + (total * element / ranks if sharding.offload_parameters else 0.0)


def step_memory(geometry: Geometry, sharding: Sharding) -> Memory:
    """The optimizer step: no activations, but temporaries as large as what is updated, in ZeRO fp32 gradients."""
    total, share = geometry.total_parameters, sharding.ranks
    gradients = temporary = 0.0
    if sharding.zero_stage:
        updated = total / share
        if sharding.zero_stage == 3:
            updated = min(updated, LIVE_PARAMETERS)
            gradients += gradient_bytes(geometry, sharding, total)
            temporary += sharding.reduce_bucket
        if not sharding.offload_optimizer:
            # The gradients of the shard in fp32 are a copy even where they were fp32; ZeRO 1 and 2 free those.
            gradients += 4 * updated
            temporary += 4 * updated * (2 if sharding.on_cpu else 1)
    else:
        gradients = 4 * total / sharding.holders
        # A fused step takes no temporaries; the gradients of ddp lie beside its reduction buckets.
        temporary = 4 * total if sharding.strategy == "ddp" else 0
    weights = weight_bytes(geometry, sharding) + secondary_bytes(geometry, sharding)
    optimizer = optimizer_bytes(geometry, sharding)
    host = host_bytes(geometry, sharding)
    return Memory(weights, optimizer, gradients, 0.0, temporary, "optimizer step", host)


def batch_bytes(geometry: Geometry) -> int:
    """One clip in fp32, and the next ones packed (a brain fills about a quarter of the box, two bytes a voxel)."""
    return geometry.voxels * 4 + 2 * geometry.voxels // 2


def held_bytes(geometry: Geometry, sharding: Sharding, micro_batch: int) -> int:
    """Earlier micro-batches of the step and all of the step before, in fp32, which the guard holds.

    DeepSpeed's steps are judged at their end: nothing is held of the step before.
    """
    if not sharding.guarded:
        return 0
    one = micro_batch * geometry.voxels * 4
    most = max(HELD_BYTES, one)
    before = 0 if sharding.strategy.startswith("zero") else min(sharding.accumulate * one, most)
    return min((sharding.accumulate - 1) * one, most) + before


def backward_moments(geometry: Geometry, sharding: Sharding) -> list[Moment]:
    """See `swift.plan.activations.moments`."""
    return moments(geometry, sharding.widths, sharding.checkpointing, sharding.loss)


def backward_memory(geometry: Geometry, sharding: Sharding, moment: Moment, micro_batch: int) -> Memory:
    """One moment of the backward pass."""
    casts = 2 * moment.casts if sharding.widths.name == "autocast" else 0
    return Memory(
        weight_bytes(geometry, sharding) + secondary_bytes(geometry, sharding, live_parameters(geometry)),
        optimizer_bytes(geometry, sharding),
        gradient_bytes(geometry, sharding, moment.gradients),
        micro_batch * (moment.activations + batch_bytes(geometry)) + held_bytes(geometry, sharding, micro_batch),
        buffer_bytes(geometry, sharding, moment.name) + casts,
        f"backward pass of {moment.name}",
        host_bytes(geometry, sharding),
    )


def memory(geometry: Geometry, sharding: Sharding, micro_batch: int) -> Memory:
    """The peak of a training step.

    Args:
        geometry: The model and its clip.
        sharding: How it is spread.
        micro_batch: Clips a device in one forward and backward pass.
    """
    found = [
        backward_memory(geometry, sharding, moment, micro_batch) for moment in backward_moments(geometry, sharding)
    ]
    return max([*found, step_memory(geometry, sharding)], key=lambda one: one.total)


def largest_micro_batch(geometry: Geometry, sharding: Sharding, available: float) -> int:
    """Most clips a device that fit into `available` bytes; 0 if none does."""
    if step_memory(geometry, sharding).total > available:
        return 0
    moments, most = backward_moments(geometry, sharding), math.inf

    def fits(micro_batch: int) -> bool:
        return all(backward_memory(geometry, sharding, one, micro_batch).total <= available for one in moments)

    for moment in moments:
        free = available - backward_memory(geometry, sharding, moment, 0).total
        most = min(most, free // (moment.activations + batch_bytes(geometry)))
    if most < 1 or fits(int(most)):
        return int(max(most, 0))
    # Held batches grow with the micro-batch too, up to a limit.
    return bisect.bisect_left(range(1, int(most)), True, key=lambda micro_batch: not fits(micro_batch))

"""`python -m tests.plan.engine_memory STAGE RANKS BF16 ACCUMULATE WIDE`: bytes that a real ZeRO engine holds on a CPU.

Measured are all storages of all tensors of rank 0: after a step, and at the peaks of the backward pass and of the step;
and how much its resident memory has grown. Printed beside the prediction as one line of JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from torch import nn

from swift.parallel.strategies import _Fsdp
from swift.plan.geometry import build_geometry
from swift.plan.memory import (
    MB,
    Sharding,
    buffer_bytes,
    gradient_bytes,
    live_parameters,
    memory,
    optimizer_bytes,
    secondary_bytes,
    step_memory,
    weight_bytes,
)
from tests.models.cases import Shape, config
from tests.plan.measure import Live, Storages, on_meta

# Wide and few tokens: activations are nothing beside 23M parameters, and so are about 15 MB that a process
# takes besides its tensors.
SHAPE = Shape((4, 4, 4), 2, (2, 2, 2, 1), (2, 2, 2, 2), (2, 2), 576, (2, 4))
VOLUME = (4, 4, 4, 2)
BUCKET_BYTES = 6_000_000


def engine_config(stage: int, bf16: bool, accumulate: int, group: int = 0, wide: bool = False) -> dict[str, Any]:
    """As `swift.parallel.strategies.deepspeed_config` sets it."""
    elements = BUCKET_BYTES // (2 if bf16 else 4)
    in_fp32 = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}} if wide else {}
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": not (wide and stage == 2),
        "reduce_bucket_size": elements // (2 if wide and stage == 3 else 1),
    }
    if group:
        zero["zero_hpz_partition_size"] = group
    zero["stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size"] = elements
    return {
        **in_fp32,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **({"bf16": {"enabled": True}} if bf16 else {}),
    }


class Weight(nn.Module):
    """One parameter in a module of its own, as ZeRO 3 gathers module by module."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, 1e-3))

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        """Adds its norm."""
        return total + (self.weight.flatten() @ self.weight.flatten()).sqrt()


class Chain(nn.Module):
    """The parameters of a model one after the other, without its activations."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Weight(shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scalar."""
        total = x.sum()
        for part in self.parts:
            total = part(total)
        return total


def resident() -> int:
    """Bytes of this process in memory, with what its allocator could give back given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def train(
    shapes: list[torch.Size],
    stage: int,
    bf16: bool,
    accumulate: int,
    live: Live,
    group: int = 0,
    wide: bool = False,
) -> tuple[Any, dict[str, int]]:
    """Two steps of an engine; it, and the peaks of the second step."""
    import deepspeed
    from deepspeed.utils import groups

    settings = engine_config(stage, bf16, accumulate, group, wide)
    if stage == 3:
        # Groups of ranks are made once in a process.
        secondary = groups._get_zero_param_intra_parallel_group()
        with deepspeed.zero.Init(config_dict_or_path=settings, zero_param_parallel_group=secondary):
            model = Chain(shapes)
    else:
        model = Chain(shapes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    x = torch.ones(1, dtype=torch.bfloat16 if bf16 else torch.float32)
    for _ in range(2):
        live.peak = backward = 0
        for _ in range(accumulate):
            engine.backward(engine(x).float())
            backward = max(backward, live.peak)
            live.peak = 0
            engine.step()
    return engine, {"backward_peak": backward, "step_peak": live.peak}


def measure(stage: int, bf16: bool, accumulate: int, wide: bool = False, group: int = 0) -> dict[str, int]:
    """What this rank holds; for `tests.distributed.ranks.run`."""
    import deepspeed

    # Every tensor of 64 KiB or more gets pages of its own (M_MMAP_THRESHOLD), which it gives back: else holes count.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    deepspeed.utils.logging.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # never called here, and compiled for half a minute
    deepspeed.init_distributed("gloo")
    shapes = [parameter.shape for parameter in on_meta(config("factorized", SHAPE), VOLUME).parameters()]
    # Code, groups of ranks and their buffers come with the first engine, however small.
    small, _ = train(shapes[-4:], stage, bf16, accumulate, Live(), group, wide)
    before = resident()
    with Live() as live:
        engine, peaks = train(shapes, stage, bf16, accumulate, live, group, wide)
        found = {"states": live.now, **peaks}
    found["resident"] = resident() - before
    del engine, small
    return found


def measure_groups(group: int, bf16: bool, unit_mb: float | None) -> dict[str, int]:
    """The same of fully_shard in groups of ranks (hsdp), on the model itself as training shards it."""
    # Before anything is gathered: buffers of DeepSpeed's collectives are not wanted here.
    dist.init_process_group("gloo")
    model, storages = on_meta(config("factorized", SHAPE), VOLUME), Storages()
    strategy = _Fsdp(group, bf16)
    cast(Any, strategy).parallel = SimpleNamespace(unit_mb=unit_mb)
    with storages:
        strategy.shard(model, "cpu", dist.get_world_size())
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter.to_local(), 1e-3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        x, mask = torch.ones(1, 1, *VOLUME), torch.zeros(1, *model.encoder.grids[0], dtype=torch.bool)
        for _ in range(2):
            storages.peak = 0
            model(x, mask).square().mean().backward()
            backward, storages.peak = storages.peak, 0
            optimizer.step()
            step = storages.peak
            optimizer.zero_grad()
        return {"states": storages.bytes(), "backward_peak": backward, "step_peak": step}


def predict_groups(ranks: int, group: int, bf16: bool, unit_mb: float | None) -> dict[str, float]:
    """The same from `swift.plan.memory`, with the activations of one clip."""
    geometry = build_geometry(config("factorized", SHAPE), VOLUME)
    unit = math.inf if unit_mb is None else unit_mb * MB
    sharding = Sharding(
        "hsdp", ranks, bf16, "none", 1, 0, 0, True, 0, False, False, "l1", group=group, unit=unit, on_cpu=True
    )
    return {
        "states": weight_bytes(geometry, sharding) + optimizer_bytes(geometry, sharding),
        "backward_peak": memory(geometry, sharding, 1).total,
        "step_peak": step_memory(geometry, sharding).total,
    }


def predict(
    stage: int, ranks: int, bf16: bool, accumulate: int, wide: bool = False, group: int = 0
) -> dict[str, float]:
    """The same from `swift.plan.memory`."""
    geometry = build_geometry(config("factorized", SHAPE), VOLUME)
    sharding = Sharding(
        f"zero{stage}",
        ranks,
        bf16,
        "none",
        accumulate,
        BUCKET_BYTES,
        BUCKET_BYTES,
        True,
        stage,
        False,
        False,
        "l1",
        group=group,
        fp32_gradients=wide,
        on_cpu=True,
    )
    total = geometry.total_parameters
    states = weight_bytes(geometry, sharding) + optimizer_bytes(geometry, sharding)
    gradients = gradient_bytes(geometry, sharding, total)
    # ZeRO 3 keeps its gradient buffer and a bucket from one step to the next.
    lasting = gradients + BUCKET_BYTES if stage == 3 else 0
    second = secondary_bytes(geometry, sharding, live_parameters(geometry))
    return {
        "states": states + lasting,
        "backward_peak": states + gradients + buffer_bytes(geometry, sharding) + second,
        "step_peak": step_memory(geometry, sharding).total,
    }


def main() -> None:
    """Start the ranks and print both."""
    from tests.distributed.ranks import run

    stage, ranks, bf16, accumulate, wide = map(int, sys.argv[1:6])
    how = bool(bf16), accumulate, bool(wide)
    measured = run(measure, ranks, stage, *how)[0]
    print(json.dumps({"measured": measured, "predicted": predict(stage, ranks, *how)}))


if __name__ == "__main__":
    main()

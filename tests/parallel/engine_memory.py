"""`python -m tests.parallel.engine_memory STAGE RANKS BF16 ACCUMULATE`: bytes that a real ZeRO engine holds on a CPU.

Measured are all storages of all tensors of rank 0 (resident memory would count Python and libraries too): after a step,
and at the peaks of the backward pass and of the step. Printed beside the prediction as one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from swift.parallel.geometry import build_geometry
from swift.parallel.memory import Sharding, buffer_bytes, gradient_bytes, optimizer_bytes, step_memory, weight_bytes
from tests.models.cases import Shape, config
from tests.parallel.measure import Live, on_meta

# Wide and few tokens: activations are nothing beside 7M parameters.
SHAPE = Shape((4, 4, 4), 2, (2, 2, 2, 1), (2, 2, 2, 2), (2, 2), 192, (2, 4))
VOLUME = (4, 4, 4, 2)
BUCKET_BYTES = 1_500_000


def engine_config(stage: int, bf16: bool, accumulate: int) -> dict[str, Any]:
    """As `swift.parallel.strategies.deepspeed_config` sets it."""
    elements = BUCKET_BYTES // (2 if bf16 else 4)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": elements,
    }
    zero["stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size"] = elements
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **({"bf16": {"enabled": True}} if bf16 else {}),
    }


class Chain(nn.Module):
    """The weight matrices of a model one after the other: its parameters without its activations."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.full(shape, 1e-3)) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scalar."""
        total = x.sum()
        for weight in self.weights:
            total = total + (weight.flatten() @ weight.flatten()).sqrt()
        return total


def run(rank: int, ranks: int, port: int, stage: int, bf16: bool, accumulate: int, results: Any) -> None:
    """One rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.utils.logging.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    settings = engine_config(stage, bf16, accumulate)
    shapes = [parameter.shape for parameter in on_meta(config("factorized", SHAPE), VOLUME).parameters()]
    with Live() as live:
        if stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = Chain(shapes)
        else:
            model = Chain(shapes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        del model, optimizer
        x = torch.ones(1, dtype=torch.bfloat16 if bf16 else torch.float32)
        for _ in range(2):
            live.peak = backward = 0
            for _ in range(accumulate):
                engine.backward(engine(x).float())
                backward = max(backward, live.peak)
                live.peak = 0
                engine.step()
        found = {"states": live.now, "backward_peak": backward, "step_peak": live.peak}
    if rank == 0:
        results.put(found)
    torch.distributed.barrier()


def predict(stage: int, ranks: int, bf16: bool, accumulate: int) -> dict[str, float]:
    """The same from `swift.parallel.memory`."""
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
        True,
    )
    total = geometry.total_parameters
    states = weight_bytes(geometry, sharding) + optimizer_bytes(geometry, sharding)
    gradients = gradient_bytes(geometry, sharding, total)
    # ZeRO 3 keeps its gradient buffer and a bucket from one step to the next.
    lasting = gradients + BUCKET_BYTES if stage == 3 else 0
    return {
        "states": states + lasting,
        "backward_peak": states + gradients + buffer_bytes(geometry, sharding),
        "step_peak": step_memory(geometry, sharding).total,
    }


def main() -> None:
    """Start the ranks and print both."""
    stage, ranks, bf16, accumulate = map(int, sys.argv[1:5])
    os.environ["DS_ACCELERATOR"] = "cpu"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(run, (ranks, port, stage, bool(bf16), accumulate, results), nprocs=ranks)
    print(json.dumps({"measured": results.get(), "predicted": predict(stage, ranks, bool(bf16), accumulate)}))


if __name__ == "__main__":
    main()

"""How ZeRO sums bf16 gradients over ranks and micro-batches: in bf16, or in float32 where that is asked for."""

from __future__ import annotations

import pytest
import torch

from swift.parallel.strategies import deepspeed_config
from tests.distributed.ranks import run
from tests.small import settings

SLOPES = ([256.0, 1.0], [1.0, 1.0])
"""Gradients of each rank's two micro-batches: numbers of bf16, whose sum 259 is none (its steps there are 2)."""
MEAN = 259 / 4
ELEMENTS = 64


def stepped(stages: list[tuple[int, bool]]) -> list[float]:
    """Minus the weight after one step of plain descent at rate 1 from 0, which is the gradient it took; by stage."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.utils.logging.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # never called here, and compiled for half a minute
    deepspeed.init_distributed("gloo")
    slopes = SLOPES[torch.distributed.get_rank()]
    found = []
    for stage, wide in stages:
        cfg = settings(f"parallel=zero{stage}", f"parallel.fp32_gradients={str(wide).lower()}").parallel
        engine_settings = deepspeed_config(cfg, 1e6, element_bytes=2) | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": len(slopes),
            "gradient_clipping": 0.0,
            "bf16": {"enabled": True},
        }
        model = torch.nn.Linear(ELEMENTS, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_settings)
        for slope in slopes:
            # The engine divides by the micro-batches, which is exact.
            engine.backward(engine(torch.full((1, ELEMENTS), slope, dtype=torch.bfloat16)).sum())
            engine.step()
        weight = safe_get_full_fp32_param(model.weight)
        assert weight.numel() == ELEMENTS
        assert bool((weight == weight.flatten()[0]).all())
        found.append(-float(weight.flatten()[0]))
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sum_in_float32_is_exact_and_one_in_bf16_is_not() -> None:
    first, second = run(stepped, 2, [(2, True), (3, True), (2, False), (3, False)])
    assert first == second
    assert first[:2] == [MEAN, MEAN]
    # In bf16 the small ones vanish beside the large one, or the sum is rounded.
    for value in first[2:]:
        assert value != MEAN
        assert value == pytest.approx(MEAN, rel=2**-6)

"""Bytes by kind against what engines were seen to hold, and against sums done by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch import nn

from swift.models.layers import PatchMerging
from swift.plan.geometry import build_geometry
from swift.plan.memory import (
    Sharding,
    backward_memory,
    backward_moments,
    buffer_bytes,
    gathered_unit,
    gradient_bytes,
    host_bytes,
    largest_block,
    largest_micro_batch,
    memory,
    mergings,
    optimizer_bytes,
    secondary_bytes,
    step_memory,
    unit_size,
    weight_bytes,
)
from tests.distributed.ranks import run
from tests.models.cases import config
from tests.plan import engine_memory
from tests.plan.measure import on_meta

VOLUME = (8, 8, 8, 4)
GEOMETRY = build_geometry(config("factorized", "divisible"), VOLUME)
P = GEOMETRY.total_parameters
BASE = Sharding("single", 1, False, "none", 1, 1e9, 1e9, True, 0, False, False, "l1")
ZERO = {f"zero{stage}": replace(BASE, strategy=f"zero{stage}", zero_stage=stage, ranks=4) for stage in (1, 2, 3)}


def test_states_of_one_device_are_16_bytes_a_parameter() -> None:
    assert weight_bytes(GEOMETRY, BASE) + optimizer_bytes(GEOMETRY, BASE) + gradient_bytes(GEOMETRY, BASE, P) == 16 * P


@pytest.mark.parametrize(
    ("strategy", "bf16", "weights", "optimizer", "gradients"),
    [
        ("zero1", False, 4, 3, 1),
        ("zero1", True, 2, 3, 0.5),
        ("zero2", True, 2, 3, 0.5),
        ("zero2", False, 4, 3, 1),
    ],
)
def test_states_of_zero_on_four_ranks(
    strategy: str, bf16: bool, weights: float, optimizer: float, gradients: float
) -> None:
    sharding = replace(ZERO[strategy], bf16=bf16)
    assert weight_bytes(GEOMETRY, sharding) == weights * P
    assert optimizer_bytes(GEOMETRY, sharding) == optimizer * P
    assert gradient_bytes(GEOMETRY, sharding, P) == gradients * P


def test_states_of_groups_are_those_of_one_group() -> None:
    """Of 8 ranks in groups of 4 each holds what each of 4 ranks holds under fsdp, and gathers as much."""
    fsdp = replace(BASE, strategy="fsdp", ranks=4)
    hsdp = replace(BASE, strategy="hsdp", ranks=8, group=4)
    assert weight_bytes(GEOMETRY, hsdp) == P
    assert optimizer_bytes(GEOMETRY, hsdp) == 2 * P
    assert gradient_bytes(GEOMETRY, hsdp, P) == P
    for micro_batch in (1, 3):
        assert memory(GEOMETRY, hsdp, micro_batch) == memory(GEOMETRY, fsdp, micro_batch)
    whole = replace(hsdp, group=8)
    assert memory(GEOMETRY, whole, 2) == memory(GEOMETRY, replace(fsdp, ranks=8), 2)


def test_a_second_copy_of_the_weights_lies_there_until_the_step_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is let go: a small model stays gathered until its backward pass, a large one does not."""
    hpz = replace(ZERO["zero3"], bf16=True, group=2)
    assert secondary_bytes(GEOMETRY, hpz) == 2 * P / 2
    assert secondary_bytes(GEOMETRY, ZERO["zero3"]) == 0
    assert step_memory(GEOMETRY, hpz).total == step_memory(GEOMETRY, replace(hpz, group=0)).total + P
    plain = memory(GEOMETRY, replace(hpz, group=0), 2).total
    assert memory(GEOMETRY, hpz, 2).total == max(plain, step_memory(GEOMETRY, hpz).total)
    monkeypatch.setattr("swift.plan.memory.LIVE_PARAMETERS", 0)
    plain = memory(GEOMETRY, replace(hpz, group=0), 2).total
    assert memory(GEOMETRY, hpz, 2).total == plain + P - largest_block(GEOMETRY)


def test_units_are_blocks_or_their_layers() -> None:
    """Counted on the model itself: the largest block, or the largest linear layer and what else a block has."""
    model = on_meta(config("factorized", "divisible"), VOLUME)
    blocks = {block: sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks()}
    assert gathered_unit(GEOMETRY, math.inf) == max(blocks.values())
    layers = {
        block: [sum(p.numel() for p in part.parameters()) for part in block.modules() if isinstance(part, nn.Linear)]
        for block in blocks
    }
    expected = max(max(sizes) + blocks[block] - sum(sizes) for block, sizes in layers.items())
    merged = [part.reduction.weight.numel() for part in model.modules() if isinstance(part, PatchMerging)]
    assert mergings(GEOMETRY) == merged
    assert gathered_unit(GEOMETRY, 0) == max(expected, *merged)
    # Only blocks over the limit are taken apart.
    between = max(blocks.values()) - 1
    rest = max(size for size in blocks.values() if size <= between)
    largest = max(blocks, key=lambda block: blocks[block])
    apart = max(layers[largest]) + blocks[largest] - sum(layers[largest])
    assert gathered_unit(GEOMETRY, between) == max(rest, apart)
    hsdp = replace(BASE, strategy="hsdp", ranks=8, group=4)
    # As blocks: the next gathered, the one's gradients twice, and those of the one before.
    last, second = (block.parameters for block in (GEOMETRY.stages[-1].blocks[-1], GEOMETRY.stages[-1].blocks[-2]))
    name = f"stage {len(GEOMETRY.stages)}, block {len(GEOMETRY.stages[-1].blocks)}"
    rest = P - sum(blocks.values())
    assert buffer_bytes(GEOMETRY, hsdp, name) == 4 * (second + rest + 2 * last)
    # As layers: each beside another of its block; mergings no longer stay gathered.
    layer = unit_size(GEOMETRY.stages[-1].blocks[-1], 0)
    assert buffer_bytes(GEOMETRY, replace(hsdp, unit=0.0), name) == 4 * (layer + rest - sum(merged) + 3 * layer)
    # While a merging runs backward, one that is larger than any layer is the unit that is gathered.
    assert max(merged) > unit_size(GEOMETRY.stages[0].blocks[0], 0)
    beside = buffer_bytes(GEOMETRY, replace(hsdp, unit=0.0), "merging 1")
    assert beside == 8 * max(expected, *merged) + 12 * (rest - sum(merged))


def test_accumulation_holds_gradients() -> None:
    """ZeRO 1 keeps whole gradients until the last micro-batch, ZeRO 2 a second shard."""
    assert gradient_bytes(GEOMETRY, replace(ZERO["zero1"], accumulate=2), 0) == 4 * P
    assert gradient_bytes(GEOMETRY, replace(ZERO["zero2"], accumulate=2), 0) == 2 * P
    assert gradient_bytes(GEOMETRY, replace(BASE, accumulate=2), 0) == 4 * P


def test_gradients_summed_in_float32_take_four_bytes() -> None:
    """Of the share of a rank, with and without accumulation; ZeRO 2 sends a copy of what a bucket holds."""
    for name in ("zero2", "zero3"):
        plain = replace(ZERO[name], bf16=True, reduce_bucket=200.0, overlap=False)
        for accumulate in (1, 2):
            wide = replace(plain, fp32_gradients=True, accumulate=accumulate)
            assert gradient_bytes(GEOMETRY, wide, P) == 4 * P / 4
        assert gradient_bytes(GEOMETRY, plain, P) == 2 * P / 4
        # In float32 already, the setting changes nothing.
        assert memory(GEOMETRY, replace(wide, bf16=False), 1) == memory(
            GEOMETRY, replace(plain, bf16=False, accumulate=2), 1
        )
    large = replace(ZERO["zero2"], bf16=True, reduce_bucket=1e9)
    copied = buffer_bytes(GEOMETRY, replace(large, fp32_gradients=True)) - buffer_bytes(GEOMETRY, large)
    assert copied == 4 * P  # the bucket holds all gradients there are


def test_gradients_larger_than_a_bucket_stay_in_zero1() -> None:
    small = replace(ZERO["zero1"], reduce_bucket=4.0 * GEOMETRY.sizes[5])
    large = sum(size for size in GEOMETRY.sizes if size > GEOMETRY.sizes[5])
    assert gradient_bytes(GEOMETRY, small, P) == pytest.approx(4 * (large * 3 / 4 + P / 4))


def test_offload_moves_states_to_the_host() -> None:
    sharding = replace(
        ZERO["zero3"], strategy="zero3_offload", offload_optimizer=True, offload_parameters=True, bf16=True
    )
    assert optimizer_bytes(GEOMETRY, sharding) == gradient_bytes(GEOMETRY, sharding, P) == 0
    assert host_bytes(GEOMETRY, sharding) == (12 + 4 + 2 + 2) * P / 4


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"])
def test_largest_micro_batch_is_the_last_that_fits(strategy: str, checkpointing: str) -> None:
    sharding = replace(
        ZERO.get(strategy, replace(BASE, strategy=strategy, ranks=4, group=2)), checkpointing=checkpointing, bf16=True
    )
    for available in (memory(GEOMETRY, sharding, 1).total * 0.999, 5e7, 3e8):
        most = largest_micro_batch(GEOMETRY, sharding, available)
        assert most == 0 or memory(GEOMETRY, sharding, most).total <= available
        assert memory(GEOMETRY, sharding, most + 1).total > available


def test_the_guard_holds_the_earlier_batches_of_a_step() -> None:
    """Up to 2 GiB of them, and at least one; and as many of the step before, unless DeepSpeed steps."""
    plain = replace(BASE, accumulate=4)
    guarded = replace(plain, guarded=True)
    clip = 4 * GEOMETRY.voxels
    room = 2 << 30
    more = room // clip + 1
    for micro_batch, held in ((2, 14 * clip), (room // clip // 2, 2 * room), (more, 2 * more * clip)):
        found = memory(GEOMETRY, guarded, micro_batch).total - memory(GEOMETRY, plain, micro_batch).total
        assert found == pytest.approx(held, rel=1e-12)
    for sharding, held in ((BASE, 2 * clip), (ZERO["zero1"], 0)):
        alone = memory(GEOMETRY, replace(sharding, guarded=True), 2).total
        assert alone - memory(GEOMETRY, sharding, 2).total == pytest.approx(held, rel=1e-9)
    for available in (5e7, 3e8, 1e10):
        most = largest_micro_batch(GEOMETRY, guarded, available)
        assert 0 < most < largest_micro_batch(GEOMETRY, plain, available)
        assert memory(GEOMETRY, guarded, most).total <= available < memory(GEOMETRY, guarded, most + 1).total


def test_the_peak_is_the_worst_moment() -> None:
    sharding = replace(ZERO["zero1"], reduce_bucket=1e5)
    moments = [backward_memory(GEOMETRY, sharding, moment, 2) for moment in backward_moments(GEOMETRY, sharding)]
    found = memory(GEOMETRY, sharding, 2)
    assert found.total == max(one.total for one in [*moments, step_memory(GEOMETRY, sharding)])
    assert found.total == sum(found.kinds().values())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "ranks", "bf16", "accumulate", "wide", "group"),
    [
        (1, 1, 0, 1, 0, 0),
        (1, 2, 1, 1, 0, 0),
        (1, 2, 0, 1, 0, 0),
        (1, 2, 1, 2, 0, 0),
        (1, 4, 0, 1, 0, 0),
        (2, 1, 0, 1, 0, 0),
        (2, 2, 1, 1, 0, 0),
        (2, 4, 0, 1, 0, 0),
        (2, 2, 1, 2, 1, 0),
        (3, 1, 0, 1, 0, 0),
        (3, 2, 1, 1, 0, 0),
        (3, 2, 1, 1, 1, 0),
        (3, 4, 1, 1, 0, 2),
    ],
)
def test_states_of_real_engines(stage: int, ranks: int, bf16: int, accumulate: int, wide: int, group: int) -> None:
    """DeepSpeed on gloo ranks: bytes of all tensors after a step, and at the peaks, within 10 %; resident memory."""
    how = bool(bf16), accumulate, bool(wide), group
    measured = run(engine_memory.measure, ranks, stage, *how)[0]
    predicted = engine_memory.predict(stage, ranks, *how)
    for name in ("states", "backward_peak", "step_peak"):
        assert predicted[name] == pytest.approx(measured[name], rel=0.1), (name, predicted, measured)
    assert predicted["states"] == pytest.approx(measured["resident"], rel=0.1), (predicted, measured)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("bf16", "unit_mb"), [(False, None), (True, None), (False, 2.0)])
def test_states_of_groups_of_ranks(bf16: bool, unit_mb: float | None) -> None:
    """fully_shard on 2 x 2 gloo ranks, as training shards the model: all tensors within 10 % of the plan (hsdp)."""
    measured = run(engine_memory.measure_groups, 4, 2, bf16, unit_mb)[0]
    predicted = engine_memory.predict_groups(4, 2, bf16, unit_mb)
    for name, value in predicted.items():
        assert value == pytest.approx(measured[name], rel=0.1), (name, predicted, measured)

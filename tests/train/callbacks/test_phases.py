"""The time of a step by phase: spans against a grid of integers, made-up profiles, and a real run."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from swift.train.callbacks.phases import FETCH, NAMES, WINDOW, Phases, breakdown, merged, total, without
from swift.train.callbacks.throughput import Throughput
from swift.utils import jsonl
from tests.runs import assert_same_run, start
from tests.small import command


def cells(spans):
    return {cell for begin, end in spans for cell in range(begin, end)}


def test_spans_equal_sets_of_integers():
    draw = random.Random(0)
    for _ in range(300):
        a, b = ([(x := draw.randrange(30), x + draw.randrange(6)) for _ in range(draw.randrange(7))] for _ in "ab")
        assert cells(merged(a)) == cells(a)
        assert all(left[1] < right[0] for left, right in zip(merged(a), merged(a)[1:]))
        assert cells(without(merged(a), merged(b))) == cells(a) - cells(b)
        assert total(without(merged(a), merged(b))) == len(cells(a) - cells(b))


def event(name, begin, end, device=DeviceType.CPU, annotation=False):
    span = SimpleNamespace(start=begin * 1e6, end=end * 1e6)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def test_phases_on_a_cpu():
    events = [
        event(WINDOW, 10, 20, annotation=True),
        event(FETCH, 10, 12, annotation=True),
        event("aten::stack", 11, 12),  # makes the sample: data
        event("aten::linear", 12, 15),
        event("aten::addmm", 13, 14),  # inside the one before
        event("autograd::engine::evaluate_function: X", 12, 19),  # may wait for others
        event("gloo:all_reduce", 14, 17, annotation=True),  # 15 to 17 is exposed
        event("aten::add_", 18, 19),
        event("aten::add_", 19.5, 25),  # ends after the window
    ]
    found = breakdown(events, on_device=False)
    assert found == pytest.approx({"data": 2.0, "compute": 4.5, "communication": 2.0, "other": 1.5})


def test_phases_on_a_device():
    cuda = DeviceType.CUDA
    events = [
        event(WINDOW, 0, 10, annotation=True),
        event(WINDOW, 0, 9, cuda, annotation=True),
        event(FETCH, 0, 3, annotation=True),  # the device has work until 1: a stall from 1 to 3
        event("Optimizer.step#AdamW.step", 0, 9, cuda, annotation=True),
        event("gemm", 0, 1, cuda),
        event("aten::mm", 3, 9),  # launched by the CPU
        event("nccl:all_reduce", 3, 9, annotation=True),
        event("gemm", 4, 6, cuda),
        event("ncclDevKernel_AllReduce_Sum_f32", 5, 8, cuda),  # 6 to 8 is exposed
    ]
    found = breakdown(events, on_device=True)
    assert found == pytest.approx({"data": 2.0, "compute": 3.0, "communication": 2.0, "other": 3.0})


@pytest.mark.usefixtures("alone")
def test_a_profiled_run_is_the_same_run_and_says_where_its_time_went(store: Path, finished: Path, tmp_path: Path):
    start(*command(store, tmp_path / "run", "trainer.phases_every=2", "trainer.figures=false"))
    assert_same_run(finished, tmp_path / "run")
    # Due after step 2; the validation after step 3 begins it anew, for steps 4 to 6.
    lines = jsonl.read(tmp_path / "run" / "metrics.jsonl")
    [values] = [line for line in lines if "perf/phase_data" in line]
    assert values["step"] == 6
    parts = {name: values[f"perf/phase_{name}"] for name in NAMES}
    assert sum(parts.values()) == pytest.approx(1.0)
    assert parts["data"] > 0
    assert parts["compute"] > 0.1
    assert parts["communication"] == 0.0
    assert values["perf/phase_straggler"] == pytest.approx(0.0, abs=1e-12)
    # The profiled steps are in no rate.
    assert [line["step"] for line in lines if "perf/clips_per_second" in line] == [1, 2]


def test_the_straggler_is_what_the_slowest_rank_is_above_the_average(monkeypatch: pytest.MonkeyPatch):
    """This rank is busy for 3 of 10 s, another for 9: 6 on average."""
    others = {"sum": torch.tensor([1.0, 8.0, 0.5, 0.5]), "max": torch.tensor(9.0)}

    def all_reduce(tensor, op=None):
        tensor.copy_(tensor + others["sum"] if op is None else torch.maximum(tensor, others["max"].double()))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    callback = Phases(1, Throughput(1.0, 1, None, 1))
    callback._trainer = trainer
    values = callback._over_ranks(trainer, {"data": 2.0, "compute": 1.0, "communication": 6.0, "other": 1.0})
    assert values == pytest.approx(
        {
            "perf/phase_data": 0.15,
            "perf/phase_compute": 0.45,
            "perf/phase_communication": 0.325,
            "perf/phase_other": 0.075,
            "perf/phase_straggler": 0.3,
        }
    )

"""What only a GPU can show: `make test-gpu`. The same gates as `make bench-gpu`, whose figures say more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swift.train.pretrain import PretrainModule
from swift.utils import jsonl
from tests.bench.gpu import gates, strategies
from tests.bench.gpu.base import Bench, release
from tests.runs import QUIET, start, weights
from tests.small import command, metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNS = ("trainer.max_steps=6", f"trainer.accelerator={'gpu' if DEVICE == 'cuda' else 'cpu'}", QUIET)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Small shapes: large ones are the benchmark's."""
    return Bench(torch.device(DEVICE), True, tmp_path_factory.mktemp("gpu"), card={"matrix_tflops": 500.0})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(gates.KINDS))
def test_outputs_and_gradients_equal_the_slow_reference(bench: Bench, kind: str, precision: str) -> None:
    row = gates.against_reference(bench, kind, 16, precision)
    assert row["ok"], row


@pytest.mark.parametrize("kind", ["v1", "factorized"])
def test_bf16_weights_and_stream_equal_the_slow_reference(bench: Bench, kind: str) -> None:
    row = gates.against_reference(bench, kind, 16, "bf16", "bf16")
    assert row["ok"], row


@pytest.mark.parametrize("kind", list(gates.KINDS))
def test_compiled_blocks_are_whole_graphs_and_equal_eager_ones(bench: Bench, kind: str) -> None:
    row = gates.compiled(bench, kind, 16, "bf16")
    release()
    assert row["breaks"] == 0, row
    assert row["ok"], row


def test_more_than_65535_windows_at_once_equal_them_one_clip_after_the_other(bench: Bench) -> None:
    # 24^3 voxels in patches of 3, 4 frames: 512 windows of time a clip.
    row = gates.many_clips(bench, "7m", 130, "bf16")
    assert row["ok"], row


def test_two_runs_are_equal_to_the_last_bit(bench: Bench) -> None:
    row = gates.twice(bench, "7m", 2, "mixed", False)
    assert row["ok"], row


@pytest.mark.parametrize("name", strategies.NAMES)
def test_one_rank_of_every_strategy_trains_and_resumes_as_single_does(bench: Bench, name: str) -> None:
    row = strategies.one(bench, name)
    assert row["ok"], row


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_a_step_that_is_not_finite_is_left_out(
    strategy: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PretrainModule.training_step

    def poisoned(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = original(self, batch, batch_idx)
        return loss * math.nan if self.global_step == 3 else loss

    monkeypatch.setattr(PretrainModule, "training_step", poisoned)
    run_dir = tmp_path / "run"
    ranks = [] if strategy == "single" else ["parallel.devices=1"]
    start(*command(store, run_dir, *LEARNS, f"parallel={strategy}", *ranks))
    left_out = [
        record["guard/left_out"] for record in jsonl.read(run_dir / "metrics.jsonl") if "guard/left_out" in record
    ]
    assert left_out[-1] == 1
    assert all(torch.isfinite(value).all() for value in weights(run_dir).values())
    losses = [record["train/loss"] for record in metrics(run_dir) if "train/loss" in record]
    assert sum(math.isfinite(loss) for loss in losses if loss is not None) >= 5

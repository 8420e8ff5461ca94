"""Throughput: rates, accumulation, resuming, waiting for data; in a real Trainer too."""

from __future__ import annotations

import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler

from swift.train.callbacks.log import JsonlLogger
from swift.train.callbacks.throughput import FetchTimer, Throughput
from swift.utils import jsonl


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Logger:
    def __init__(self):
        self.lines = []

    def log_metrics(self, values, step):
        self.lines.append((step, values))


def fake_trainer(step=0, accumulate=1, world=1):
    return SimpleNamespace(
        global_step=step,
        accumulate_grad_batches=accumulate,
        world_size=world,
        profiler=PassThroughProfiler(),
        loggers=[Logger()],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def start(callback, trainer):
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)


def steps(callback, trainer, clock, count, seconds, clips, wait=0.0):
    for _ in range(count):
        for micro in range(trainer.accumulate_grad_batches):
            trainer.profiler.start("[_TrainingEpochLoop].train_dataloader_next")
            clock.now += wait
            trainer.profiler.stop("[_TrainingEpochLoop].train_dataloader_next")
            clock.now += seconds / trainer.accumulate_grad_batches - wait
            trainer.global_step += micro == trainer.accumulate_grad_batches - 1
            callback.on_train_batch_end(trainer, None, {}, {"sample_id": torch.zeros(clips)}, 0)


def test_values_of_an_interval():
    clock, trainer = Clock(), fake_trainer(accumulate=2, world=4)
    callback = Throughput(flops=3e12, tokens=1000, peak=24e12, every=5, clock=clock)
    start(callback, trainer)
    steps(callback, trainer, clock, 5, seconds=2.0, clips=3, wait=0.25)
    [(step, values)] = trainer.loggers[0].lines
    # 24 clips in 2 s: two micro-batches of three on four ranks.
    assert step == 5
    assert values == pytest.approx(
        {
            "perf/clips_per_second": 12.0,
            "perf/tokens_per_second": 12000.0,
            "perf/step_seconds": 2.0,
            "perf/tflops": 9.0,
            "perf/mfu": 0.375,
            "perf/data_wait": 0.25,
        }
    )


def test_no_mfu_without_a_known_peak():
    clock, trainer = Clock(), fake_trainer()
    callback = Throughput(flops=1e12, tokens=1, peak=None, every=1, clock=clock)
    start(callback, trainer)
    steps(callback, trainer, clock, 1, seconds=1.0, clips=1)
    assert "perf/mfu" not in trainer.loggers[0].lines[0][1]


def test_a_resumed_run_counts_from_its_step_and_logs_the_rest_at_the_end():
    clock, trainer = Clock(), fake_trainer(step=7)
    callback = Throughput(flops=1e12, tokens=1, peak=None, every=5, clock=clock)
    start(callback, trainer)
    steps(callback, trainer, clock, 5, seconds=0.5, clips=2)
    callback.on_train_end(trainer, None)
    lines = trainer.loggers[0].lines
    assert [step for step, _ in lines] == [10, 12]
    assert [values["perf/clips_per_second"] for _, values in lines] == pytest.approx([4.0, 4.0])
    assert [values["perf/step_seconds"] for _, values in lines] == pytest.approx([0.5, 0.5])


def test_validation_is_left_out():
    clock, trainer = Clock(), fake_trainer()
    callback = Throughput(flops=1e12, tokens=1, peak=None, every=4, clock=clock)
    start(callback, trainer)
    steps(callback, trainer, clock, 2, seconds=1.0, clips=1)
    callback.on_validation_start(trainer, None)
    clock.now += 100
    callback.on_validation_end(trainer, None)
    steps(callback, trainer, clock, 2, seconds=1.0, clips=1)
    assert trainer.loggers[0].lines[0][1]["perf/clips_per_second"] == pytest.approx(1.0)


def test_other_actions_are_not_counted():
    clock = Clock()
    timer = FetchTimer(clock)
    with timer.profile("run_training_batch"):
        clock.now += 5
    with timer.profile("[_EvaluationLoop].val_next"):
        clock.now += 5
    assert timer.seconds == 0


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.layer(batch["x"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        time.sleep(0.02)
        return {"x": torch.ones(1), "sample_id": index}


@pytest.mark.filterwarnings("ignore")
def test_in_a_real_trainer(tmp_path):
    """Loading takes 40 ms a batch, training next to nothing: Lightning's own names of actions are the right ones."""
    trainer = pl.Trainer(
        max_steps=3,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=JsonlLogger(tmp_path),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[Throughput(flops=1e9, tokens=7, peak=None, every=1)],
    )
    trainer.fit(Tiny(), torch.utils.data.DataLoader(Slow(), batch_size=2))
    lines = [record for record in jsonl.read(tmp_path / "metrics.jsonl") if "perf/data_wait" in record]
    assert [record["step"] for record in lines] == [1, 2, 3]
    waits = sum(record["perf/data_wait"] * record["perf/step_seconds"] for record in lines)
    assert waits >= 0.2
    for record in lines:
        assert 0 < record["perf/data_wait"] <= 1
        assert record["perf/tokens_per_second"] == pytest.approx(7 * record["perf/clips_per_second"])
        assert record["perf/clips_per_second"] * record["perf/step_seconds"] == pytest.approx(4)

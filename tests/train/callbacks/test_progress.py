"""ClipProgress: counts, rates, resuming, terminals and files."""

from __future__ import annotations

import io
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from swift.train.callbacks.progress import ClipProgress, clock_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def fake_trainer(step=0, max_steps=100, accumulate=1, world=1):
    return SimpleNamespace(
        global_step=step,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        world_size=world,
        is_global_zero=True,
        sanity_checking=False,
        callback_metrics={},
        estimated_stepping_batches=float("inf"),
    )


def run(bar, trainer, clock, steps, seconds=1.0, clips=4, loss=0.5):
    for _ in range(steps):
        for micro in range(trainer.accumulate_grad_batches):
            clock.now += seconds / trainer.accumulate_grad_batches
            trainer.global_step += micro == trainer.accumulate_grad_batches - 1
            outputs = {"loss": torch.tensor(loss / trainer.accumulate_grad_batches)}
            bar.on_train_batch_end(trainer, None, outputs, {"sample_id": torch.zeros(clips)}, 0)


def make(stream, clock, trainer, **options):
    bar = ClipProgress(stream, clock=clock, **options)
    bar.setup(trainer, None, "fit")
    bar.on_train_start(trainer, None)
    return bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00"), (float("nan"), "?")],
)
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text


def test_rate_is_clips_over_seconds_of_the_window():
    stream, clock, trainer = io.StringIO(), Clock(), fake_trainer()
    bar = make(stream, clock, trainer, line_seconds=104, window=2)
    for seconds, clips in ((100.0, 1), (1.0, 4), (3.0, 4)):
        run(bar, trainer, clock, 1, seconds=seconds, clips=clips)
    assert "  2 clips/s  " in stream.getvalue().splitlines()[1]


def test_lines_in_a_file_every_ten_seconds():
    stream, clock, trainer = io.StringIO(), Clock(), fake_trainer()
    bar = make(stream, clock, trainer)
    run(bar, trainer, clock, 25)
    bar.on_train_end(trainer, None)
    assert stream.getvalue().split("\n") == [
        "training to step 100",
        "step 10/100 (10%)  loss 0.5000  4 clips/s  ETA 1:30",
        "step 20/100 (20%)  loss 0.5000  4 clips/s  ETA 1:20",
        "step 25/100 (25%)  loss 0.5000  4 clips/s  in 0:25",
        "",
    ]
    assert "\r" not in stream.getvalue()


def test_resumed_run_starts_at_its_step_and_paces_itself_on_this_session():
    stream, clock, trainer = io.StringIO(), Clock(), fake_trainer(step=80)
    bar = make(stream, clock, trainer)
    run(bar, trainer, clock, 5, seconds=2.0)
    text = stream.getvalue().splitlines()
    assert text[0] == "training from step 80 to step 100"
    assert text[1] == "step 85/100 (85%)  loss 0.5000  2 clips/s  ETA 0:30"


def test_accumulation_and_ranks_count_every_clip_and_undo_the_scaling_of_the_loss():
    stream, clock, trainer = io.StringIO(), Clock(), fake_trainer(accumulate=2, world=8)
    bar = make(stream, clock, trainer)
    run(bar, trainer, clock, 10, clips=3, loss=0.75)
    assert stream.getvalue().splitlines()[1] == "step 10/100 (10%)  loss 0.7500  48 clips/s  ETA 1:30"


def test_loss_is_the_mean_since_the_last_line():
    stream, clock, trainer = io.StringIO(), Clock(), fake_trainer()
    bar = make(stream, clock, trainer)
    run(bar, trainer, clock, 5, loss=1.0)
    run(bar, trainer, clock, 5, loss=0.0)
    run(bar, trainer, clock, 10, loss=0.25)
    assert [line.split()[4] for line in stream.getvalue().splitlines()[1:]] == ["0.5000", "0.2500"]


def test_validation_slows_the_eta_but_not_the_clips_per_second():
    stream, clock, trainer = io.StringIO(), Clock(), fake_trainer()
    bar = make(stream, clock, trainer)
    run(bar, trainer, clock, 5)
    bar.on_validation_start(trainer, None)
    clock.now += 5
    trainer.callback_metrics["val/l1"] = torch.tensor(0.625)
    bar.on_validation_end(trainer, None)
    assert stream.getvalue().splitlines()[1] == "step 5/100 (5%)  loss 0.5000  val/l1 0.6250  4 clips/s  ETA 3:10"


def test_terminal_draws_one_bar_from_the_resumed_step():
    stream, clock, trainer = Terminal(), Clock(), fake_trainer(step=40)
    bar = make(stream, clock, trainer)
    assert bar._bar.n == 40
    run(bar, trainer, clock, 10)
    assert (bar._bar.n, bar._bar.total) == (50, 100)
    bar.on_train_end(trainer, None)
    last = stream.getvalue().split("\r")[-1]
    assert "50%" in last
    assert "50/100 steps, loss 0.5000  4 clips/s" in last
    assert stream.getvalue().endswith("\n")


def test_other_ranks_are_silent():
    trainer = fake_trainer()
    trainer.is_global_zero = False
    stream, clock = io.StringIO(), Clock()
    bar = make(stream, clock, trainer)
    run(bar, trainer, clock, 30)
    bar.on_train_end(trainer, None)
    bar.print("hello")
    assert stream.getvalue() == ""


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.layer(batch["x"]).square().mean() * 0 + 2.0

    def validation_step(self, batch, index):
        self.log("val/l1", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"x": torch.ones(1), "sample_id": index}


@pytest.mark.filterwarnings("ignore")
def test_in_a_real_trainer_with_accumulation(tmp_path):
    stream = io.StringIO()
    loader = torch.utils.data.DataLoader(Clips(), batch_size=2)
    pl.Trainer(
        max_steps=3,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[ClipProgress(stream, line_seconds=0.0)],
    ).fit(Tiny(), loader, loader)
    text = stream.getvalue().splitlines()
    assert text[0] == "training to step 3"
    assert [line.split()[1] for line in text[1:4]] == ["1/3", "2/3", "3/3"]
    assert all("loss 2.0000" in line for line in text[1:])
    assert text[-1].startswith("step 3/3 (100%)")
    assert "val/l1 0.5000" in text[-1]

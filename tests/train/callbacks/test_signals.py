"""Stopping on request, to the same bits; signs of life and start-up phases by a clock of the test."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import swift.train.wiring
from swift.cluster.status import describe
from swift.train.callbacks.signals import Heartbeat, StopOnSignal
from swift.utils import jsonl
from swift.utils.entry import INTERRUPTED_STATUS, STOPPED_STATUS
from tests.runs import QUIET, assert_same_run, restarts, start
from tests.small import command


class Ask(pl.Callback):
    """Sends this process a signal while optimizer step `step` + 1 is under way."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def ask_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Adds `Ask` to the runs of this test."""
    original = swift.train.wiring.build_callbacks

    def ask(step: int, number: signal.Signals) -> None:
        monkeypatch.setattr(swift.train.wiring, "build_callbacks", lambda *args: [*original(*args), Ask(step, number)])

    return ask


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("number", "step"), [(signal.SIGUSR1, 3), (signal.SIGTERM, 1)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    store: Path, finished: Path, tmp_path: Path, ask_at: Callable[..., None], number: signal.Signals, step: int
) -> None:
    before = signal.getsignal(number)
    ask_at(step, number)
    with pytest.raises(SystemExit) as stop:
        start(*command(store, tmp_path / "run", QUIET))
    assert stop.value.code == STOPPED_STATUS == 75
    assert signal.getsignal(number) == before
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{step + 1:07d}"
    [beat] = [json.loads(path.read_text()) for path in (tmp_path / "run" / "heartbeats").iterdir()]
    assert (beat["state"], beat["step"]) == ("stopped", step + 1)
    ask_at(100, number)
    start(*command(store, tmp_path / "run", QUIET))
    assert_same_run(finished, tmp_path / "run")
    assert restarts(tmp_path / "run") == [step + 1]


@pytest.mark.usefixtures("alone")
def test_ctrl_c_saves_too(
    store: Path, finished: Path, tmp_path: Path, ask_at: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    # A shell's background ignores Ctrl-C, and these tests may run in one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ask_at(3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        start(*command(store, tmp_path / "run", QUIET))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "saving and stopping at the end of this step; Ctrl-C again stops now" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-0000004"
    assert describe(tmp_path / "run", time.time()).state == "stopped"
    ask_at(100, signal.SIGINT)
    start(f"resume={tmp_path / 'run'}")
    assert_same_run(finished, tmp_path / "run")
    assert restarts(tmp_path / "run") == [4]


def test_a_second_ctrl_c_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    callback = StopOnSignal(Saves(0))
    callback._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        callback._note(signal.SIGINT, None)
    assert capfd.readouterr().err.count("saving and stopping") == 1


def test_ctrl_c_that_a_shell_keeps_from_its_background_is_ignored(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in StopOnSignal.SIGNALS}
    callback = StopOnSignal(Saves(0))
    try:
        for handler, taken in ((signal.SIG_IGN, signal.SIG_IGN), (signal.default_int_handler, callback._note)):
            signal.signal(signal.SIGINT, handler)
            callback.on_train_start(fake_trainer(Saves(0)), None)
            assert signal.getsignal(signal.SIGINT) == taken
        callback.on_train_end(fake_trainer(Saves(0)), None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Saves:
    """Stands in for what saves checkpoints."""

    def __init__(self, saved: int) -> None:
        self.folder, self.saved, self.calls = Path("checkpoints"), saved, []
        self.saver = SimpleNamespace(finish=lambda: self.calls.append("finish"))


def fake_trainer(saves: Saves, world: int = 1, accumulate: int = 1, step: int = 7, zero: bool = True) -> Any:
    return SimpleNamespace(
        world_size=world,
        accumulate_grad_batches=accumulate,
        global_step=step,
        max_steps=100,
        is_global_zero=zero,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        save_checkpoint=lambda folder: saves.calls.append(("save", folder)),
    )


@pytest.mark.parametrize(("saved", "calls"), [(5, [("save", Path("checkpoints")), "finish"]), (7, ["finish"])])
def test_it_stops_between_optimizer_steps_and_saves_once(saved: int, calls: list[Any]) -> None:
    saves = Saves(saved)
    callback, trainer = StopOnSignal(saves), fake_trainer(saves, accumulate=3)
    callback.on_train_batch_start(trainer, None, None, 0)
    callback._note(signal.SIGUSR1, None)
    for index in (1, 2, 4, 5):
        callback.on_train_batch_start(trainer, None, None, index)
    assert saves.calls == []
    with pytest.raises(SystemExit):
        callback.on_train_batch_start(trainer, None, None, 6)
    assert saves.calls == calls


def test_all_ranks_stop_when_one_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(tensor: torch.Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        tensor.clamp_(min=int(signal.SIGTERM))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    saves = Saves(0)
    callback, trainer = StopOnSignal(saves), fake_trainer(saves, world=2)
    callback.on_train_batch_start(trainer, None, None, 0)
    assert saves.calls == []  # the answer of the ranks is read a step later
    with pytest.raises(SystemExit):
        callback.on_train_batch_start(trainer, None, None, 1)
    assert callback.asked == 0
    assert len(saves.calls) == 2


def test_the_last_step_is_judged_before_it_is_saved() -> None:
    saves = Saves(0)
    guard = SimpleNamespace(settle=lambda trainer: saves.calls.append("judged"))
    callback = StopOnSignal(saves, guard)
    callback._note(signal.SIGUSR1, None)
    with pytest.raises(SystemExit):
        callback.on_train_batch_start(fake_trainer(saves), None, None, 0)
    assert saves.calls[0] == "judged"


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_signs_of_life_and_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_ATTEMPT", "12.3")
    monkeypatch.setenv("SWIFT_PHASE_BEGAN", "990")
    monkeypatch.setenv("SLURM_PROCID", "0")
    clock = Clock()
    trainer = fake_trainer(Saves(0), step=40)
    callback = Heartbeat(tmp_path, every=2.0, clock=clock)

    def beat() -> dict[str, Any]:
        content: dict[str, Any] = json.loads((tmp_path / "heartbeats" / "12.3.json").read_text())
        return content

    clock.now = 1_003.0
    callback.setup(trainer, None, "fit")
    clock.now = 1_005.0
    callback.on_train_start(trainer, None)
    expected = {"attempt": "12.3", "began": 1_000.0, "first_step": 40, "max_steps": 100, "train_seconds": 0.0}
    assert beat() == expected | {"time": 1_005.0, "step": 40, "state": "starting"}
    clock.now = 1_009.0  # compiling, say: not a step's time
    callback.on_train_batch_start(trainer, None, None, 0)
    clock.now = 1_010.0
    trainer.global_step = 41
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert beat() | {"train_seconds": 1.0, "step": 41, "state": "training", "time": 1_010.0} == beat()
    clock.now = 1_011.0
    trainer.global_step = 42
    callback.on_train_batch_end(trainer, None, None, None, 1)
    assert beat()["step"] == 41  # not written twice within two seconds
    clock.now = 1_020.0
    callback.on_validation_batch_end(trainer, None, None, None, 0)
    assert (beat()["state"], beat()["step"]) == ("validating", 42)
    clock.now = 1_030.0
    callback.on_validation_end(trainer, None)
    clock.now = 1_031.0
    callback.on_train_batch_end(trainer, None, None, None, 2)
    assert beat()["train_seconds"] == 3.0  # validation is no part of it
    clock.now = 1_040.0
    callback.judging(trainer)
    assert (beat()["state"], beat()["time"]) == ("judging", 1_040.0)
    clock.now = 1_041.0
    callback.judging(trainer)
    assert beat()["time"] == 1_040.0
    callback.on_exception(trainer, None, RuntimeError())
    assert beat()["state"] == "failed"
    for stop in (SystemExit(STOPPED_STATUS), SystemExit(INTERRUPTED_STATUS), KeyboardInterrupt()):
        callback.on_exception(trainer, None, RuntimeError())
        callback.on_exception(trainer, None, stop)
        assert beat()["state"] == "stopped"
    lines = jsonl.read(tmp_path / "startup.jsonl")
    assert [(line["phase"], line["seconds"]) for line in lines] == [
        ("python", 10.0),
        ("meeting of the ranks", 3.0),
        ("model, data and checkpoint", 2.0),
        ("first step", 5.0),
    ]
    assert {line["attempt"] for line in lines} == {"12.3"}


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_PHASE_BEGAN", "990")
    monkeypatch.setenv("SLURM_PROCID", "1")
    callback, trainer = Heartbeat(tmp_path, clock=Clock()), fake_trainer(Saves(0), zero=False)
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)
    callback.on_train_end(trainer, None)
    assert list(tmp_path.iterdir()) == []

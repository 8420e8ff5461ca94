"""How often the host waits for the device in a training step: counted on a CPU, where the same calls are made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swift.config.compose import typed
from swift.parallel.setup import resolve
from swift.train.callbacks.progress import ClipProgress
from swift.train.wiring import build_data, build_module, build_trainer
from swift.utils.device import HostCopy
from tests.distributed.ranks import run
from tests.distributed.strategies import TWO
from tests.small import command, composed

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive")
"""Operations whose result, or whose size, the host has to know: item(), bool(), if, indexing by a mask."""
STEPS = ["trainer.max_steps=3", "trainer.val_every=3", "trainer.log_every=100", "trainer.accelerator=cpu"]
STEPS += ["trainer.accumulate=2", "data.batch_size=1", "trainer.figures=false"]
METHODS = ("tolist", "cpu", "numpy")
"""Ways to the host that are no operation on a CPU."""


class Waits(pl.Callback, TorchDispatchMode):
    """Notes which module of swift reads from the device between the start and the end of each micro-batch.

    A copy for the host that was begun in an earlier micro-batch is there: nobody waits for its end or its numbers.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pl.Callback.__init__(self)
        TorchDispatchMode.__init__(self)
        self.steps: list[list[str]] = []
        self.counting = False
        self.here: list[Tensor] = []
        began: dict[HostCopy, int] = {}
        begin, wait = HostCopy.__init__, HostCopy.wait

        def noted_begin(copy: HostCopy, *args: Any, **kwargs: Any) -> None:
            begin(copy, *args, **kwargs)
            began[copy] = len(self.steps)

        def noted_wait(copy: HostCopy) -> dict[str, Tensor]:
            copies = wait(copy)
            if began[copy] < len(self.steps):
                self.here += copies.values()
            return copies

        monkeypatch.setattr(HostCopy, "__init__", noted_begin)
        monkeypatch.setattr(HostCopy, "wait", noted_wait)
        for name in METHODS:
            monkeypatch.setattr(Tensor, name, self._noted(getattr(Tensor, name)))

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if not self._is_here(args[0]):
                self._note()
            return method(*args, **kwargs)

        return noted

    def _is_here(self, tensor: Any) -> bool:
        return any(tensor is one for one in self.here)

    def _note(self) -> None:
        if not self.counting:
            return
        frame: Any = sys._getframe(2)
        while frame is not None and not frame.f_globals.get("__name__", "").startswith("swift."):
            frame = frame.f_back
        self.steps[-1].append("a library" if frame is None else frame.f_globals["__name__"])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = func.overloadpacket.__name__ in ("index", "index_put", "index_put_")
        reads = func.overloadpacket.__name__ in WAITING and not self._is_here(args[0])
        if reads or (indexed and any(index is not None and index.dtype == torch.bool for index in args[1])):
            self._note()
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, *_: Any) -> None:
        """Before the step."""
        self.steps.append([])
        self.counting = True
        self.__enter__()

    def end(self, *_: Any) -> None:
        """After all callbacks."""
        self.__exit__(None, None, None)
        self.counting = False


def waits(store: Path, run_dir: Path, words: list[str]) -> list[list[str]]:
    """Who waits in each micro-batch of a run of three steps of two, on this rank."""
    words = [*STEPS, *words]
    with pytest.MonkeyPatch.context() as monkeypatch:
        setup = resolve(typed(composed(*command(store, run_dir, *words))))
        module, data, trainer = build_module(setup, empty=True), build_data(setup.cfg), build_trainer(setup, [])
        found = Waits(monkeypatch)
        # By its clock it would show a line, and read the loss for it, on a machine that is slow enough.
        for progress in (one for one in trainer.callbacks if isinstance(one, ClipProgress)):  # type: ignore[attr-defined]
            progress._clock = lambda: 0.0
        last = LambdaCallback(on_train_batch_end=found.end)
        trainer.callbacks[:] = [found, *trainer.callbacks, last]  # type: ignore[attr-defined]  # set at run time
        trainer.fit(module, datamodule=data)
    return found.steps


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("action", ["skip", "off", "rollback"])
def test_no_step_waits_for_the_device_but_where_its_verdict_is_needed(store: Path, tmp_path: Path, action: str) -> None:
    guard = ["swift.train.callbacks.guard"]
    last: dict[str, list[list[str]]] = {"skip": [[], [], guard], "off": [[], [], []], "rollback": [guard] * 3}
    # Of two micro-batches only the one that steps; after the last step comes a validation.
    expected = [found for end in last[action] for found in ([], end)]
    assert waits(store, tmp_path, [f"guard.action={action}"]) == expected


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_do_not_wait_for_verdict_and_signals_either(name: str, store: Path, tmp_path: Path) -> None:
    last = [[], [], [], [], [], ["swift.train.callbacks.guard"]]
    assert run(waits, 2, store, tmp_path, [f"parallel={name}", *TWO]) == [last, last]

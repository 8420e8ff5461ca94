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
from swift.train.wiring import build_data, build_module, build_trainer
from tests.small import command, composed

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive")
"""Operations whose result, or whose size, the host has to know: item(), bool(), if, indexing by a mask."""
METHODS = ("tolist", "cpu", "numpy")
"""Ways to the host that are no operation on a CPU."""


class Waits(pl.Callback, TorchDispatchMode):
    """Notes which module of swift reads from the device between the start and the end of each micro-batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pl.Callback.__init__(self)
        TorchDispatchMode.__init__(self)
        self.steps: list[list[str]] = []
        self.counting = False
        for name in METHODS:
            monkeypatch.setattr(Tensor, name, self._noted(getattr(Tensor, name)))

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._note()
            return method(*args, **kwargs)

        return noted

    def _note(self) -> None:
        if not self.counting:
            return
        frame: Any = sys._getframe(2)
        while frame is not None and not frame.f_globals.get("__name__", "").startswith("swift."):
            frame = frame.f_back
        self.steps[-1].append("a library" if frame is None else frame.f_globals["__name__"])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = func.overloadpacket.__name__ in ("index", "index_put", "index_put_")
        if func.overloadpacket.__name__ in WAITING or (
            indexed and any(index is not None and index.dtype == torch.bool for index in args[1])
        ):
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


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("action", "waits"), [("skip", ["swift.train.callbacks.guard"]), ("off", [])])
def test_the_host_waits_once_a_step_for_the_guard(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, waits: list[str]
) -> None:
    words = ["trainer.max_steps=3", "trainer.val_every=3", "trainer.log_every=100", "trainer.accelerator=cpu"]
    words += ["trainer.accumulate=2", "data.batch_size=1", "trainer.figures=false", f"guard.action={action}"]
    setup = resolve(typed(composed(*command(store, tmp_path, *words))))
    module, data, trainer = build_module(setup, empty=True), build_data(setup.cfg), build_trainer(setup, [])
    found = Waits(monkeypatch)
    last = LambdaCallback(on_train_batch_end=found.end)
    trainer.callbacks[:] = [found, *trainer.callbacks, last]  # type: ignore[attr-defined]  # set at run time
    trainer.fit(module, datamodule=data)
    # Of two micro-batches only the one that steps.
    assert found.steps == [[], waits] * 3

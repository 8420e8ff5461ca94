"""A stand-in for `swift.utils.device`: a host that looks like a node of Aurora, without its devices.

Arithmetic is the CPU's, so that a run must come out as on the CPU. What differs is what a real xpu does differently:

- every call of torch.cuda by swift is refused, also `is_available`, and so are `Tensor.cuda` and `Module.cuda`;
- a copy ends late, only after LATE further ones, or when the device is waited for. If its source has changed by then (a
  slot of the ring was filled again, or page-locked memory was freed and is used by another), the copy is spoilt;
- page-locked memory is used again, for something else, the moment that nobody holds it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import dataloader
from torch.utils.data._utils import pin_memory

from swift.utils import device

NAME = "Intel(R) Data Center GPU Max 1550"
MEMORY = 64 * 2**30
LATE = 8
"""Batches; the ring of a worker has five slots."""
NOBODYS = 0x5A


class RefusedCall(AssertionError):
    """swift has called something that Aurora has not."""


class SpoiltCopy(AssertionError):
    """The source of a copy has changed while the copy was under way."""


class _Torch:
    """torch as its DataLoader sees it on a node with an xpu."""

    accelerator = SimpleNamespace(
        is_available=lambda: True,
        current_accelerator=lambda check_available=False: torch.device("xpu"),
        current_device_index=lambda: 0,
        set_device_index=lambda index: None,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class FakeXpu:
    """Install with `FakeXpu(monkeypatch)`.

    Attributes:
        copies: Copies begun without waiting.
        waited: Copies that were waited for at once.
        pins: Tensors that were brought to page-locked memory.
        saves: Copies of states for checkpoints.
        asked: Names of what was asked of the device layer.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies = self.waited = self.pins = self.marks = 0
        self.asked: set[str] = set()
        self.saves: list[_HostCopy] = []
        self._page_locked: dict[int, weakref.ref[Tensor]] = {}
        self._under_way: list[tuple[int, Tensor, np.ndarray]] = []
        answers: dict[str, Callable[..., Any]] = {
            "kind_here": lambda: "xpu",
            "count": lambda: 1,
            "torch_device": lambda kind, index=0: torch.device("cpu"),
            "name": lambda index=0: NAME,
            "total_memory": lambda index=0: MEMORY,
            "has_bf16": lambda kind: kind == "xpu",
            "lacks_for_compile": lambda kind: "a compiler",
            "software": lambda: "oneAPI 2026",
            "on_host": lambda where: False,
            "synchronize": lambda where: self.finish(),
            "set_current": lambda where: None,
            "free_cache": lambda: None,
            "memory": lambda where: {"allocated": 1 << 30, "peak": 2 << 30, "reserved": 3 << 30},
            "busy": lambda where: 50.0,
            "profiled": lambda where: [torch.profiler.ProfilerActivity.CPU],
            "kept_random": lambda where: torch.random.fork_rng([]),
            "pinned": self._pinned,
            "is_pinned": self._is_pinned,
            "copied": self._copied,
            "mark": self._mark,
            "HostCopy": self._to_host,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(device, name, self._noted(name, answer))
        # torch's own DataLoader pins only where torch has an accelerator.
        for module in (dataloader, pin_memory):
            monkeypatch.setattr(module, "torch", _Torch())
        refuse(monkeypatch)

    def _noted(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def answered(*args: Any, **kwargs: Any) -> Any:
            self.asked.add(name)
            return answer(*args, **kwargs)

        return answered

    def _pinned(self, tensor: Tensor) -> Tensor:
        self.pins += 1
        memory = np.array(tensor.numpy())
        locked = torch.from_numpy(memory)
        self._page_locked[id(locked)] = weakref.ref(locked)
        weakref.finalize(locked, _use_again, memory)
        return locked

    def _is_pinned(self, tensor: Tensor) -> bool:
        known = self._page_locked.get(id(tensor))
        return known is not None and known() is tensor

    def _copied(self, tensor: Tensor, where: torch.device, wait: bool) -> Tensor:
        if wait:
            self.waited += 1
        else:
            self.copies += 1
            # The memory itself, which does not keep the tensor that it was made for alive.
            memory = np.asarray(memoryview(tensor.numpy()))
            self._under_way.append((self.marks, tensor.clone(), memory))
        return tensor.clone()

    def _mark(self, where: torch.device) -> Any:
        self.marks += 1
        return _Mark(self, self.marks)

    def _to_host(self, tensors: Mapping[str, Tensor], where: torch.device, buffers: dict[str, Tensor]) -> _HostCopy:
        self.saves.append(_HostCopy(tensors))
        return self.saves[-1]

    def finish(self, before: int | None = None) -> None:
        """End the copies begun before a mark, or all, and those of saves.

        Raises:
            SpoiltCopy: one whose source is not what it was.
        """
        ended = [one for one in self._under_way if before is None or one[0] < before]
        self._under_way = [one for one in self._under_way if not (before is None or one[0] < before)]
        for _, wanted, memory in ended:
            if not np.array_equal(wanted.numpy(), memory, equal_nan=wanted.is_floating_point()):
                raise SpoiltCopy(f"the source of a copy of {wanted.numel()} elements has changed before its end")
        for save in self.saves:
            save.end()


class _HostCopy:
    """A copy that ends when the device is told to wait for it, or when everything is waited for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._live = {name: tensor.detach() for name, tensor in tensors.items()}
        self.held = False

    def hold(self) -> None:
        self.end()
        self.held = True

    def wait(self) -> dict[str, Tensor]:
        return self.copies

    def end(self) -> None:
        for name, tensor in self._live.items():
            if not torch.equal(tensor, self.copies[name]):
                raise SpoiltCopy(f"{name} has changed before the end of its copy")
        self._live = {}


class _Mark:
    def __init__(self, fake: FakeXpu, number: int) -> None:
        self.fake, self.number = fake, number

    def query(self) -> bool:
        """Whether the device has come past it."""
        passed = self.fake.marks >= self.number + LATE
        if passed:
            self.fake.finish(self.number)
        return passed


def _use_again(memory: np.ndarray) -> None:
    memory.view(np.uint8).reshape(-1)[:] = NOBODYS


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every function of torch.cuda raise when swift calls it; libraries hear that there is no CUDA."""

    def refused(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller == "swift" or caller.startswith("swift."):
                raise RefusedCall(f"{caller} calls torch.cuda.{name}")
            if name in ("is_available", "device_count"):
                return 0
            return original(*args, **kwargs)

        return call

    for name, value in list(vars(torch.cuda).items()):
        if isinstance(value, FunctionType) and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, refused(name, value))
    for kind in (Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", refused(f"{kind.__name__}.cuda", kind.cuda))

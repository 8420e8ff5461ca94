"""Where the time of a step goes: waiting for data, computing, waiting for other ranks, the rest; perf/phase_*."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from swift.train.callbacks.throughput import Throughput
from swift.utils import device

WINDOW, FETCH = "swift::window", "swift::fetch"
"""What the profile calls a whole window, and the wait for a batch in it."""
NAMES = ("data", "compute", "communication", "other")
_COLLECTIVES = ("gloo:", "nccl", "rccl", "xccl", "oneccl")

Span = tuple[float, float]
"""Beginning and end, of one clock."""


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of spans, as disjoint spans in order."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif end > begin:
            joined.append((begin, end))
    return joined


def without(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """What is left of disjoint `spans` outside of disjoint `taken`, both in order."""
    left = []
    first = 0
    for begin, end in spans:
        while first < len(taken) and taken[first][1] <= begin:
            first += 1
        for start, stop in taken[first:]:
            if start >= end:
                break
            if start > begin:
                left.append((begin, start))
            begin = max(begin, stop)
        if begin < end:
            left.append((begin, end))
    return left


def total(spans: Iterable[Span]) -> float:
    """Length of disjoint spans."""
    return sum(end - begin for begin, end in spans)


def breakdown(events: Iterable[Any], on_device: bool) -> dict[str, float]:
    """Seconds of a profiled window by phase; they add up to the window.

    compute: an operator runs on the CPU, or a kernel other than a collective's on the device. communication: a
    collective is under way and nothing computes; it includes waiting for slower ranks. data: the loop waits for its
    batch (on a device: and neither of these goes on). other: the rest, such as Python between the operators.

    Args:
        events: Of `torch.profiler.profile.events()`, with spans called WINDOW and FETCH; microseconds.
        on_device: The model is on a device with a queue of its own, not on the CPU.
    """
    kinds: dict[str, list[Span]] = {"window": [], "fetch": [], "compute": [], "collective": []}
    for event in events:
        on_cpu = event.device_type == DeviceType.CPU
        span = (event.time_range.start, event.time_range.end)
        if event.name in (WINDOW, FETCH):
            # The device's list repeats the marks of the CPU's.
            kinds["window" if event.name == WINDOW else "fetch"] += [span] if on_cpu else []
        elif event.name.lower().startswith(_COLLECTIVES):
            # With a device the CPU only launches them.
            kinds["collective"] += [] if on_device and on_cpu else [span]
        elif event.name.startswith("aten::") if not on_device else not on_cpu and not event.is_user_annotation:
            kinds["compute"].append(span)
    [(begin, end)] = kinds["window"]
    inside = {name: merged((max(a, begin), min(b, end)) for a, b in spans) for name, spans in kinds.items()}
    compute, collective, fetch = inside["compute"], inside["collective"], inside["fetch"]
    if on_device:
        fetch = without(without(fetch, compute), collective)
    else:
        # Without workers the samples are made in here, by the same operators.
        compute = without(compute, fetch)
    exposed = without(without(collective, compute), fetch)
    found = {"data": total(fetch), "compute": total(compute), "communication": total(exposed)}
    found["other"] = end - begin - sum(found.values())
    return {name: value / 1e6 for name, value in found.items()}


class Phases(pl.Callback):
    """Profiles a few steps every so often, and logs which part of their time each phase took.

    perf/phase_data, _compute, _communication and _other (see `breakdown`) are parts of the time, 1 together, averaged
    over the ranks; perf/phase_straggler is the part by which the slowest rank's data and compute exceed the average:
    so much of the communication is waiting for it. The profile slows these steps down, Python more than kernels, so
    the parts lean towards "other" where operators are small; the rates of `Throughput` leave these steps out. A window
    goes from one wait for a batch to another; a validation in between begins it anew.

    Args:
        every: Optimizer steps between windows; 0: never.
        throughput: Comes before this callback; its timer knows when batches are fetched.
        steps: Optimizer steps of a window.
    """

    def __init__(self, every: int, throughput: Throughput, steps: int = 3) -> None:
        self.every, self.steps = every, steps
        self._throughput = throughput
        self._trainer: pl.Trainer | None = None
        self._profile: profile | None = None
        self._spans: list[AbstractContextManager[Any]] = []
        self._due = False
        self._first = self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to when batches are fetched."""
        self._trainer, self._step = trainer, trainer.global_step
        if self.every and self._throughput.timer is not None:
            self._throughput.timer.on_start, self._throughput.timer.on_stop = self._fetching, self._fetched

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """A window is due after every `every` steps."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._due |= bool(self.every) and self._step % self.every == 0 and self._profile is None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is no part of a step."""
        if self._profile is not None:
            self._due = not self._end_if_whole()
            self._close()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last window may just be whole."""
        if self._profile is not None:
            self._end_if_whole()
            self._close()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Drop what has begun."""
        self._close()

    def _fetching(self) -> None:
        if self._profile is not None:
            self._end_if_whole()
        if self._due:
            self._open()
        if self._profile is not None:
            self._enter(FETCH)

    def _fetched(self) -> None:
        if len(self._spans) > 1:
            self._spans.pop().__exit__(None, None, None)

    def _enter(self, name: str) -> None:
        self._spans.append(record_function(name))
        self._spans[-1].__enter__()

    @property
    def _device(self) -> torch.device:
        assert self._trainer is not None
        device: torch.device = self._trainer.strategy.root_device
        return device

    def _synchronize(self) -> None:
        device.synchronize(self._device)

    def _open(self) -> None:
        self._due = False
        self._throughput.pause()
        self._synchronize()
        # Otherwise the profiler reports every start and stop, and GPUs that are not there.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile = profile(activities=device.profiled(self._device))
        self._profile.start()
        self._first = self._step
        self._enter(WINDOW)

    def _close(self) -> None:
        """End the window, if there is one, and log nothing."""
        while self._spans:
            self._spans.pop().__exit__(None, None, None)
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            assert self._trainer is not None
            self._throughput.resume(self._trainer)

    def _end_if_whole(self) -> bool:
        """End and log the window if it has all its steps. All ranks do it after the same step."""
        if self._step - self._first < self.steps:
            return False
        measured = self._profile
        assert measured is not None
        assert self._trainer is not None
        self._synchronize()
        self._close()
        values = self._over_ranks(self._trainer, breakdown(measured.events() or (), not device.on_host(self._device)))
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=self._step)
        self._throughput.resume(self._trainer)
        return True

    def _over_ranks(self, trainer: pl.Trainer, seconds: dict[str, float]) -> dict[str, float]:
        """What is logged, from the seconds of this rank and of the others."""
        mean = torch.tensor([seconds[name] for name in NAMES], dtype=torch.float64, device=self._device)
        most = mean[0] + mean[1]
        if trainer.world_size > 1:
            torch.distributed.all_reduce(mean)
            mean /= trainer.world_size
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        whole = float(mean.sum())
        values = {f"perf/phase_{name}": float(value) / whole for name, value in zip(NAMES, mean)}
        return values | {"perf/phase_straggler": float(most - mean[0] - mean[1]) / whole}

"""What a run does to its machine: device memory and busy time, host memory and CPU, as mon/* in the loggers.

Read by the training process itself at the end of a step, every so many seconds: no thread that could hang. Lightning's
DeviceStatsMonitor reads at every batch, knows neither the workers' memory nor how busy a device is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import psutil
import torch

from swift.plan.file_system import MONITOR_SECONDS
from swift.utils import device

log = logging.getLogger(__name__)

GIB = 2**30


def device_values(here: torch.device, busy: Callable[[torch.device], float] | None) -> dict[str, float]:
    """Memory and busy time of a GPU."""
    bytes_of = device.memory(here)
    values = {
        "mon/device_memory_gib": bytes_of["allocated"] / GIB,
        "mon/device_peak_gib": bytes_of["peak"] / GIB,
        "mon/device_reserved_gib": bytes_of["reserved"] / GIB,
    }
    return values if busy is None else values | {"mon/device_busy": busy(here)}


class Host:
    """Memory and CPU of this process with its children (the data workers)."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before: tuple[float, float] | None = None

    def values(self, now: float) -> dict[str, float]:
        """At `now` seconds; CPU percent (100 is one core) since the call before, so the first call has none."""
        memory = seconds = 0.0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                times = process.cpu_times()
                memory += process.memory_info().rss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # a worker that ended meanwhile
            seconds += times.user + times.system
        values = {"mon/host_rss_gib": memory / GIB, "mon/host_used_percent": psutil.virtual_memory().percent}
        if self._before is not None and now > self._before[0]:
            # A worker that has ended takes its seconds along.
            values["mon/cpu_percent"] = 100 * max(0.0, seconds - self._before[1]) / (now - self._before[0])
        self._before = now, seconds
        return values


class Monitor(pl.Callback):
    """Logs the machine of rank 0 every `seconds`, at the end of a step; memory of worker processes counts as shared.

    Args:
        seconds: Between readings.
        clock: Gives monotonic seconds.
    """

    def __init__(self, seconds: float = MONITOR_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._last = -float("inf")
        self._host = Host()
        self._busy: Callable[[torch.device], float] | None = device.busy

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first reading comes `seconds` later, so that CPU time has an interval."""
        self._last = self._clock()
        self._host.values(self._last)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read and log if it is time."""
        now = self._clock()
        if not trainer.is_global_zero or now - self._last < self.seconds:
            return
        self._last = now
        values = self._host.values(now) | self._device(trainer.strategy.root_device)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _device(self, here: torch.device) -> dict[str, float]:
        if device.on_host(here):
            return {}
        try:
            return device_values(here, self._busy)
        except RuntimeError as error:
            if self._busy is None:
                raise
            log.info("device monitor: no busy time here (%s)", error)
            self._busy = None
            return device_values(here, None)

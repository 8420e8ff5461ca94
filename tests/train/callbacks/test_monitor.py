"""Monitor: when it reads, what it reads, and that a device which cannot tell is left alone."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from swift.train.callbacks.monitor import GIB, Host, Monitor
from swift.utils.device import amd_busy_file


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


class Logger:
    def __init__(self):
        self.lines = []

    def log_metrics(self, values, step):
        self.lines.append((step, values))


def fake_trainer(device="cpu", zero=True):
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(global_step=3, is_global_zero=zero, loggers=[Logger()], strategy=strategy)


def test_reads_every_so_many_seconds():
    clock, trainer = Clock(), fake_trainer()
    callback = Monitor(seconds=10, clock=clock)
    callback.on_train_start(trainer, None)
    for _ in range(25):
        clock.now += 1
        callback.on_train_batch_end(trainer, None, {}, {}, 0)
    lines = trainer.loggers[0].lines
    # Data workers of earlier tests may still be there.
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    resident = sum(one.memory_info().rss for one in family) / GIB
    assert [step for step, _ in lines] == [3, 3]
    for _, values in lines:
        assert set(values) == {"mon/host_rss_gib", "mon/host_used_percent", "mon/cpu_percent"}
        assert values["mon/host_rss_gib"] == pytest.approx(resident, rel=0.5)
        assert 0 < values["mon/host_used_percent"] <= 100
        assert values["mon/cpu_percent"] >= 0


def test_other_ranks_read_nothing():
    clock, trainer = Clock(), fake_trainer(zero=False)
    callback = Monitor(seconds=1, clock=clock)
    callback.on_train_start(trainer, None)
    clock.now += 5
    callback.on_train_batch_end(trainer, None, {}, {}, 0)
    assert trainer.loggers[0].lines == []


def test_cpu_is_seconds_of_work_over_seconds():
    host = Host()
    host.values(0.0)
    before = sum(psutil.Process().cpu_times()[:2])
    while sum(psutil.Process().cpu_times()[:2]) - before < 0.2:
        sum(range(10_000))
    # Two tenths of a second of work in what is called two seconds.
    assert host.values(2.0)["mon/cpu_percent"] == pytest.approx(10, abs=5)


def test_children_count():
    host = Host()
    alone = host.values(0.0)["mon/host_rss_gib"]
    hold = "held = bytearray(b'1' * 100_000_000); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
        assert host.values(1.0)["mon/host_rss_gib"] - alone > 0.08
    finally:
        child.communicate(b"\n")


def test_busy_time_is_given_up_where_nothing_can_tell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    asked = []

    def utilization(device):
        asked.append(device)
        raise ModuleNotFoundError("pynvml is not there")

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    callback = Monitor()
    memory = {"mon/device_memory_gib": 1.0, "mon/device_peak_gib": 2.0, "mon/device_reserved_gib": 3.0}
    device = torch.device("cuda", 0)
    assert callback._device(device) == callback._device(device) == memory
    assert len(asked) == 1
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 93)
    assert Monitor()._device(device) == memory | {"mon/device_busy": 93.0}


def test_amd_busy_time_comes_from_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    ids = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ids)
    folder = tmp_path / "0000:c1:00.0"
    folder.mkdir()
    assert amd_busy_file(torch.device("cuda", 0), tmp_path) is None
    (folder / "gpu_busy_percent").write_text("87\n")
    assert amd_busy_file(torch.device("cuda", 0), tmp_path).read_text() == "87\n"

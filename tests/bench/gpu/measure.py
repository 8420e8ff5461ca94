"""Time, memory, kernels and waits of a piece of work on a device, and what the card itself can do."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.bench.counting import Count, Operators

GIB = 2**30
DATASHEET = 989.4e12
"""bf16 FLOP/s of an H100 SXM without sparsity (NVIDIA's data sheet)."""


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    work: Callable[[], Any], device: torch.device, seconds: float = 0.6, warm: int = 2, fixed: int = 0
) -> float:
    """Wall time of one call, ms: the device is kept busy for some calls between two waits; the best of three rounds.

    `fixed` calls a round, or as many as take so many seconds.
    """
    for _ in range(warm):
        work()
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    once = time.perf_counter() - began
    calls = fixed or max(1, min(100, int(seconds / 3 / max(once, 1e-6))))
    best = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        best.append((time.perf_counter() - began) / calls)
    return 1000 * min(best)


def peak_gib(work: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory that tensors held during a call, GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / GIB


@dataclass(frozen=True)
class Kernels:
    """What ran on the device in one call.

    Attributes:
        count: Kernels, copies and fills.
        busy_ms: Sum of their times.
        by_name: Name -> (how many, ms), the longest first.
        waits: Calls in which the host waited for the device.
    """

    count: int
    busy_ms: float
    by_name: dict[str, tuple[int, float]]
    waits: int | None


def kernels(work: Callable[[], Any], device: torch.device) -> Kernels:
    """Profile one call: kernels of a GPU; on a CPU operators, as `tests.bench.counting` counts them."""
    gpu = device.type == "cuda"
    waits = count_waits(work) if gpu else None
    synchronize(device)
    if not gpu:
        return count_operators(work)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        synchronize(device)
    count: Counter[str] = Counter()
    times: Counter[str] = Counter()
    events: Any = found.events()
    for event in events:
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        if event.name.startswith(("Optimizer.", "ProfilerStep", "Torch-Compiled", "## Call")):
            continue
        count[event.name] += 1
        times[event.name] += event.device_time_total / 1000
    by_name = {name: (count[name], ms) for name, ms in times.most_common()}
    return Kernels(sum(count.values()), sum(times.values()), by_name, waits)


def count_operators(work: Callable[[], Any]) -> Kernels:
    """What `tests.bench.counting` counts of a piece of work on a CPU; its times are not known."""
    found = Count()
    with Operators(found, "cpu"):
        work()
    return Kernels(found.launches, 0.0, {name: (count, 0.0) for name, count in found.kernels.most_common()}, None)


def count_waits(work: Callable[[], Any]) -> int:
    """Calls of torch in which the host waits for the GPU (torch.cuda.set_sync_debug_mode)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def matrix_rate(device: torch.device, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a product of two random matrices size x size; the median of several."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [milliseconds(lambda: a @ b, device, seconds=0.3) for _ in range(3)]
    return 2 * size**3 / (statistics.median(times) / 1000)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes/s read and written by a copy of `size` bytes."""
    source = torch.empty(size // 2, device=device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source), device, seconds=0.3) / 1000)


def card(device: torch.device, small: bool) -> dict[str, Any]:
    """Device, versions, and rates measured here and now."""
    found: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "threads": torch.get_num_threads()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / GIB,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    size = 256 if small else 8192
    found["matrix_size"] = size
    found["matrix_tflops"] = matrix_rate(device, size) / 1e12
    found["copy_gb_s"] = copy_rate(device, (1 << 22) if small else (2 << 30)) / 1e9
    return found


def _driver() -> str | None:
    try:
        import subprocess

        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None

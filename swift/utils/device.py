"""The one place that knows devices: the CPU, cuda (NVIDIA, and AMD through ROCm) and xpu (Intel), by torch.accelerator.

Everything else asks here: what there is, what it is called, how to wait for it, which backend its collectives take.
Nothing of `swift` beside this file, the attention kernel and the GPU benchmarks calls `torch.cuda`.

`xpu` has never run on a real device: tests train a whole run on a stand-in for this file (tests/utils/fake_device.py).
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.utils.errors import UserError

KINDS = ("cpu", "cuda", "xpu")
"""As torch calls them; an AMD device is cuda too."""
CHOICES = ("auto", "gpu", *KINDS)
"""What a setting may name: auto: a GPU where torch sees one, else the CPU; gpu: whichever GPU there is."""
COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
"""Kind -> backend of torch.distributed; RCCL is called nccl, Intel's oneCCL xccl (torch 2.8 and later)."""


def kind_here() -> str:
    """The kind of the devices that torch sees now: cuda, xpu, or cpu where there is no GPU that swift knows."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None and found.type in KINDS else "cpu"


def count() -> int:
    """GPUs that torch sees."""
    return torch.accelerator.device_count() if kind_here() != "cpu" else 0


def torch_device(kind: str, index: int = 0) -> torch.device:
    """The device of a kind and number; the CPU has none."""
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, index)


def name(index: int = 0) -> str:
    """What torch calls a device; CPU where there is no GPU."""
    return str(_module().get_device_name(index)) if count() else "CPU"


def total_memory(index: int = 0) -> int:
    """Bytes of a device."""
    return int(_module().get_device_properties(index).total_memory)


def _module() -> Any:
    """torch.cuda or torch.xpu."""
    return torch.get_device_module(kind_here())


def seen() -> str:
    """What torch sees here, for messages: no GPU, or 4 x cuda (NVIDIA H100 80GB HBM3)."""
    return f"{count()} x {kind_here()} ({name()})" if count() else "no GPU"


def require(wanted: str, setting: str) -> str:
    """The kind that a setting means on this machine.

    Args:
        wanted: One of CHOICES.
        setting: Name of the setting, for the message.

    Raises:
        UserError: that device is not here.
    """
    here = kind_here()
    if wanted == "auto":
        return here
    if wanted == "cpu" or wanted == here or (wanted == "gpu" and here != "cpu"):
        return here if wanted == "gpu" else wanted
    raise UserError(
        f"{setting}={wanted}: torch sees {seen()} here; a driver that fails and a torch built for another device "
        f"look the same. {setting}=auto takes what there is"
    )


def of_local_rank(wanted: str, setting: str, local_rank: int) -> torch.device:
    """The device of a rank: by its number on the node, or the only one that its launcher lets it see.

    Raises:
        UserError: that device is not here, or there are several, but fewer than ranks. One may be each rank's own.
    """
    kind = require(wanted, setting)
    there = count()
    if kind != "cpu" and local_rank >= there > 1:
        raise UserError(f"local rank {local_rank}, but only {there} devices are visible")
    return torch_device(kind, local_rank if there > 1 else 0)


def has_bf16(kind: str) -> bool:
    """Whether devices of a kind compute in bf16 in hardware; of the CPU, which mostly has not, it is not asked."""
    return kind != "cpu" and bool(_module().is_bf16_supported(including_emulation=False))


def lacks_for_compile(kind: str) -> str | None:
    """What torch.compile does not find on this machine for devices of a kind, and how to get it; None: nothing.

    Inductor writes C++ for a CPU and Triton for a GPU, and Triton's launchers are C: both with Python's headers.
    """
    if kind == "cpu":
        setting, known, lack = "CXX", ("g++", "clang++"), "a C++ compiler on a CPU; install g++"
    else:
        try:
            from torch.utils._triton import has_triton
        except ImportError:  # not a public part of torch
            return "a torch in which Triton can be asked for"
        if not has_triton():
            return "Triton on a GPU, and none that knows this one is installed; install triton"
        setting, known, lack = "CC", ("gcc", "clang"), "a C compiler on a GPU; install gcc"
    if not os.environ.get(setting) and not any(map(shutil.which, known)):
        return lack
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers; install python3-dev"
    return None


def software() -> str | None:
    """What torch was built for: CUDA, ROCm or oneAPI with its version; None: the CPU."""
    for title, version in (("ROCm", torch.version.hip), ("CUDA", torch.version.cuda), ("oneAPI", torch.version.xpu)):
        if version:
            return f"{title} {version}"
    return None


def on_host(device: torch.device) -> bool:
    """Whether a device is the CPU: nothing to wait for, nothing to copy."""
    return device.type == "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if not on_host(device):
        torch.accelerator.synchronize(device)


def set_current(device: torch.device) -> None:
    """Make a device the one that this process uses where none is named."""
    if not on_host(device):
        torch.accelerator.set_device_index(device.index or 0)


def free_cache() -> None:
    """Give memory that no tensor holds back to the device."""
    if count():
        _module().empty_cache()


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of a GPU: allocated (by tensors), peak (the most that was), reserved (taken from the device)."""
    module = torch.get_device_module(device)
    return {
        "allocated": int(module.memory_allocated(device)),
        "peak": int(module.max_memory_allocated(device)),
        "reserved": int(module.memory_reserved(device)),
    }


def busy(device: torch.device) -> float:
    """Percent of the last moments in which a GPU ran anything (not how much of it was used: that is MFU).

    Raises:
        RuntimeError: nothing on this machine can tell (no NVML or ROCm SMI library, or it fails; torch asks no xpu).
    """
    path = amd_busy_file(device)
    if path is not None:
        return float(path.read_text())
    try:
        return float(torch.get_device_module(device).utilization(device))
    except (ImportError, AttributeError, OSError) as error:
        raise RuntimeError(str(error)) from error


def amd_busy_file(device: torch.device, root: Path = Path("/sys/bus/pci/devices")) -> Path | None:
    """The kernel's file with the busy percentage of an AMD device; None for others and where there is none."""
    if torch.version.hip is None:
        return None
    properties = torch.get_device_module(device).get_device_properties(device)
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in numbers:
        return None
    domain, bus, slot = numbers
    path = root / f"{domain:04x}:{bus:02x}:{slot:02x}.0" / "gpu_busy_percent"
    return path if path.is_file() else None


def profiled(device: torch.device) -> list[Any]:
    """What torch's profiler has to watch for a device."""
    found = torch.profiler.ProfilerActivity
    return [found.CPU] if on_host(device) else [found.CPU, getattr(found, device.type.upper())]


def kept_random(device: torch.device) -> Any:
    """A context after which random numbers, of the host and of a device, go on as if nothing had been drawn in it."""
    if on_host(device):
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device.index or 0], device_type=device.type)


def pins(device: torch.device) -> bool:
    """Whether batches for a device pass through page-locked memory, which a copy does not have to wait for."""
    return not on_host(device)


def pinned(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory."""
    return tensor.pin_memory()


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor lies in page-locked memory."""
    return tensor.is_pinned()


def copied(tensor: Tensor, device: torch.device, wait: bool) -> Tensor:
    """A copy of a tensor of the host on a device; without `wait` it may still be under way."""
    return tensor.to(device, non_blocking=not wait)


def mark(device: torch.device) -> Any:
    """Something whose `query()` is true as soon as a device has done all it was given so far."""
    event = torch.get_device_module(device).Event()
    event.record()
    return event


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor changed, a list of tensors with each of them changed; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [each(one, change) for one in value]
    return value


def pinned_like(tensor: Tensor) -> Tensor:
    """Page-locked memory of the host for a tensor of a device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class HostCopy:
    """A copy of tensors in memory of the host; of a device's, under way on a stream of its own while both work on.

    The device must not change what is copied before `hold` has been called: what it is given after that waits for the
    copy, what it was given before the copy began comes first. The copy may be read after `wait`.

    Args:
        tensors: By name.
        device: Where they are; some may be on the host already.
        buffers: Page-locked memory by name, kept by the caller from copy to copy; what lacks is added.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, buffers: dict[str, Tensor]) -> None:
        self.device = device
        self._end: Any = None
        if on_host(device):
            self.copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            return
        module = torch.get_device_module(device)
        stream = module.Stream(device)
        stream.wait_stream(module.current_stream(device))
        self.copies = {}
        with module.stream(stream):
            for name, tensor in tensors.items():
                source = tensor.detach()
                if on_host(source.device):  # offloaded; clone() is done when it returns
                    self.copies[name] = source.clone()
                    continue
                buffer = buffers.get(name)
                if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                    buffer = buffers[name] = pinned_like(source)
                buffer.copy_(source, non_blocking=True)
                # Else the allocator might hand its memory on, should it be freed before the copy has ended.
                source.record_stream(stream)
                self.copies[name] = buffer
            self._end = module.Event()
            self._end.record(stream)

    def hold(self) -> None:
        """Let all that the device is given from now on wait for the copy; the host does not wait."""
        if self._end is not None:
            torch.get_device_module(self.device).current_stream(self.device).wait_event(self._end)

    def wait(self) -> dict[str, Tensor]:
        """The copies, when they are complete."""
        if self._end is not None:
            self._end.synchronize()
        return self.copies


class Copies:
    """Copies of batches to a device, under way while the host works on.

    What is copied must neither change nor be freed before the copy has ended. So page-locked sources are held here
    until the device has passed them, whatever the allocator of a backend does; and other memory, such as a buffer of
    the ring that a worker may fill again at any time, is waited for.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[Any, list[Tensor]]] = deque()

    def __call__(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The batch with its tensors on a device; on the host as it is."""
        if on_host(device):
            return dict(batch)
        while self._held and self._held[0][0].query():
            self._held.popleft()
        sources: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            ahead = is_pinned(tensor)
            sources.extend([tensor] if ahead else [])
            return copied(tensor, device, wait=not ahead)

        moved = {field: each(value, copy) for field, value in batch.items()}
        if sources:
            self._held.append((mark(device), sources))
        return moved

"""Devices whose peak rates are known, with their sources, and the machines they stand in.

A device that is not here has no MFU: a peak is never guessed. Rates are dense (no sparsity), at the boost clock of the
vendor's data sheet. `fp32` is the rate of a float32 matrix product as training runs it, that is TF32 on NVIDIA
(`torch.set_float32_matmul_precision("high")`) and plain float32 elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from swift.config.compose import conf_dir
from swift.utils.errors import UserError

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Device:
    """One device as torch sees it (a GCD of an MI250X, a tile of a Max 1550)."""

    name: str
    bf16: float
    """FLOP/s."""
    fp32: float
    """FLOP/s."""
    memory: float
    """Bytes that torch can reach."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to the next device of the node, one way."""
    torch_name: str
    """Regular expression that the whole of torch's name of it matches."""

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in bf16 or 32."""
        return {"bf16": self.bf16, "32": self.fp32}[precision]


DEVICES = {
    # AMD's MI250X data sheet gives the card 383.0 TFLOP/s bf16, 95.7 fp32 matrix, 128 GB at 3.28 TB/s; a GCD is half.
    # Infinity Fabric between cards 50 GB/s a link and way (OLCF, Frontier user guide). A name that says MI250 too
    # (90.5 instead of 95.7) is not taken.
    "mi250x_gcd": Device(
        "AMD MI250X (one GCD)", 191.5 * TERA, 47.9 * TERA, 63.9 * GIB, 1638 * GIGA, 50 * GIGA, r"AMD Instinct MI250X"
    ),
    # AMD's MI300X data sheet: 1307.4 TFLOP/s bf16, 163.4 fp32, 192 GB at 5.3 TB/s, 64 GB/s a fabric link and way.
    "mi300x": Device(
        "AMD MI300X", 1307.4 * TERA, 163.4 * TERA, 191.9 * GIB, 5300 * GIGA, 64 * GIGA, r"AMD Instinct MI300X"
    ),
    # NVIDIA's A100 data sheet: 312 TFLOP/s bf16, 156 TF32, 1555 and 2039 GB/s (SXM), NVLink 600 GB/s both ways.
    "a100_40": Device(
        "NVIDIA A100 40 GB", 312 * TERA, 156 * TERA, 39.4 * GIB, 1555 * GIGA, 300 * GIGA, r"(NVIDIA )?A100-SXM4-40GB"
    ),
    "a100_80": Device(
        "NVIDIA A100 80 GB", 312 * TERA, 156 * TERA, 79.1 * GIB, 2039 * GIGA, 300 * GIGA, r"(NVIDIA )?A100-SXM4-80GB"
    ),
    # NVIDIA's H100 data sheet, without sparsity: SXM 989.4 TFLOP/s bf16, 494.7 TF32, 3.35 TB/s, NVLink 900 GB/s; PCIe
    # 756, 378, 2.0 TB/s, and PCIe 5 (64 GB/s a way) where no bridge joins two cards.
    "h100_sxm": Device(
        "NVIDIA H100 SXM", 989.4 * TERA, 494.7 * TERA, 79.1 * GIB, 3350 * GIGA, 450 * GIGA, r"NVIDIA H100 80GB HBM3"
    ),
    "h100_pcie": Device(
        "NVIDIA H100 PCIe", 756 * TERA, 378 * TERA, 79.1 * GIB, 2000 * GIGA, 64 * GIGA, r"NVIDIA H100 PCIe"
    ),
    # NVIDIA's H200 data sheet: the arithmetic of the H100 SXM, 141 GB at 4.8 TB/s.
    "h200": Device("NVIDIA H200", 989.4 * TERA, 494.7 * TERA, 139.7 * GIB, 4800 * GIGA, 450 * GIGA, r"NVIDIA H200"),
    # Intel's technical overview of the Max series: 4096 bf16 operations a clock and Xe core, 64 cores a tile, 1.6 GHz;
    # vector fp32 256 a clock and core; 64 GB at 1.64 TB/s a tile. Xe Link between tiles of different cards 15 GB/s a
    # way for one pair (ALCF). ALCF measures 273 TFLOP/s in bf16 products: a third less than this peak.
    "max1550_tile": Device(
        "Intel Max 1550 (one tile)",
        419.4 * TERA,
        26.2 * TERA,
        63.9 * GIB,
        1638 * GIGA,
        15 * GIGA,
        r"Intel\(R\) Data Center GPU Max 1550",
    ),
}


def recognise(torch_name: str, memory: int | None = None) -> Device | None:
    """The device that torch calls `torch_name`, or None.

    Args:
        torch_name: Of `swift.utils.device.name`.
        memory: Its bytes as torch reports them, if known. A part of a device (MIG) or a pair of tiles taken as one has
            the name of the whole; sizes more than a tenth apart are another device.
    """
    for device in DEVICES.values():
        if re.fullmatch(device.torch_name, torch_name.strip()):
            return device if memory is None or abs(memory / device.memory - 1) < 0.1 else None
    return None


@dataclass(frozen=True)
class Site:
    """A machine. Fractions and the latency are assumptions: measured rates differ with the software of the day."""

    name: str
    device: Device | None
    """None: a CPU, or a device whose peak is not known."""
    device_name: str
    devices_per_node: int
    device_memory: float
    """Bytes."""
    link: float
    """Bytes/s between devices of a node, one way."""
    node_link: float
    """Bytes/s of all network cards of a node together, one way."""
    host_memory: float
    """Bytes of a node."""
    host_link: float
    """Bytes/s between a device and its host, one way."""
    matmul_fraction: float
    """Part of the peak that large matrix products reach."""
    bandwidth_fraction: float
    """Part of the memory bandwidth that elementwise operations reach."""
    link_fraction: float
    """Part of a link that collectives reach."""
    latency: float
    """Seconds a doubling of ranks adds to a collective."""
    usable_memory: float
    """Part of the device's memory for the training; the rest is for the runtime, communication, fragmentation."""
    filesystem: float | None = None
    """Bytes/s of the file system that all nodes share; None: not known."""
    failure_hours: float | None = None
    """Hours between two failures of a run, times its devices; None: not known."""
    restart: float = 120.0
    """Seconds from a failure to training again."""


def site_names() -> list[str]:
    """Machines that can be named with site=."""
    return sorted([*(path.stem for path in (conf_dir() / "sites").glob("*.yaml")), "local"])


def load_site(name: str) -> Site:
    """A machine of conf/sites/NAME.yaml, or `local`: this one.

    Raises:
        UserError: no such site, or a file that lacks a value or names an unknown device.
    """
    if name == "local":
        return _local()
    path = conf_dir() / "sites" / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not path.is_file():
        raise UserError(f"site={name}: no such machine; known are {', '.join(site_names())} (conf/sites/*.yaml)")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return site_from(name, values, path)


def site_from(name: str, values: dict[str, object], path: Path) -> Site:
    """A machine from the values of its file: rates in GB/s, memory in GB, latency in microseconds.

    Raises:
        UserError: a value is missing, unknown or not a number above 0, or the device is not in the table.
    """
    optional = {"filesystem_gb_s": GIGA, "failure_hours": 1.0, "restart_s": 1.0}
    numbers = {
        "devices_per_node": 1.0,
        "link_gb_s": GIGA,
        "node_link_gb_s": GIGA,
        "host_memory_gb": GIGA,
        "host_link_gb_s": GIGA,
        "matmul_fraction": 1.0,
        "bandwidth_fraction": 1.0,
        "link_fraction": 1.0,
        "latency_us": 1e-6,
        "usable_memory": 1.0,
    }
    missing = ({"device"} | numbers.keys()) ^ (values.keys() - optional.keys())
    if missing:
        raise UserError(
            f"{path}: must hold exactly device, {', '.join(numbers)}, and may hold {', '.join(optional)}; check "
            f"{', '.join(sorted(missing))}"
        )
    numbers |= {key: scale for key, scale in optional.items() if key in values}
    if values["device"] not in DEVICES:
        raise UserError(f"{path}: device={values['device']}: known are {', '.join(DEVICES)}")
    scaled: dict[str, float] = {}
    for key, scale in numbers.items():
        value = values[key]
        fraction = key.endswith("_fraction") or key == "usable_memory"
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= (1 if fraction else 1e9):
            raise UserError(f"{path}: {key}={value}: must be a number above 0" + (" and at most 1" if fraction else ""))
        scaled[re.sub(r"_(gb_s|gb|us|s)$", "", key)] = value * scale
    device = DEVICES[str(values["device"])]
    devices = int(scaled.pop("devices_per_node"))
    return Site(name, device, device.name, devices, device.memory, **scaled)


def _local() -> Site:
    """The machine we run on: its first accelerator, or its CPU. Links and fractions are assumptions."""
    import psutil

    from swift.utils import device as here

    host = float(psutil.virtual_memory().total)
    shared = {
        "host_memory": host,
        "node_link": 25 * GIGA,
        "host_link": 25 * GIGA,
        "matmul_fraction": 0.55,
        "bandwidth_fraction": 0.7,
        "link_fraction": 0.7,
        "latency": 20e-6,
        "usable_memory": 0.92,
    }
    if here.count():
        name, memory = here.name(), here.total_memory()
        device = recognise(name, memory)
        link = device.link if device else 25 * GIGA
        return Site("local", device, name, here.count(), float(memory), link=link, **shared)
    return Site("local", None, "CPU", 1, host, link=25 * GIGA, **shared)

"""What a run or a bug report says of the machine: versions of packages, processor and devices."""

from __future__ import annotations

import os
import platform
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTION = "swift-fmri"
MISSING = "not installed"


def packages() -> dict[str, str]:
    """Versions of swift and of everything it depends on; "not installed" where a package is missing.

    Run from a bare source tree, swift's own list is not at hand: then the versions of what is imported.
    """
    try:
        required = [line for line in metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
        names = [DISTRIBUTION, *(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in required)]
    except metadata.PackageNotFoundError:
        loaded = {module.partition(".")[0] for module in sys.modules}
        by_module = metadata.packages_distributions()
        names = sorted({name for module in loaded for name in by_module.get(module, [])})
    return {name: _version(name) for name in names}


@cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def host() -> dict[str, Any]:
    """Kind of machine, without its name.

    Returns:
        "system", "cpu" (model), "cores" (this process may use), "gpus" (names), "accelerator" (CUDA, ROCm or oneAPI
        version torch was built for, or None), "slurm_job" (id or None).
    """
    # torch may be what is broken: packages can be listed without it.
    from swift.utils import device

    gpus = [device.name(index) for index in range(device.count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": cores,
        "gpus": gpus,
        "accelerator": device.software(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()

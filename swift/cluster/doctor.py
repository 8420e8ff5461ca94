"""`swift-fmri doctor [STORE]`: what a bug report needs, and whether this machine is fit to train."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from swift.cluster.health import multiply, pick_device
from swift.utils.entry import reported
from swift.utils.errors import UserError
from swift.utils.git import git_state
from swift.utils.machine import DISTRIBUTION, MISSING, host, packages

SECONDS = 2.0
"""That the matrix product is timed."""
SIDE = 1024
LOW_GB = 10.0
"""Free disk below this is a warning: a run keeps checkpoints."""


def version() -> str:
    """Version of swift-fmri with the revision of the code, where it is known."""
    try:
        number = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        number = MISSING
    state = git_state(Path(__file__).resolve().parents[1])
    known = state["dirty"] is not None
    return number + (f" ({str(state['revision'])[:10]}{', changed' if state['dirty'] else ''})" if known else "")


def threads() -> dict[str, Any]:
    """Threads of torch and of the BLAS libraries, and the variables that set them."""
    import torch
    from threadpoolctl import threadpool_info

    pools = {f"{pool['internal_api']} ({pool['user_api']})": pool["num_threads"] for pool in threadpool_info()}
    names = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name in os.environ]
    return {"torch": torch.get_num_threads(), **pools, **{name: os.environ[name] for name in names}}


def product(seconds: float = SECONDS) -> dict[str, float]:
    """A matrix product of the device: right, and how fast.

    Raises:
        UserError: it gives wrong numbers.
    """
    import torch

    try:
        where = pick_device("gpu", 0)
    except UserError:
        where = torch.device("cpu")
    multiply(where)
    a = torch.ones(SIDE, SIDE, device=where)
    torch.mm(a, a)[0, 0].item()
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        torch.mm(a, a)[0, 0].item()  # waits for the device
        count += 1
    return {"gflops": round(2 * SIDE**3 * count / passed / 1e9, 1), "seconds": round(passed, 2)}


def disk(folder: Path) -> dict[str, Any]:
    """Free space, and whether the folder can be written."""
    free = shutil.disk_usage(folder).free / 1e9
    return {"folder": str(folder), "free_gb": round(free, 1), "writable": os.access(folder, os.W_OK)}


def store(path: Path) -> dict[str, Any]:
    """Read one frame of the first scan of every shard, with its checksum.

    Raises:
        UserError: no store, or damaged.
    """
    from swift.data.store.reader import Store

    opened, seen = Store(path), set()
    for place, scan in enumerate(opened.scans):
        if scan.shard not in seen:
            seen.add(scan.shard)
            opened.read(place, 0, 1, verify=True)
    return {"store": str(path), "scans": len(opened.scans), "shards_read": len(seen)}


def examined(path: Path | None) -> tuple[dict[str, Any], list[str]]:
    """All findings, and what is wrong among them."""
    parts: dict[str, Callable[[], Any]] = {
        "swift": version,
        "python": platform.python_version,
        "packages": packages,
        "machine": host,
        "threads": threads,
        "product": product,
        "disk": lambda: disk(Path.cwd()),
    }
    if path is not None:
        parts["store"] = lambda: store(path)
    found: dict[str, Any] = {}
    wrong = []
    for name, look in parts.items():
        try:
            found[name] = look()
        except Exception as error:  # a broken installation is what is looked for: name it and go on
            found[name] = None
            wrong.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
    wrong += [f"{name} is not installed" for name, number in (found["packages"] or {}).items() if number == MISSING]
    space = found["disk"]
    if space and not space["writable"]:
        wrong.append(f"{space['folder']} cannot be written: runs go to runs/ below it, or to run_dir=")
    if space and space["free_gb"] < LOW_GB:
        wrong.append(f"{space['free_gb']} GB free in {space['folder']}: checkpoints need more")
    return found, wrong


def lines(found: dict[str, Any], wrong: list[str]) -> list[str]:
    """The findings as text, a line each."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {one}" for name, one in value.items() if one != "")
        return "?" if value is None else str(value)

    said = [f"{name:<9} {text(value)}" for name, value in found.items()]
    return [*said, *(f"wrong: {one}" for one in wrong), "" if wrong else "all is well"]


def main(arguments: list[str] | None = None) -> None:
    """The command line; status 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="swift-fmri doctor", description=__doc__)
    parser.add_argument("store", type=Path, nargs="?", help="also read a frame of every shard of this store")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    wrong: list[str] = []

    def work() -> None:
        found, bad = examined(options.store)
        wrong.extend(bad)
        print(json.dumps(found | {"wrong": bad}, indent=2) if options.json else "\n".join(lines(found, bad)).rstrip())

    reported(work)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

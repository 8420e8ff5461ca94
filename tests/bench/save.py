"""How long a save stops training: `python -m tests.bench.save [--parameters N] [--saves K] [--folder DIR] [--json]`.

One rank holds N fp32 weights and two moments of each (12 bytes a parameter, in tensors of at most 4M elements), and
saves them K times as training does, in the background and not: the median seconds until training goes on, and those
until the checkpoint is on the disk. Between two background saves it waits until the one before is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from swift.parallel.checkpoint.files import WEIGHT, Manifest, Piece
from swift.parallel.checkpoint.pieces import MOMENTS
from swift.parallel.checkpoint.saver import Saver

LARGEST = 4_000_000


def pieces(parameters: int) -> list[Piece]:
    """Weights and moments of so many parameters."""
    sizes = [LARGEST] * (parameters // LARGEST) + [parameters % LARGEST] * (parameters % LARGEST > 0)
    return [
        Piece(f"p{place}", (size,), 0, {kind: torch.rand(size) for kind in (WEIGHT, *MOMENTS)})
        for place, size in enumerate(sizes)
    ]


def time_saves(folder: Path, held: list[Piece], saves: int, background: bool) -> dict[str, float]:
    """Median seconds of a save until training goes on, and until it is on the disk."""
    saver = Saver(0, 1, 1, background, timeout=600)
    stalls, whole = [], []
    for step in range(saves):
        draft = Manifest(step, None, {}, {piece.name: list(piece.shape) for piece in held}, {}, {}, 1, step)
        began = time.monotonic()
        saver.save(folder, held, draft)
        stalls.append(time.monotonic() - began)
        saver.finish()
        whole.append(time.monotonic() - began)
    return {"stall_seconds": statistics.median(stalls), "on_disk_seconds": statistics.median(whole)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.save", description=__doc__)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=50_000_000)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    held = pieces(options.parameters)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = {
            name: time_saves(Path(folder) / name, held, options.saves, name == "background")
            for name in ("synchronous", "background")
        }
    size = 12 * options.parameters / 1e9
    if options.json:
        print(json.dumps({"parameters": options.parameters, "gigabytes": size, "saves": options.saves, **found}))
        return
    print(f"{size:.2f} GB, median of {options.saves} saves: seconds training stands still, seconds until on the disk")
    for name, times in found.items():
        print(f"  {name:<12}{times['stall_seconds']:8.3f}{times['on_disk_seconds']:8.3f}")


if __name__ == "__main__":
    main()

"""A store of random scans for the parts that read from one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from swift.data.store.reader import ScanHeader, StoreWriter
from tests.bench.data import brain


def random_store(folder: Path, grid: tuple[int, int, int], spacing: float, scans: int, frames: int) -> Path:
    """Scans of noise in an ellipsoid of a quarter of the grid; made once."""
    if folder.exists():
        return folder
    with StoreWriter(folder, grid, spacing) as writer:
        for number in range(scans):
            rng = np.random.default_rng(number)
            mask = brain(grid, number)
            bold = 1000 + 20 * rng.standard_normal((frames, int(mask.sum())), dtype=np.float32)
            writer.add(ScanHeader(f"sub-{number:03d}", f"{number:03d}", 0.72, np.eye(4)), mask, bold)
    return folder

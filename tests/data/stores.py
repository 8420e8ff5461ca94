"""Small stores for the tests of swift.data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from swift.config.schema_data import AugmentConfig
from swift.data.store.format import encode_json
from swift.data.store.reader import ScanHeader, StoreWriter

GRID = (5, 6, 7)
PLAIN: dict[str, Any] = {
    "mixture": [],
    "max_subjects": None,
    "max_frames": None,
    "budget_seed": 0,
    "augment": AugmentConfig(0.0, 0.0, 5.0, 4.0, 0.05, 0.0, 0.1, 0.1, 0.0, 0.1),
    "repeat_batch": False,
    "stage_dir": None,
    "revision": 2,
}
"""Settings of DataConfig that most tests do not need."""


def scan(number: int, frames: int = 24, grid: tuple[int, int, int] = GRID) -> tuple[ScanHeader, np.ndarray, np.ndarray]:
    """A scan that its number alone decides; voxel 1 is constant."""
    rng = np.random.default_rng(number)
    mask = rng.random(grid) > 0.4
    voxels = int(mask.sum())
    bold = 900 + 60 * rng.normal(size=voxels) + 12 * rng.normal(size=(frames, voxels)) * (0.1 + rng.random(voxels))
    bold[:, 1] = 77.25
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-5.0, -6.0, number]
    header = ScanHeader(
        f"sub-{number:02d}_task-rest",
        f"{number:02d}",
        0.72,
        affine,
        task="rest",
        site="AB"[number % 2],
        source=f"sub-{number:02d}.nii.gz",
        notes=["TR taken from the sidecar", "µ"],
        phenotypes={"age": str(20 + number), "sex": "MF"[number % 2]},
    )
    return header, mask, bold.astype(np.float32)


def build(path: Path, numbers: list[int], frames: list[int] | None = None, shard_bytes: int = 14_000) -> Path:
    """A store of these scans, a few in each shard."""
    with StoreWriter(path, GRID, 2.0, shard_bytes) as writer:
        for place, number in enumerate(numbers):
            writer.add(*scan(number, frames[place] if frames else 24))
    return path


def content(path: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def forget_sizes(path: Path) -> None:
    """Make store.json agree with the sizes that the shards have now."""
    description = json.loads((path / "store.json").read_text())
    for name, entry in description["shards"].items():
        entry["bytes"] = (path / "shards" / name).stat().st_size
    (path / "store.json").write_bytes(encode_json(description))

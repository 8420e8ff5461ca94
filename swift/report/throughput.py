"""Step time and memory of masked pre-training by size, variant and clip length, measured here, beside the plan.

Reads POINT/throughput.json, which a study of kind throughput makes (`swift.study.throughput`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swift.utils.errors import UserError

FILE = "throughput.json"
KEPT = ("point", "device", "model", "variant", "frames", "batch", "parameters")
"""Columns that a point says itself."""


def load(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Measured points of folders, each with its name under "point".

    Raises:
        UserError: a folder without one, or a damaged file.
    """
    files: list[Path] = []
    for folder in folders:
        found = [folder / FILE] if (folder / FILE).is_file() else sorted(folder.glob(f"*/{FILE}"))
        if not found:
            raise UserError(
                f"{folder}: no {FILE} in it; python -m swift.study experiments/throughput/laptop.yaml makes it"
            )
        files += found
    points = []
    for file in files:
        try:
            point = json.loads(file.read_text(encoding="utf-8"))
            assert point["step_seconds"]
            assert point["plan"]["bytes"] > 0
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{file}: damaged ({error})") from error
        points.append(point | {"point": file.parent.name})
    return points


def rows(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every point: the median of the rounds, the fastest and the slowest."""
    found = []
    for point in points:
        step, work = float(np.median(point["step_seconds"])), point["flops_per_clip"] * point["batch"]
        row = {name: point[name] for name in KEPT} | {
            "gflop_a_clip": point["flops_per_clip"] / 1e9,
            "step_s": step,
            "step_low_s": float(min(point["step_seconds"])),
            "step_high_s": float(max(point["step_seconds"])),
            "planned_step_s": point["plan"]["step_seconds"],
            "forward_s": float(np.median(point["forward_seconds"])),
            "gflop_a_s": work / step / 1e9,
            "peak_mib": point["peak_bytes"] / 2**20,
            "planned_mib": point["plan"]["bytes"] / 2**20,
        }
        found.append(row)
    return sorted(found, key=lambda row: (row["variant"], row["frames"], row["parameters"]))


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'variant':<11} {'model':<7} {'frames':>6} {'parameters':>12} {'GFLOP/clip':>11} {'step, s':>9} "
        f"{'planned':>9} {'GFLOP/s':>8} {'peak MiB':>9} {'planned':>8}"
    ]
    for row in found:
        planned = "-" if row["planned_step_s"] is None else f"{row['planned_step_s']:.3f}"
        lines.append(
            f"{row['variant']:<11} {row['model']:<7} {row['frames']:>6} {row['parameters']:>12,} "
            f"{row['gflop_a_clip']:>11.2f} {row['step_s']:>9.3f} {planned:>9} {row['gflop_a_s']:>8.1f} "
            f"{row['peak_mib']:>9.0f} {row['planned_mib']:>8.0f}"
        )
    devices = sorted({row["device"] for row in found})
    lines.append(f"device: {', '.join(devices)}")
    if any(row["planned_step_s"] is None for row in found):
        lines.append("planned step time: - where the device's peak is not known (a CPU); none is guessed")
    return "\n".join(lines)

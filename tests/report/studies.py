"""Run directories with planted numbers, for the figures of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from swift.report import __main__ as report


def write_point(
    path: Path,
    parameters: int = 1000,
    steps: int = 40,
    loss: float = 0.5,
    max_steps: int | None = None,
    restarts: tuple[int, ...] = (),
    batch: int = 4,
    tokens: int = 100,
    flops: float = 6e8,
    settings: dict[str, dict[str, Any]] | None = None,
    summary: dict[str, Any] | None = None,
    metrics: bool = True,
) -> Path:
    """A run of `steps` steps on two ranks; unfinished where `max_steps` is more."""
    path.mkdir(parents=True)
    wanted = steps if max_steps is None else max_steps
    seconds = 0.25
    speed = {
        "perf/step_seconds": seconds,
        "perf/clips_per_second": 2 * batch / seconds,
        "perf/tokens_per_second": 2 * batch / seconds * tokens,
        "perf/tflops": batch / seconds * flops / 1e12,
        "perf/data_wait": 0.1,
    }
    records: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        records.append({"step": step, "train/loss": loss + 5 / step})
        if metrics:
            records.append({"step": step, **speed})
        records.append({"step": step, "val/l1": loss + 4 / step if step < steps else loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    frozen: dict[str, dict[str, Any]] = {
        "model": {"name": f"m{parameters}", "patch_size": [6, 6, 6, 1], "variant": "factorized", "position": "rope"},
        "data": {"grid": [12, 12, 12], "frames": 8, "batch_size": batch, "normalization": "zscore_voxel"},
        "task": {"name": "pretrain", "mask_ratio": 0.5, "mask_kind": "random", "loss": "l1"},
        "trainer": {"max_steps": wanted, "accumulate": 1},
        "parallel": {"name": "ddp", "nodes": 1, "devices": 2},
    }
    for group, values in (settings or {}).items():
        frozen[group] = frozen[group] | values
    (path / "config.yaml").write_text(yaml.safe_dump(frozen))
    if steps >= wanted:
        content = {"model": frozen["model"]["name"], "parameters": parameters, "steps": steps, "val_l1": loss}
        content["baselines"] = {"brain mean": 0.8, "linear interpolation": 0.6}
        (path / "summary.json").write_text(json.dumps(content | (summary or {})))
    provenance = {"started": "2026-01-01T00:00:00+00:00", "git": {}, "packages": {}, "restarts": []}
    provenance["restarts"] = [{"time": "2026-01-01T01:00:00+00:00", "step": step, "changed": {}} for step in restarts]
    (path / "provenance.json").write_text(json.dumps(provenance))
    return path


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str, *command: object) -> None:
    """`python -m swift.report` refuses with status 2 and one line that holds the message."""
    assert report.main([str(word) for word in command]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1

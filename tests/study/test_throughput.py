"""Measuring a point of a throughput study: the model of the settings, and what the plan says of it."""

from __future__ import annotations

from swift.plan.flops import model_flops
from swift.plan.geometry import build_geometry
from swift.study.throughput import measure
from tests.small import settings


def test_measuring_runs_the_model_of_the_settings():
    cfg = settings("trainer.accelerator=cpu", "data.batch_size=2")
    found = measure(cfg, rounds=2)
    geometry = build_geometry(cfg.model, (12, 12, 12, 8))
    assert found["flops_per_clip"] == model_flops(geometry).total
    assert found["parameters"] == geometry.total_parameters
    assert len(found["step_seconds"]) == 2
    assert min(found["step_seconds"]) > 0
    assert (found["device"], found["batch"], found["frames"]) == ("CPU", 2, 8)
    assert found["plan"]["bytes"] > 16 * geometry.total_parameters

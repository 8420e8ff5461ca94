"""Measuring a point of a throughput study: the model of the settings, and what the plan says of it."""

from __future__ import annotations

import pytest
import torch

from swift.plan.flops import model_flops
from swift.plan.geometry import build_geometry
from swift.study.throughput import measure
from swift.utils.errors import UserError
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


def test_a_step_is_that_of_the_settings(monkeypatch):
    """Recomputed blocks, clipped gradients, the optimizer's own groups."""
    norms, forwards = [], []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norms.append(given[1]) or clip(*given))
    layer_norm = torch.nn.functional.layer_norm
    monkeypatch.setattr(
        torch.nn.functional, "layer_norm", lambda *given, **named: forwards.append(1) or layer_norm(*given, **named)
    )
    cfg = ["trainer.accelerator=cpu", "data.batch_size=1", "trainer.clip_norm=0.5", "optimizer=adamw_mup"]
    cfg += ["optimizer.base_width=6"]
    counts = {}
    for how in ("none", "block"):
        forwards.clear()
        measure(settings(*cfg, f"parallel.activation_checkpointing={how}"), rounds=1)
        counts[how] = len(forwards)
    assert norms == [0.5] * 6
    assert counts["block"] > counts["none"]


def test_a_strategy_of_several_devices_is_refused():
    with pytest.raises(UserError, match=r"^parallel=ddp: .* one device: parallel=single$"):
        measure(settings("parallel=ddp", "trainer.accelerator=cpu"), rounds=1)

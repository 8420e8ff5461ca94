"""Heads and the ladder of adaptation: closed forms, what trains, what stays still."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from swift.config.schema import Config
from swift.models.adapt import depth_rates, is_lora, plain_name
from swift.models.heads import TargetModel
from swift.models.pooling import brain_tokens
from swift.train.finetune import FinetuneModule
from swift.train.optim import build_optimizer
from tests.small import GRID, settings

RUNGS = ("linear", "attentive", "last_block", "lora", "full")
Overrides = list[str]


def task(adapt: str = "scratch", *overrides: str, name: str = "synthetic_binary") -> Config:
    init = [] if adapt == "scratch" else ["init=somewhere"]
    return settings(f"task={name}", f"task.adapt={adapt}", *init, *overrides)


def model_of(cfg: Config) -> Any:
    torch.set_num_threads(1)
    return FinetuneModule(cfg).model


def clip(batch: int = 2, frames: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    brain = torch.zeros(batch, *GRID, dtype=torch.bool)
    brain[:, 2:9, 1:8, 3:11] = True
    brain[0, :8] = False
    return torch.randn(batch, 1, *GRID, frames, generator=generator), brain


# --- the head -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
@pytest.mark.parametrize("name", ["synthetic_binary", "synthetic_frame"])
def test_a_mean_over_the_brain_then_one_linear_map(name: str, pooling: str) -> None:
    cfg = task("scratch", f"task.pooling={pooling}", name=name)
    model = model_of(cfg).double().eval()
    x, brain = clip()
    x = x.double()
    features = model.encoder(x)[-1].detach().numpy()
    seen = brain_tokens(brain, cfg.model.patch_size, 1).numpy()
    assert 0 < seen.sum() < seen.size
    head = {name: value.detach().numpy() for name, value in model.head.state_dict().items()}
    out = model(x, brain).detach().numpy()
    for row in range(2):
        tokens = features[row][seen[row]]  # (n, t, C)
        parts = [tokens] if name == "synthetic_binary" else [tokens[:, step : step + 1] for step in range(4)]
        found = []
        for part in parts:
            flat = part.reshape(-1, part.shape[-1])
            v = flat.mean(0)
            if pooling == "mean_std":
                v = np.concatenate([v, np.sqrt(flat.var(0) + 1e-6)])
            v = (v - v.mean()) / np.sqrt(v.var() + 1e-5) * head["norm.weight"] + head["norm.bias"]
            found.append(head["linear.weight"] @ v + head["linear.bias"])
        # Two frames a patch: each of its frames has an output of its own.
        wanted = found[0] if name == "synthetic_binary" else np.concatenate(found)[:, None]
        np.testing.assert_allclose(out[row], wanted, rtol=1e-6, atol=1e-7)


def test_attention_pooling_looks_at_the_brain_only() -> None:
    for name in ("synthetic_binary", "synthetic_frame"):
        model = model_of(task("attentive", name=name)).eval()
        x, brain = clip()
        features = model.encoder(x)[-1].detach()
        seen = brain_tokens(brain, (4, 4, 4, 2), 1)
        changed = torch.where(seen[..., None, None], features, 100 * torch.randn_like(features))
        torch.testing.assert_close(model.head(changed, brain, 8), model.head(features, brain, 8))
        other = features * torch.linspace(0.5, 2, features.shape[-1])
        assert not torch.allclose(model.head(other, brain, 8), model.head(features, brain, 8))


def test_a_clip_without_brain_gives_finite_rubbish_and_short_clips_fewer_frames() -> None:
    for adapt in ("scratch", "attentive"):
        model = model_of(task(adapt, "data.frames=7", name="synthetic_frame")).eval()
        x, brain = clip(frames=7)
        out = model(x, torch.zeros_like(brain))
        assert out.shape == (2, 7, 1)
        assert torch.isfinite(out).all()


# --- the ladder ---------------------------------------------------------------------------------------------------
def trained(model: TargetModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_trains_on_each_rung() -> None:
    everything = trained(model_of(task("scratch")))
    head = {name for name in everything if name.startswith("head.")}
    last = {name for name in everything if name.startswith(("encoder.stages.1.blocks.1.", "encoder.norm."))}
    assert last
    assert trained(model_of(task("full"))) == everything
    assert trained(model_of(task("linear"))) == head
    assert {name for name in trained(model_of(task("attentive"))) if not name.startswith("head.")} == set()
    assert trained(model_of(task("last_block"))) == head | last
    changes = trained(model_of(task("lora"))) - head
    assert all(is_lora(name) for name in changes)
    # Three blocks of two attentions, each with qkv and proj, each with A and B.
    assert len(changes) == 3 * 2 * 2 * 2
    assert "encoder.norm.weight" not in trained(model_of(task("full", "model.final_norm=false")))


@pytest.mark.parametrize("adapt", RUNGS)
def test_the_ladder_begins_with_the_encoder_as_it_is(adapt: str) -> None:
    x, _ = clip()
    plain, adapted = model_of(task("scratch")).eval(), model_of(task(adapt)).eval()
    own = plain.state_dict()
    with torch.no_grad():
        for name, parameter in adapted.encoder.named_parameters():
            if not is_lora(f"encoder.{name}"):
                parameter.copy_(own[plain_name(f"encoder.{name}")])
    torch.testing.assert_close(adapted.encoder(x)[-1], plain.encoder(x)[-1])


@pytest.mark.parametrize("adapt", ["linear", "attentive", "last_block"])
def test_what_is_frozen_drops_nothing_and_keeps_no_graph(adapt: str) -> None:
    drops = ["model.dropout=0.3", "model.attention_dropout=0.3", "model.drop_path=0.3"]
    model = model_of(task(adapt, *drops))
    x, brain = clip()
    model.train()
    blocks = model.encoder.blocks()
    features = {}
    for place in (1, 2):
        blocks[place].register_forward_hook(lambda m, i, out, place=place: features.setdefault(place, []).append(out))
    for _ in range(2):
        model(x, brain)
    first, second = features[1]
    assert torch.equal(first, second)
    assert first.grad_fn is None
    if adapt == "last_block":
        assert not torch.equal(*features[2])
        assert features[2][0].grad_fn is not None
    else:
        assert features[2][0].grad_fn is None
    assert model.head.training


def test_low_rank_changes_are_those_of_the_paper() -> None:
    cfg = task("lora", "task.lora_rank=3", "task.lora_alpha=6")
    model = model_of(cfg).eval()
    attention = model.encoder.blocks()[0].space.fn.qkv
    with torch.no_grad():
        attention.lora_B["default"].weight.normal_()
    x = torch.randn(5, 12)
    change = 6 / 3 * attention.lora_B["default"].weight @ attention.lora_A["default"].weight
    wanted = x @ (attention.base_layer.weight + change).T + attention.base_layer.bias
    torch.testing.assert_close(attention(x), wanted)
    std = float(attention.lora_A["default"].weight.detach().std())
    assert std == pytest.approx((1 / 36) ** 0.5, rel=0.5)


# --- rates --------------------------------------------------------------------------------------------------------
def test_rates_fall_block_by_block() -> None:
    model = model_of(task("full", "model.position=rope_global"))
    rates = depth_rates([name for name, _ in model.named_parameters()], model.encoder, 0.5)
    expected = {
        "head.linear.weight": 1,
        "encoder.norm.weight": 1,
        "encoder.stages.1.blocks.1.mlp.fn.fc1.weight": 0.5,
        "encoder.stages.1.blocks.0.space.fn.qkv.weight": 0.25,
        "encoder.stages.0.downsample.reduction.weight": 0.125,
        "encoder.stages.0.blocks.0.time.gamma": 0.125,
        "encoder.patch_embed.proj.weight": 0.0625,
        "encoder.position.x": 0.0625,
    }
    assert {name: rates[name] for name in expected} == expected


@pytest.mark.parametrize("mup", [False, True])
def test_rates_multiply_those_of_mup(mup: bool) -> None:
    wide = ["optimizer=adamw_mup", "optimizer.base_width=6"] if mup else []
    module = FinetuneModule(task("full", "task.layer_decay=0.5", *wide))
    module.target_info = {}
    optimizer = build_optimizer(module.model, module.cfg.optimizer, module.widths, rates=module.rates())
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    lr = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(lr) == trained(module.model)
    base, rates, half = module.cfg.optimizer.lr, module.rates() or {}, 0.5 if mup else 1
    hidden, output = "encoder.stages.1.blocks.1.mlp.fn.fc1.weight", "head.linear.weight"
    assert lr[hidden] == pytest.approx(base * rates[hidden] * half)
    assert lr[output] == pytest.approx(base * half)
    assert lr["head.linear.bias"] == pytest.approx(base)
    assert decay["head.linear.bias"] == 0
    assert decay[output] == pytest.approx(module.cfg.optimizer.weight_decay / half)
    if mup:
        same = FinetuneModule(dataclasses.replace(module.cfg, optimizer=task("full").optimizer, model=task().model))
        ratio = module.model.head.linear.weight / same.model.head.linear.weight
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))


# --- courses of maps ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["synthetic_binary", "synthetic_frame"])
def test_courses_of_maps_are_added_by_a_linear_map_of_their_own(name: str) -> None:
    overrides = ("model.maps=3", "model.maps_of=shared", "data.split=somewhere", "task.courses=true")
    model = model_of(task("scratch", *overrides, name=name)).double().eval()
    x, brain = clip()
    x = x.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        assert not model.head.of_courses.weight.any(), "the head begins as one without courses"
        model.linear.maps.copy_(torch.randn(model.linear.maps.shape, generator=generator))
        model.linear.log_noise.fill_(0.7)
        without = model(x, brain).numpy()
        weight = torch.randn(model.head.of_courses.weight.shape, generator=generator).double()
        model.head.of_courses.weight.copy_(weight)
        out = model(x, brain).numpy()
    maps, noise = model.linear.maps.detach().numpy(), np.exp(0.7)
    for row in range(2):
        inside = brain[row].numpy()
        m = maps[:, inside].T  # (V, K), nothing of it hidden
        courses = np.linalg.solve(m.T @ m + noise * np.eye(3), m.T @ x[row, 0].numpy()[inside]).T  # (T, K)
        if name == "synthetic_binary":
            added = weight.numpy() @ np.concatenate([courses.mean(0), np.sqrt(courses.var(0) + 1e-6)])
        else:
            added = courses @ weight.numpy().T
        np.testing.assert_allclose(out[row] - without[row], added, rtol=1e-6, atol=1e-8)


def test_shared_maps_train_with_the_whole_and_stay_still_under_a_frozen_encoder() -> None:
    overrides = ("model.maps=3", "model.maps_of=shared", "data.split=somewhere", "task.courses=true")
    maps = {"linear.maps", "linear.log_noise"}
    for adapt in ("scratch", "full"):
        assert maps <= trained(model_of(task(adapt, *overrides)))
    for adapt in ("linear", "attentive", "last_block", "lora"):
        assert not maps & trained(model_of(task(adapt, *overrides)))

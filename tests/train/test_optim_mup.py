"""Optimizer groups of muP: against the mup package, against AdamW at the base width, and with parameters in shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from mup import MuAdamW, MuReadout, set_base_shapes
from mup.optim import process_param_groups
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from swift.config.compose import conf_dir, typed
from swift.config.schema import Config, OptimizerConfig
from swift.models.autoencoder import MaskedAutoencoder
from swift.train.optim import build_optimizer, build_schedule, lr_factor, parameter_groups
from swift.train.pretrain import PretrainModule
from swift.utils.errors import UserError
from tests.models import cases

SMALL = (
    "data=synthetic",
    "data.grid=[8,8,8]",
    "data.frames=4",
    "model.patch_size=[2,2,2,1]",
    "model.window=[2,2,2,2]",
    "model.depths=[1,1]",
    "model.num_heads=[1,2]",
    "model.decoder_dim=8",
    "optimizer.weight_decay=0.1",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_dir()), version_base=None):
        return typed(compose("config", [*SMALL, *overrides]))


def mup_settings(width: int, base: int = 16, *overrides: str) -> Config:
    return settings(f"model.embed_dim={width}", "optimizer=adamw_mup", f"optimizer.base_width={base}", *overrides)


def module_of(cfg: Config) -> PretrainModule:
    torch.manual_seed(3)
    return PretrainModule(cfg)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> list[float]:
    """Losses of a few steps on one clip."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(2, 1, 8, 8, 8, 4, generator=generator, dtype=dtype)
    hidden = torch.rand(2, 4, 4, 4, 4, generator=generator) < 0.5
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        loss = (model(clip, hidden) - clip).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_initial_values_are_those_of_adamw_times_the_factor_of_the_width() -> None:
    plain, scaled = module_of(settings("model.embed_dim=64")), module_of(mup_settings(64))
    assert scaled.widths is not None
    for name, before in plain.model.named_parameters():
        factor = {"hidden": 0.5, "output": 0.25}.get(scaled.widths[name].kind, 1.0)
        torch.testing.assert_close(scaled.model.get_parameter(name), before * factor, rtol=1e-6, atol=0)
    # the variance of hidden weights goes as 1/fan_in, from 0.02^2 at the base width
    weight = scaled.model.get_parameter("encoder.stages.1.blocks.0.mlp.fn.fc1.weight")
    assert float(weight.detach().std()) == pytest.approx(0.02 * (16 / 64) ** 0.5, rel=0.03)


def test_groups_are_split_by_width() -> None:
    cfg = mup_settings(64)
    module = module_of(cfg)
    optimizer = build_optimizer(module.model, cfg.optimizer, module.widths)
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    found = [(g["lr"], g["weight_decay"], g["eps"], {names[p] for p in g["params"]}) for g in optimizer.param_groups]
    assert [numbers for *numbers, _ in found] == [
        [1e-3, 0.0, 2.5e-9],
        [1e-3, 0.0, 1e-8],
        [1e-3, 0.1, 2.5e-9],
        [2.5e-4, 0.4, 2.5e-9],
        [2.5e-4, 0.4, 1e-8],
        [1e-3, 0.1, 1e-8],
    ]
    assert found[2][3] == {"encoder.patch_embed.proj.weight"}
    assert "encoder.stages.0.downsample.reduction.weight" in found[3][3]
    assert found[4][3] == {"decoder.laterals.0.weight", "decoder.laterals.1.weight"}
    assert found[5][3] == {"decoder.head.weight"}
    assert all(p.ndim == 1 for group in optimizer.param_groups[:2] for p in group["params"])
    assert sorted(name for *_, members in found for name in members) == sorted(names.values())


def test_runs_frozen_before_eps_was_scaled_keep_theirs() -> None:
    cfg = mup_settings(64, 16, "optimizer.eps_scaled=false")
    module = module_of(cfg)
    groups = build_optimizer(module.model, cfg.optimizer, module.widths).param_groups
    found = [(g["lr"], g["weight_decay"], g["eps"]) for g in groups]
    assert found == [(1e-3, 0.0, 1e-8), (1e-3, 0.1, 1e-8), (2.5e-4, 0.4, 1e-8)]
    assert OptimizerConfig("adamw_mup", 1e-3, 0.1, [0.9, 0.95], 1e-8, 1, 0.1, 16).eps_scaled is False


def test_eps_falls_as_gradients_do() -> None:
    """From width 16 to 64: gradients of what grows fall to about a quarter, the others stay."""
    sizes: dict[int, dict[str, float]] = {}
    for width in (16, 64):
        cfg = mup_settings(width)
        module = module_of(cfg)
        optimizer = build_optimizer(module.model, cfg.optimizer, module.widths)
        steps(module.model, optimizer, 4)  # the gradients of the last step are left
        found: dict[str, list[float]] = {}
        for name, parameter in module.model.named_parameters():
            if parameter.grad is not None and parameter.grad.any():
                size = float(parameter.grad.square().mean().log())
                found.setdefault(module.widths[name].kind, []).append(size / 2)
        sizes[width] = {kind: math.exp(sum(values) / len(values)) for kind, values in found.items()}
    for kind in ("hidden", "vector", "input"):
        assert 2 < sizes[16][kind] / sizes[64][kind] < 6, kind
    for kind in ("output", "finite"):
        assert 0.5 < sizes[16][kind] / sizes[64][kind] < 2, kind


def test_groups_need_only_names() -> None:
    """Under ZeRO 3 a parameter has no elements before it is gathered: the groups are the same."""
    cfg = mup_settings(64)
    whole, sharded = module_of(cfg), module_of(cfg)
    for parameter in sharded.parameters():
        parameter.data = torch.empty(0)

    def members(module: PretrainModule) -> list[tuple[float, float, list[str]]]:
        names = {parameter: name for name, parameter in module.model.named_parameters()}
        groups = build_optimizer(module.model, cfg.optimizer, module.widths).param_groups
        return [(g["lr"], g["weight_decay"], [names[p] for p in g["params"]]) for g in groups]

    assert members(sharded) == members(whole)


@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize("variant", list(cases.VARIANTS))
def test_plain_groups_are_those_of_timm(variant: str, decoder: str) -> None:
    """Matrices decay; what is one-dimensional, a bias, or a table does not."""
    size = cases.SHAPES["divisible"]
    model = MaskedAutoencoder(cases.config(variant, size, decoder=decoder), size.grid, size.frames)
    tables = [n for n, _ in model.named_parameters() if "position." in n or "time_embed" in n or "mask_token" in n]
    expected = param_groups_weight_decay(model, 0.1, no_weight_decay_list=tables)
    for ours, theirs in zip(parameter_groups(model, 0.1), expected, strict=True):
        assert ours["weight_decay"] == theirs["weight_decay"]
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]


def test_schedule_keeps_the_ratios() -> None:
    cfg = mup_settings(64, 16, "optimizer.warmup_steps=3")
    module = module_of(cfg)
    optimizer = build_optimizer(module.model, cfg.optimizer, module.widths)
    schedule = build_schedule(optimizer, cfg.optimizer, 10)
    for step in range(10):
        factor = lr_factor(step, 3, 10, cfg.optimizer.min_lr_ratio)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [rate * factor for rate in (1e-3, 1e-3, 1e-3, 2.5e-4, 2.5e-4, 1e-3)]
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("variant", ["factorized", "joint"])
def test_at_the_base_width_it_is_adamw_to_the_bit(variant: str) -> None:
    plain = settings("model.embed_dim=16", f"model/variant={variant}", *SMALL)
    scaled = mup_settings(16, 16, f"model/variant={variant}", *SMALL)
    results = []
    for cfg in (plain, scaled):
        module = module_of(cfg)
        start = {name: value.clone() for name, value in module.state_dict().items()}
        losses = steps(module.model, build_optimizer(module.model, cfg.optimizer, module.widths), 3)
        results.append((start, losses, module.state_dict()))
    (start, losses, end), (start_mup, losses_mup, end_mup) = results
    assert losses == losses_mup
    assert all(torch.equal(value, start_mup[name]) for name, value in start.items())
    assert all(torch.equal(value, end_mup[name]) for name, value in end.items())
    assert not torch.equal(start["model.mask_token"], end["model.mask_token"])


def with_readout(model: MaskedAutoencoder, twin: Callable[[int], nn.Module], mult: float) -> MaskedAutoencoder:
    """The same function in the form of the mup package: `MuReadout` with the weights of the base width."""

    def change(target: nn.Module) -> nn.Module:
        head = target.get_submodule("decoder.head")
        assert isinstance(head, nn.Linear)
        readout = MuReadout(head.in_features, head.out_features)
        readout.load_state_dict({"weight": head.weight * mult, "bias": head.bias})
        target.get_submodule("decoder").add_module("head", readout.to(head.weight.dtype))
        return target

    base, wider = (change(twin(width)) for width in (16, 32))
    change(model)
    set_base_shapes(model, base, delta=wider, rescale_params=False)
    return model


@pytest.mark.parametrize("variant", ["factorized", "joint"])
def test_training_equals_the_mup_package(variant: str) -> None:
    """Rates, decay and values as in MuAdamW with MuReadout, which has another multiplier but trains the same function.

    In float64 and with a negligible epsilon, as Adam is blind to the size of gradients only without it.
    """
    cfg = mup_settings(
        64,
        16,
        f"model/variant={variant}",
        *SMALL,
        "model.decoder=linear",
        "optimizer.eps=1e-30",
        "optimizer.eps_scaled=false",
    )
    ours, theirs = module_of(cfg), module_of(cfg)

    def twin(width: int) -> nn.Module:
        return ours.build_model(replace(cfg.model, embed_dim=width))

    reference = with_readout(theirs.model, twin, mult=4.0).double()
    # .double() makes new data and keeps the parameters, and so their shapes
    assert all(hasattr(parameter, "infshape") for parameter in reference.parameters())
    beta1, beta2 = cfg.optimizer.betas
    plain: list[dict[str, Any]] = parameter_groups(reference, cfg.optimizer.weight_decay)
    groups = process_param_groups(plain, lr=cfg.optimizer.lr)
    # Fused like ours: the gradients of the key biases are nothing but rounding, and without epsilon they count in full.
    expected = steps(reference, MuAdamW(groups, lr=cfg.optimizer.lr, betas=(beta1, beta2), eps=1e-30, fused=True), 3)
    model = ours.model.double()
    found = steps(model, build_optimizer(model, cfg.optimizer, ours.widths), 3)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < found[0]

    def weights(tree: nn.Module) -> dict[str, Tensor]:
        return {
            name: value * (0.25 if name == "decoder.head.weight" else 1) for name, value in tree.state_dict().items()
        }

    for name, value in weights(reference).items():
        mine = model.state_dict()[name]
        torch.testing.assert_close(mine, value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_base_shapes_travel_with_the_checkpoint() -> None:
    module = module_of(mup_settings(32))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["base_shapes"]["mask_token"] == [16]
    assert checkpoint["config"]["model"]["attention_base_width"] == 16
    module.on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="no record of muP base shapes"):
        module.on_load_checkpoint({"config": {}})
    with pytest.raises(UserError, match="other muP base shapes"):
        module_of(mup_settings(32, 32)).on_load_checkpoint(checkpoint)
    plain = module_of(settings("model.embed_dim=32"))
    checkpoint = {}
    plain.on_save_checkpoint(checkpoint)
    assert "base_shapes" not in checkpoint


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.base_width=16"], "optimizer.base_width=16: must be null: only optimizer=adamw_mup"),
        (["optimizer=adamw_mup", "optimizer.base_width=null"], "needs the embed_dim of its base model"),
        (["optimizer=adamw_mup", "optimizer.base_width=0"], "optimizer.base_width=0: optimizer=adamw_mup needs"),
        (["optimizer=adamw_mup", "optimizer.base_width=4"], "optimizer.base_width=4: no model of that width"),
        (
            ["optimizer=adamw_mup", "optimizer.base_width=16", "model.attention_base_width=8"],
            "model.attention_base_width=8: must equal optimizer.base_width=16",
        ),
        (["model.attention_base_width=0"], "model.attention_base_width=0: must be at least 1"),
    ],
)
def test_wrong_widths_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(*overrides)

"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from swift.config.schema import OptimizerConfig
from swift.models.mup import Table, matrices, plain_name

Group = dict[str, Any]

FUSED_ON = ("cpu", "cuda", "xpu")
"""Devices with a fused AdamW: one pass over weights, gradients and moments. On a CPU it takes a quarter of the time of
the loop over tensors (tiny: 9 for 43 ms, 51m: 160 for 660; one core, torch 2.14); its count of steps lies on the
device, so that no step waits for it."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Decay on weight matrices; none on biases, norms, LayerScale, position tables and tokens.

    Matrices are known by their module and not by their dimensions (as timm does it): under ZeRO 3 a parameter is an
    empty vector, and a table is a matrix by shape only.
    """
    decayed = matrices(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if name not in decayed], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in trained if name in decayed], "weight_decay": weight_decay},
    ]


def scaled_groups(model: nn.Module, cfg: OptimizerConfig, table: Table) -> list[Group]:
    """Groups of muP: those of `parameter_groups`, split by the factor on their rate and their eps.

    Rate times decay is the same in all groups that decay, as in the mup package's MuAdamW. The order is that of
    the names, so that every rank and engine has the same groups.

    Args:
        model: the model `table` was made for, before an engine wraps it.
        cfg: lr, weight_decay and eps of the base model.
        table: of `swift.models.mup.width_table`.
    """
    names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    groups: list[Group] = []
    for plain in parameter_groups(model, cfg.weight_decay):
        split: dict[tuple[float, float], Group] = {}
        for parameter in plain["params"]:
            scale = table[names[parameter]]
            eps = cfg.eps * (scale.eps if cfg.eps_scaled else 1.0)
            empty = {"params": [], "weight_decay": plain["weight_decay"] * scale.decay, "lr": cfg.lr * scale.lr}
            split.setdefault((scale.lr, eps), empty | {"eps": eps})["params"].append(parameter)
        groups += split.values()
    return groups


def slowed_groups(model: nn.Module, lr: float, groups: list[Group], rates: dict[str, float]) -> list[Group]:
    """Groups split by a factor on the rate of each parameter; empty ones left out.

    Args:
        model: what is trained, before an engine wraps it.
        lr: of groups that name none.
        groups: of `parameter_groups` or `scaled_groups`.
        rates: factor by name.
    """
    names = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    found: list[Group] = []
    for group in groups:
        split: dict[float, Group] = {}
        for parameter in group["params"]:
            rate = rates[names[parameter]]
            own = {**group, "params": [], "lr": group.get("lr", lr) * rate}
            split.setdefault(rate, own)["params"].append(parameter)
        found += split.values()
    return found


def build_optimizer(
    model: nn.Module,
    cfg: OptimizerConfig,
    table: Table | None = None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    rates: dict[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the parameter groups of `model`, fused where the device has that.

    Args:
        model: what is trained, before an engine wraps it.
        cfg: its settings.
        table: widths of the parameters by name, for optimizer=adamw_mup; None without muP.
        rates: factors on the rates by name (layer-wise decay), on top of those of muP; None: 1.
        make: called with groups, lr, betas, eps and fused: AdamW, or an engine's own.
    """
    assert (table is None) == (cfg.base_width is None), "a table of widths belongs to optimizer=adamw_mup"
    beta1, beta2 = cfg.betas
    groups = parameter_groups(model, cfg.weight_decay) if table is None else scaled_groups(model, cfg, table)
    if rates is not None:
        groups = slowed_groups(model, cfg.lr, groups, rates)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return make(groups, lr=cfg.lr, betas=(beta1, beta2), eps=cfg.eps, fused=devices <= set(FUSED_ON))


def lr_factor(step: int, warmup: int, total: int, floor: float) -> float:
    """Factor on the peak rate at optimizer step `step`: linear warm-up, then a cosine down to `floor` at `total`.

    Multiplicative, so that every group keeps its own peak (muP needs that).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Warm-up and cosine as a function of the optimizer step alone."""
    warmup = min(cfg.warmup_steps, total_steps)
    return LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total_steps, cfg.min_lr_ratio))

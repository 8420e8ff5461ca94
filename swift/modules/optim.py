"""Parameter groups, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from swift.config.schema import OptimizerConfig

# Position tables and tokens are matrices by shape only: decay would pull them to zero like a bias.
_TABLES = (".position.", "position.", "time_embed", "mask_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on weight matrices; none on biases, norms, LayerScale, position tables and tokens."""
    tables = [name for name, _ in model.named_parameters() if any(part in name for part in _TABLES)]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=tables)


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the parameter groups of `model`."""
    beta1, beta2 = cfg.betas
    groups = parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(beta1, beta2), eps=cfg.eps)


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

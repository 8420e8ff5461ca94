"""Parameter groups by name, and the learning rate in closed form."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from swift.config.schema import OptimizerConfig
from swift.models.autoencoder import MaskedAutoencoder
from swift.train.optim import build_optimizer, build_schedule, lr_factor, parameter_groups
from tests.models import cases

SETTINGS = OptimizerConfig(
    name="adamw", lr=2e-3, weight_decay=0.07, betas=[0.8, 0.9], eps=1e-7, warmup_steps=4, min_lr_ratio=0.1
)
MATRIX = re.compile(
    r"encoder\.patch_embed\.proj\.weight"
    r"|encoder\.stages\.\d+\.blocks\.\d+\.(attn|space|time)\.fn\.(qkv|proj)\.weight"
    r"|encoder\.stages\.\d+\.blocks\.\d+\.(mlp|mlp1|mlp2)\.fn\.fc[12]\.weight"
    r"|encoder\.stages\.\d+\.downsample\.reduction\.weight"
    r"|decoder\.(laterals\.\d+|head|expand)\.weight"
)


def model(variant: str = "factorized-rope_global", decoder: str = "local") -> MaskedAutoencoder:
    case = cases.SHAPES["divisible"]
    return MaskedAutoencoder(cases.config(variant, case, decoder=decoder), case.grid, case.frames)


def names_by_decay(net: nn.Module, weight_decay: float = 0.05) -> dict[float, set[str]]:
    names = {parameter: name for name, parameter in net.named_parameters()}
    found: dict[float, set[str]] = {}
    total = 0
    for group in parameter_groups(net, weight_decay):
        found.setdefault(group["weight_decay"], set()).update(names[parameter] for parameter in group["params"])
        total += len(group["params"])
    assert total == len(names), "a parameter twice or not at all"
    return found


# --- groups -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize("variant", sorted(cases.VARIANTS))
def test_matrices_decay_and_nothing_else(variant: str, decoder: str) -> None:
    net = model(variant, decoder)
    expected = {name for name, _ in net.named_parameters() if MATRIX.fullmatch(name)}
    groups = names_by_decay(net)
    assert set(groups) == {0.0, 0.05}
    assert groups[0.05] == expected
    assert groups[0.0] == {name for name, _ in net.named_parameters()} - expected


def test_the_names_written_out() -> None:
    """Every name of a small model, so that the pattern above cannot be wrong in silence."""
    case = cases.Shape((4, 4, 4), 2, (2, 2, 2, 1), (2, 2, 2, 2), (1,), 12, (2,))
    net = MaskedAutoencoder(cases.config("factorized-rope_global", case, layer_scale=0.1), case.grid, case.frames)
    groups = names_by_decay(net)
    block = "encoder.stages.0.blocks.0"
    assert groups[0.05] == {
        "encoder.patch_embed.proj.weight",
        f"{block}.space.fn.qkv.weight",
        f"{block}.space.fn.proj.weight",
        f"{block}.time.fn.qkv.weight",
        f"{block}.time.fn.proj.weight",
        f"{block}.mlp.fn.fc1.weight",
        f"{block}.mlp.fn.fc2.weight",
        "decoder.laterals.0.weight",
        "decoder.head.weight",
    }
    assert groups[0.0] == {
        "mask_token",
        "encoder.patch_embed.proj.bias",
        "encoder.patch_embed.norm.weight",
        "encoder.patch_embed.norm.bias",
        *(f"encoder.position.{axis}" for axis in "xyzt"),
        *(f"{block}.{branch}.norm.{kind}" for branch in ("space", "time", "mlp") for kind in ("weight", "bias")),
        *(f"{block}.{branch}.gamma" for branch in ("space", "time", "mlp")),
        *(f"{block}.{branch}.fn.{part}.bias" for branch in ("space", "time") for part in ("qkv", "proj")),
        f"{block}.mlp.fn.fc1.bias",
        f"{block}.mlp.fn.fc2.bias",
        "encoder.norm.weight",
        "encoder.norm.bias",
        "decoder.norms.0.weight",
        "decoder.norms.0.bias",
        "decoder.laterals.0.bias",
        "decoder.norm.weight",
        "decoder.norm.bias",
        "decoder.head.bias",
    }


def test_the_settings_reach_the_optimizer() -> None:
    optimizer = build_optimizer(model(), SETTINGS)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.9), 1e-7)
        assert group["fused"] is True
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.07]


def test_a_step_is_adamw() -> None:
    """Two steps against the update rule of Loshchilov & Hutter 2019, in float64."""
    torch.manual_seed(0)
    net = model().double()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = build_optimizer(net, SETTINGS)
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in before.items()}
    for step in (1, 2):
        for name, parameter in net.named_parameters():
            gradient = torch.randn(parameter.shape, dtype=torch.float64)
            parameter.grad = gradient
            first, second = (m.clone() for m in moments[name])
            first = 0.8 * first + 0.2 * gradient
            second = 0.9 * second + 0.1 * gradient**2
            moments[name] = (first, second)
            decay = 0.07 if MATRIX.fullmatch(name) else 0.0
            update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-7)
            before[name] = before[name] * (1 - 2e-3 * decay) - 2e-3 * update
        optimizer.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=1e-12, atol=1e-14)


def test_a_device_without_a_fused_step_takes_the_plain_one() -> None:
    optimizer = build_optimizer(model().to("meta"), SETTINGS)
    assert [group["fused"] for group in optimizer.param_groups] == [False, False]


# --- schedule -----------------------------------------------------------------------------------------------------
def test_the_factor_is_warm_up_then_cosine() -> None:
    """20 steps, 5 of them warm-up, floor 0.1: values worked out by hand."""
    factors = [lr_factor(step, 5, 20, 0.1) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    # A third, a half and two thirds of the cosine: cos = 1/2, 0, -1/2.
    assert factors[10] == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr_factor(6, 0, 12, 0.1) == pytest.approx(0.55)
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.25)
    assert factors[20] == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup", "total", "floor"), [(0, 10, 0.0), (1, 10, 0.05), (40, 400, 0.05), (7, 8, 0.5)])
def test_the_factor_is_continuous_and_falls_after_warm_up(warmup: int, total: int, floor: float) -> None:
    factors = [lr_factor(step, warmup, total, floor) for step in range(total + 1)]
    assert factors[warmup] == 1
    if warmup:
        assert factors[warmup - 1] == 1
        assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    drops = [a - b for a, b in pairwise(factors[warmup:])]
    assert min(drops) >= 0
    assert factors[-1] == pytest.approx(floor)
    # No step of the cosine is steeper than its slope in the middle.
    steepest = (1 - floor) * math.pi / 2 / (total - warmup)
    assert max(drops) <= steepest + 1e-12


def test_beyond_the_end_the_factor_stays_at_the_floor() -> None:
    assert lr_factor(21, 5, 20, 0.1) == pytest.approx(0.1)
    assert lr_factor(10**9, 5, 20, 0.1) == pytest.approx(0.1)


def test_warm_up_longer_than_the_run() -> None:
    """Warm-up is cut to the run: its last step has the peak rate, and nothing divides by zero."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = build_schedule(optimizer, SETTINGS, total_steps=3)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1])


def test_every_group_keeps_its_own_peak_and_a_state_goes_on() -> None:
    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.25)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, build_schedule(optimizer, SETTINGS, total_steps=12)

    def run(
        optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR, steps: int
    ) -> list[list[float]]:
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return rates

    whole = run(*build(), 12)
    assert whole == [pytest.approx([f, 0.25 * f]) for f in (lr_factor(step, 4, 12, 0.1) for step in range(12))]
    optimizer, schedule = build()
    first = run(optimizer, schedule, 5)
    later, going_on = build()
    going_on.load_state_dict(schedule.state_dict())
    later.load_state_dict(optimizer.state_dict())
    assert first + run(later, going_on, 7) == whole

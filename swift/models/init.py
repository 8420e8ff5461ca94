"""Initial values as a function of seed, parameter name and element: any part of a model can be drawn by itself.

A model of 14.5 billion parameters is never whole anywhere: each rank draws the elements that it holds, and they are
those that a single device would draw. The values are a counter-based hash (swift.models.noise, as the masks') turned
into a normal distribution, in float64, so that how elements are cut into parts does not show in the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import xxhash
from torch import Tensor, nn

from swift.models.noise import GOLDEN, mix, signed

STD = 0.02
_CHUNK = 1 << 20
FIRST_WEIGHT = "first_weight"
"""Attribute of a linear map whose weight begins in another way than all others."""


class Init(NamedTuple):
    """How a parameter begins: normal with mean 0 and standard deviation `value`, or the constant `value`."""

    normal: bool
    value: float

    def scaled(self, factor: float) -> Init:
        """The same, multiplied."""
        return Init(self.normal, self.value * factor)


NORMAL, ZERO, ONE = Init(True, STD), Init(False, 0.0), Init(False, 1.0)


@runtime_checkable
class OwnsParameters(Protocol):
    """A module with parameters of its own beside those of linear maps and norms."""

    def own_initial_values(self) -> dict[str, Init]:
        """Name of each of its own parameters -> how it begins."""


def initial_values(model: nn.Module, scales: Mapping[str, float] | None = None) -> dict[str, Init]:
    """How every parameter of a model begins, by name, also on the meta device.

    Linear maps as in Swin: normal (std 0.02), biases 0; norms 1 and 0; others as their modules say.

    Args:
        model: Any module.
        scales: Factors by name (muP); 1 where there is none.
    """
    found: dict[str, Init] = {}
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if not own:
            continue
        if isinstance(module, nn.Linear):
            values = {"weight": getattr(module, FIRST_WEIGHT, NORMAL), "bias": ZERO}
        elif isinstance(module, nn.LayerNorm):
            values = {"weight": ONE, "bias": ZERO}
        else:
            assert isinstance(module, OwnsParameters), f"{type(module).__name__} ({path}) lacks own_initial_values()"
            values = module.own_initial_values()
        found |= {f"{path}.{name}".removeprefix("."): values[name] for name in own}
    return {name: value.scaled((scales or {}).get(name, 1.0)) for name, value in found.items()}


@torch.no_grad()
def fill(part: Tensor, init: Init, seed: int, name: str, start: int = 0) -> None:
    """Set a flat part of a parameter to its initial values.

    Args:
        part: (n,) elements of the parameter from flat element `start` on, on any device.
        init: How the parameter begins.
        seed: Of the run.
        name: Of the parameter.
        start: First element.
    """
    if not init.normal:
        part.fill_(init.value)
        return
    key = signed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()))
    for at in range(0, part.numel(), _CHUNK):
        chunk = part[at : at + _CHUNK]
        counters = torch.arange(start + at + 1, start + at + 1 + chunk.numel(), device=part.device)
        words = mix(counters * signed(GOLDEN) + key)
        # 53 bits to (0, 1), never 0 or 1, where the normal distribution has its infinities.
        uniform = (((words >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
        chunk.copy_(torch.special.erfinv(uniform.mul_(2).sub_(1)).mul_(math.sqrt(2) * init.value))


def initialize(model: nn.Module, values: Mapping[str, Init], seed: int) -> None:
    """Set all parameters of a whole model to their initial values."""
    for name, parameter in model.named_parameters():
        fill(parameter.detach().view(-1), values[name], seed, name)


def draw(model: nn.Module) -> None:
    """Initial values of a module that is built by itself, from a seed of torch's generator; none on the meta device."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        initialize(model, initial_values(model), int(torch.randint(1 << 62, ())))

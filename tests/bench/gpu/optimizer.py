"""AdamW for each tensor, foreach and fused, and clipping with and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import make_module, settings
from tests.bench.gpu.measure import kernels, milliseconds

COLUMNS = (("ms", "9.3f"), ("kernels", "7d"), ("waits", "5d"), ("gb_s", "8.0f"))
ADAM_BYTES = 28
"""A parameter of AdamW: weight, gradient and two moments read, weight and moments written, float32."""


def parameters_of(bench: Bench, model: str) -> list[torch.nn.Parameter]:
    """Weights with gradients."""
    module = make_module(settings(bench, model), bench.device)
    found = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in found:
        parameter.grad = torch.full_like(parameter, 1e-3)
    return found


def adam(bench: Bench, model: str, how: str) -> Row:
    """Time of optimizer.step()."""
    parameters = parameters_of(bench, model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, foreach=how == "foreach", fused=how == "fused")
    return figures(bench, optimizer.step, parameters, ADAM_BYTES)


def figures(bench: Bench, work: Callable[[], object], parameters: list[torch.nn.Parameter], traffic: int) -> Row:
    """Time, kernels, waits, and bytes/s of the least traffic."""
    ms = milliseconds(work, bench.device, 0.03 if bench.small else 0.5)
    seen = kernels(work, bench.device)
    count = sum(parameter.numel() for parameter in parameters)
    return {"ms": ms, "kernels": seen.count, "waits": seen.waits, "gb_s": traffic * count / ms / 1e6}


def clip(bench: Bench, model: str, waiting: bool) -> Row:
    """Clipping by the global norm; waiting: the norm is read by the host, as a guard that decides at once does."""
    parameters = parameters_of(bench, model)

    def work() -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        if waiting:
            float(norm)

    return figures(bench, work, parameters, 12)


def cases(bench: Bench) -> list[Case]:
    """806m."""
    model = "tiny" if bench.small else "806m"
    made = [Case(f"{model} AdamW {how}", lambda how=how: adam(bench, model, how)) for how in ("foreach", "fused")]  # type: ignore[misc]
    made += [
        Case(
            f"{model} clip {'and read the norm' if waiting else 'without waiting'}",
            lambda w=waiting: clip(bench, model, w),
        )  # type: ignore[misc]
        for waiting in (False, True)
    ]
    return made


PART = Part("AdamW and clipping over the weights of 806m", cases, COLUMNS)

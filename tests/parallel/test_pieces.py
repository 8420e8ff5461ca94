"""Moments and Adam's count as pieces: what one kind of AdamW has written, the other goes on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from swift.parallel.checkpoint.pieces import MOMENTS, module_pieces, optimizer_steps

RATE, DECAY, EPS, BETAS = 1e-2, 0.1, 1e-8, (0.9, 0.95)


def gradients(step: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(4, 3, generator=draw), torch.randn(4, generator=draw)]


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(module.parameters(), gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def closed_form(steps: int) -> list[torch.Tensor]:
    """Weights after so many steps from 0.5, by the update rule of Loshchilov & Hutter 2019, in float64."""
    weights = [torch.full((4, 3), 0.5, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(1, steps + 1):
        for i, gradient in enumerate(gradients(step - 1)):
            g = gradient.double()
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * g
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * g * g
            update = first[i] / (1 - BETAS[0] ** step) / ((second[i] / (1 - BETAS[1] ** step)).sqrt() + EPS)
            weights[i] = weights[i] * (1 - RATE * DECAY) - RATE * update
    return weights


def build(fused: bool, device: str = "cpu") -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(3, 4).to(device)
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.5)
    return module, torch.optim.AdamW(
        module.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=fused
    )


def handed_on(before: tuple[nn.Module, Any], after: tuple[nn.Module, Any]) -> None:
    """As a checkpoint does it: pieces and the count."""
    steps = optimizer_steps(before[1])
    saved = {piece.name: piece for piece in module_pieces(*before, 0, 1)}
    for piece in module_pieces(*after, 0, 1, steps):
        for kind, tensor in piece.tensors.items():
            tensor.copy_(saved[piece.name].tensors[kind])


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_fused_and_plain_adamw_go_on_from_each_other(first: bool, second: bool) -> None:
    one, other = build(first), build(second)
    trained(*one, range(3))
    handed_on(one, other)
    assert optimizer_steps(other[1]) == 3
    trained(*other, range(3, 6))
    assert optimizer_steps(other[1]) == 6
    for parameter, expected in zip(other[0].parameters(), closed_form(6), strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_made_for_a_load_is_what_adam_makes(fused: bool) -> None:
    loaded, own = build(fused), build(fused)
    list(module_pieces(*loaded, 0, 1, 7))
    trained(*own, range(1))
    for mine, its in zip(loaded[1].state.values(), own[1].state.values(), strict=True):
        assert mine.keys() == its.keys() == {"step", *MOMENTS}
        for name, tensor in its.items():
            assert (mine[name].shape, mine[name].dtype, mine[name].device) == (
                tensor.shape,
                tensor.dtype,
                tensor.device,
            )
    assert optimizer_steps(loaded[1]) == 7


def test_nothing_counted_is_zero() -> None:
    assert optimizer_steps(build(True)[1]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_on_a_gpu_too(first: bool, second: bool) -> None:
    """The count of the fused one lies on the device, that of the other on the host."""
    one, other = build(first, "cuda"), build(second, "cuda")
    kinds = {True: "cuda", False: "cpu"}
    for (module, optimizer), fused, steps in ((one, first, range(3)), (other, second, range(3, 6))):
        if steps.start:
            handed_on(one, other)
        for step in steps:
            for parameter, gradient in zip(module.parameters(), gradients(step), strict=True):
                parameter.grad = gradient.cuda()
            optimizer.step()
        assert {state["step"].device.type for state in optimizer.state.values()} == {kinds[fused]}
    assert optimizer_steps(other[1]) == 6
    for parameter, expected in zip(other[0].parameters(), closed_form(6), strict=True):
        torch.testing.assert_close(parameter.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)

"""Steps left out without the host knowing, gradients put aside, and what a guard sees of weights in pieces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift.parallel.checkpoint.files import Piece
from swift.parallel.step_gate import StepGate, kept_gradients, leave_out


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    if kind == "sgd":
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=kind == "fused")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, bad: bool) -> None:
    optimizer.zero_grad()
    loss = model(torch.arange(5.0)).sum() * (torch.nan if bad else 1.0)
    loss.backward()
    leave_out(optimizer, torch.tensor(bad))
    optimizer.step()


def numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [*model.parameters(), *(value for value in states if isinstance(value, Tensor))]


@pytest.mark.parametrize("kind", ["fused", "loop", "sgd"])
def test_bad_steps_change_nothing_and_those_after_them_are_as_without(kind: str) -> None:
    model, optimizer = trained(kind)
    other, plain = trained(kind)
    for bad in (True, False, True, True, False):
        before = copy.deepcopy(list(model.state_dict().values()))
        step(model, optimizer, bad)
        assert bad == all(torch.equal(left, right) for left, right in zip(before, model.state_dict().values()))
        if not bad:
            step(other, plain, False)
    for left, right in zip(numbers(model, optimizer), numbers(other, plain), strict=True):
        assert torch.equal(left, right)


def test_gradients_come_back_bit_for_bit_where_another_pass_writes_over_them() -> None:
    model, _ = trained("sgd")
    frozen = model[2].bias.requires_grad_(False)
    model(torch.arange(5.0)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    memory = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with kept_gradients(model.parameters()):
        assert all(parameter.grad is None for parameter in model.parameters())
        for grad in memory:  # as the buckets of ddp
            grad.fill_(torch.nan)
        model(torch.ones(5)).sum().backward()
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert frozen.grad is None
    assert len(after) == len(before) == 3
    assert all(torch.equal(left, right) for left, right in zip(before, after))


class Sharded(StepGate):
    """A rank under ZeRO 3: empty parameters with a shard beside; the piece of the frozen one is a kept copy."""

    def __init__(self, shard: torch.Tensor) -> None:
        self.lightning_module = nn.Linear(3, 1, bias=False)
        self.lightning_module.weight.data = torch.empty(0)
        self.lightning_module.weight.ds_tensor = shard

    def pieces(self, **_: Any) -> list[Piece]:  # type: ignore[override]  # an attribute there
        return [Piece("weight", (1, 3), 0, {"weight": torch.ones(3)})]


def test_a_frozen_shard_that_computes_is_looked_at() -> None:
    assert Sharded(torch.ones(3)).bad_weights() == {}
    assert Sharded(torch.tensor([1.0, torch.nan, torch.inf])).bad_weights() == {"weight": 2}

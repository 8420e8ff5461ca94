"""What a guard sees of the weights, where the pieces of a checkpoint are not what computes."""

from typing import Any

import torch
from torch import nn

from swift.parallel.checkpoint.files import Piece
from swift.parallel.step_gate import StepGate


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

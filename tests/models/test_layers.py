"""Parts of the encoder by themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swift.models.layers import Residual


def results(residual: Residual, add: Callable[..., Tensor] | None, autocast: bool) -> list[Tensor]:
    """Output and all gradients; `add` in place of the branch's own sum."""
    generator = torch.Generator().manual_seed(0)
    dtype = residual.norm.weight.dtype
    x = torch.randn(2, 3, 4, 6, generator=generator, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 3, 4, 6, generator=generator)
    residual.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = residual(x) if add is None else add(x, residual.fn(residual.norm(x)), residual.gamma)
    (out * weights.to(out.dtype)).sum().backward()
    return [out.detach(), x.grad, *(parameter.grad.clone() for parameter in residual.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_scaled_branch_has_the_bits_of_addcmul(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    residual = Residual(6, torch.nn.Linear(6, 6), layer_scale=0.3, drop_path=0.0).to(dtype)
    for ours, theirs in zip(results(residual, None, autocast), results(residual, torch.addcmul, autocast), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_frozen_scale_gets_no_gradient() -> None:
    residual = Residual(6, torch.nn.Linear(6, 6), layer_scale=0.3, drop_path=0.0)
    residual.gamma.requires_grad_(False)
    residual(torch.randn(2, 6)).sum().backward()
    assert residual.gamma.grad is None
    assert residual.fn.weight.grad is not None

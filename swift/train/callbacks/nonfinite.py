"""Where a value that is not finite appears first: hooks over the parts of a model, for a pass that is run again."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Finding = dict[str, Any]


def describe(tensor: Tensor) -> Finding:
    """Number of values, of NaN and of infinities, and min, max and mean of the finite ones (0 if there are none)."""
    values = tensor.detach()
    if not values.is_floating_point():
        values = values.float()
    good = torch.isfinite(values)
    nan = int(torch.isnan(values).sum())
    count = int(good.sum())
    found = values[good].double() if count else torch.zeros(1)
    extremes = {"min": float(found.min()), "max": float(found.max()), "mean": float(found.mean())}
    return {"values": values.numel(), "nan": nan, "inf": values.numel() - count - nan, **extremes}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


class Trace:
    """While it is entered: notes the first part of a module whose output is not finite, and the first such gradient.

    Parts are asked in the order they finish, so the innermost one is named. A gradient is named by the part at whose
    output it arrives, or by the weight; both are those of this rank alone, before any reduction (where weights are
    sharded by fsdp, by part only). Every look waits for the device: not for ordinary steps.

    Attributes:
        forward, backward: None, or {layer, what, values, nan, inf, min, max, mean}.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward: Finding | None = None
        self.backward: Finding | None = None
        self._hooks: list[Any] = []

    @property
    def first(self) -> Finding | None:
        """What came first, with pass: forward | backward."""
        for name, found in (("forward", self.forward), ("backward", self.backward)):
            if found is not None:
                return {"pass": name, **found}
        return None

    def __enter__(self) -> Trace:
        for name, part in self.module.named_modules():
            if name:
                self._hooks.append(part.register_forward_hook(self._after(name)))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                self._hooks.append(parameter.register_hook(self._gradient(name, "gradient of the weight")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _after(self, name: str) -> Any:
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if not tensor.is_floating_point():
                    continue
                if self.forward is None and not bool(torch.isfinite(tensor).all()):
                    self.forward = {"layer": name, "what": "output", **describe(tensor)}
                if tensor.requires_grad and self.backward is None:
                    self._hooks.append(tensor.register_hook(self._gradient(name, "gradient of the output")))

        return hook

    def _gradient(self, name: str, what: str) -> Any:
        def hook(gradient: Tensor) -> None:
            if self.backward is None and not bool(torch.isfinite(gradient).all()):
                self.backward = {"layer": name, "what": what, **describe(gradient)}

        return hook

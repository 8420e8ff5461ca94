"""Leaving out one optimizer step under every strategy: after its gradient norm is known, before anything is changed.

Weights, moments and Adam's count stay as they are; the schedule and the order of the data go on. Under single, ddp and
fsdp torch's fused AdamW is told by a number on its device (found_inf, made for steps that overflow in fp16), so that
nobody waits for the decision. DeepSpeed's ZeRO optimizers have a path of their own for such steps, and take it here;
they ask on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.files import Manifest, Reader
from swift.parallel.checkpoint.pieces import parameter_shapes
from swift.parallel.checkpoint.saver import Saver, gather, read_verified
from swift.utils.errors import UserError

SkipRule = Callable[[Tensor], Tensor]
"""Takes the gradient norm (NaN where it is not finite), returns whether to skip the step: a bool () on the device, of
which the host need not know yet. All ranks call it."""


def leave_out(optimizer: Any, bad: Tensor) -> None:
    """Let the next step of an optimizer change nothing if `bad`; only one that is not fused waits to know."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
    if inner.defaults.get("fused"):
        inner.found_inf = bad.float()
    elif bool(bad):
        drop_gradients(parameter for group in inner.param_groups for parameter in group["params"])


@contextmanager
def kept_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients put aside on the host, so that other passes can be run in between, and put back bit for bit.

    Those passes need the device's memory, and write over the buckets in which the gradients of ddp lie. Of a gradient
    in shards each rank puts its own aside.
    """
    mine = [parameter for parameter in parameters if parameter.grad is not None]
    kept = [_on_host(parameter.grad) for parameter in mine if parameter.grad is not None]
    drop_gradients(mine)
    try:
        yield
    finally:
        for parameter, put_back in zip(mine, kept, strict=True):
            parameter.grad = put_back()


def _on_host(grad: Tensor) -> Callable[[], Tensor]:
    """Copy a gradient to the host; returns what makes it again."""
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    copy, where = local.detach().to("cpu", copy=True), local.device
    if not isinstance(grad, DTensor):
        return lambda: copy.to(where)
    mesh, placements, shape, stride = grad.device_mesh, grad.placements, grad.shape, grad.stride()
    return lambda: DTensor.from_local(copy.to(where), mesh, placements, run_check=False, shape=shape, stride=stride)


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Leave an optimizer nothing to step on."""
    for parameter in parameters:
        parameter.grad = None


def combined(norms: Iterable[Any]) -> Tensor:
    """Norm of several groups; NaN where one is not finite, which DeepSpeed writes as -1."""
    stacked = torch.stack([torch.as_tensor(norm).detach().float().cpu() for norm in norms])
    good = torch.isfinite(stacked).all() & (stacked >= 0).all()
    return torch.linalg.vector_norm(stacked) if good else torch.tensor(torch.nan)


def skip_zero_steps(optimizer: Any, skip: SkipRule) -> None:
    """Let `skip` decide about every step of a ZeRO optimizer; norms are computed once, as before."""
    known: list[Any] = []
    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
        norm_of = optimizer.scaled_global_norm

        def check(partition_gradients: bool = True) -> None:
            known[:] = [norm_of()]
            optimizer.overflow = bool(skip(combined(known) / optimizer.loss_scale))

        def norm(norm_type: int = 2) -> Any:
            return known.pop() if known else norm_of(norm_type)

        optimizer.check_grad_overflow, optimizer.check_overflow, optimizer.scaled_global_norm = True, check, norm
        return
    groups_of, original = optimizer._get_norm_groups, optimizer._overflow_check_and_loss_scale_update

    def check_groups(*args: Any, **kwargs: Any) -> bool:
        found = groups_of()
        if bool(skip(combined(found) / optimizer.loss_scale)):
            known.clear()
            optimizer.overflow = True
            if not args and kwargs.get("update_scale", True):  # before DeepSpeed 0.19 it also cleaned up
                optimizer._overflow_clean_up(optimizer.loss_scale)
            return True
        known[:] = [found]
        optimizer.overflow = False
        return bool(original(*args, **kwargs))

    optimizer._overflow_check_and_loss_scale_update = check_groups
    optimizer._get_norm_groups = lambda: known.pop() if known else groups_of()


class StepGate:
    """What a strategy adds for a guard: steps that are left out, weights that are looked at, put back or kept."""

    saver: Saver
    lightning_module: Any
    precision_plugin: Any
    pieces: Any
    refresh: Any
    asks_late = True
    """Whether a step is taken or left out without the host knowing; else the host has waited for it."""

    def skip_steps_by(self, skip: SkipRule) -> None:
        """Let `skip` decide about every step from now on."""
        self.precision_plugin.skip = skip

    def kept_gradients(self) -> AbstractContextManager[None]:
        """A context for passes between the gradients of a step and that step."""
        return kept_gradients(self.lightning_module.parameters())

    def without_gradients(self) -> AbstractContextManager[None]:
        """A context for passes after a step, of which nobody needs the gradients."""
        drop_gradients(self.lightning_module.parameters())
        return nullcontext()

    def discard(self) -> None:
        """Forget the gradients of a micro-batch that was only looked at; the rule skips every step meanwhile."""
        drop_gradients(self.lightning_module.parameters())

    def bad_weights(self, moments: bool = False) -> dict[str, int]:
        """Names of the weights of this rank that are not finite, and how many of their elements."""
        found: dict[str, int] = {}
        for piece in self.pieces(moments=moments):
            for tensor in piece.tensors.values():
                if bad := int((~torch.isfinite(tensor)).sum()):
                    found[piece.name] = found.get(piece.name, 0) + bad
        for name, parameter in self.lightning_module.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            # Of a frozen weight under ZeRO 3 the pieces hold what a checkpoint gets; what computes is this shard.
            local = getattr(parameter, "ds_tensor", local)
            if name not in found and (bad := int((~torch.isfinite(local.detach())).sum())):
                found[name] = bad
        return found

    def save_weights(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Write the weights of all ranks as they are, as a checkpoint without moments; all ranks call it together."""
        self.saver.finish()
        shapes = {name: list(shape) for name, shape in parameter_shapes(self.lightning_module).items()}
        draft = Manifest(step, None, state, shapes, {}, {}, self.saver.world, 0)
        self.saver.save(folder, list(self.pieces(moments=False)), draft)
        self.saver.finish()

    def roll_back(self, folder: Path) -> Path:
        """Weights and moments of the newest checkpoint that is whole and finite; all ranks call it together.

        Raises:
            UserError: there is none.
        """
        self.saver.finish()
        rank, world = self.saver.rank, self.saver.world
        for name in gather([path.name for path in checkpoint.candidates(folder)], world)[0]:
            path = folder / name
            manifest, damage = read_verified(path, rank, world)
            if manifest is None or damage is not None:
                continue
            Reader(path, manifest).fill(list(self.pieces(manifest.optimizer_steps)))
            self.refresh()
            if not any(gather(bool(self.bad_weights(moments=True)), world)):
                return path
        raise UserError(f"{folder}: no checkpoint there is whole and finite, so there is nothing to go back to")


class DeepSpeedStepGate(StepGate):
    """The same for DeepSpeed, whose engine steps by itself."""

    deepspeed_engine: Any
    _last_norm: Tensor | None = None
    asks_late = False

    def skip_steps_by(self, skip: SkipRule) -> None:
        """Let `skip` decide about every step from now on."""

        def note_norm(norm: Tensor) -> Tensor:
            self._last_norm = norm
            return skip(norm)

        skip_zero_steps(self.deepspeed_engine.optimizer, note_norm)

    def discard(self) -> None:
        """Take the engine past a micro-batch; the rule skips its step."""
        self.deepspeed_engine.step()

    def without_gradients(self) -> AbstractContextManager[None]:
        """As they are: the engine has its own."""
        return nullcontext()

    def gradient_norm(self) -> Tensor | None:
        """Global norm of the gradients of the last optimizer step before clipping, None before the first."""
        norm = self._last_norm if self._last_norm is not None else self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

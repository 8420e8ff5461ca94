"""What a rank holds under each strategy, as named flat pieces: the part of checkpoints that knows the engines.

The tensors of a piece are the live storage: reading them saves, writing them loads. After writing, `refresh` updates
the engine, which keeps copies (bf16 weights, gathered small parameters).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from swift.parallel.checkpoint.files import WEIGHT, Piece

MOMENTS = ("exp_avg", "exp_avg_sq")
_VALUES = "swift_values"
"""Attribute of a frozen parameter, see `_frozen_values`."""


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, also where an engine has taken its values away."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """What Adam's bias correction has counted so far; a device is asked once, not for every tensor."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for state in optimizer.state.values():
        if "step" in state:
            count = torch.as_tensor(state["step"], dtype=torch.float32)
            by_device.setdefault(count.device, []).append(count)
    return max((int(torch.stack(counts).max()) for counts in by_device.values()), default=0)


def _prepare(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int | None) -> dict[str, Any]:
    """Adam's state of a parameter, made as Adam itself does where there is none; `steps` sets its count.

    The count is a number, or a tensor: of a fused Adam on the device of the parameter, else on the host. A checkpoint
    has the number only, so that what one kind has written the others read.
    """
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        state |= {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
        counted = isinstance(optimizer, torch.optim.AdamW)
        device = parameter.device if optimizer.defaults.get("fused") else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device) if counted else 0
    if steps is not None:
        count = state["step"]
        state["step"] = torch.full_like(count, float(steps)) if isinstance(count, Tensor) else steps
    return state


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def module_pieces(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int, world: int, steps: int | None = None
) -> Iterator[Piece]:
    """Pieces where the parameters of the module are what the optimizer steps on: single, ddp, fsdp and hsdp.

    Args:
        module: The LightningModule.
        optimizer: Over its parameters; None: weights only.
        rank, world: This rank; of equal copies each rank owns about as many elements.
        steps: Before a load: set Adam's count.
    """
    owner = _owners({name: p.numel() for name, p in module.named_parameters() if not isinstance(p, DTensor)}, world)
    copies, copy = _copies(module)
    copy_of = _owners({name: p.numel() for name, p in module.named_parameters() if isinstance(p, DTensor)}, copies)
    groups = optimizer.param_groups if optimizer is not None else []
    trained = {parameter for group in groups for parameter in group["params"]}
    assert trained <= set(module.parameters()), "the optimizer steps on parameters that the module does not have"
    for name, parameter in module.named_parameters():
        start = 0
        if isinstance(parameter, DTensor):
            local_shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            # Rows of dim 0, so flat elements in one run; a rank beyond the last row has none.
            start = offset[0] * math.prod(parameter.shape[1:]) if math.prod(local_shape) else 0
        tensors = {WEIGHT: _local(parameter.detach())}
        if optimizer is not None and parameter in trained:
            state = _prepare(optimizer, parameter, steps)
            tensors |= {kind: _local(state[kind]) for kind in MOMENTS}
        owned = copy_of[name] == copy if isinstance(parameter, DTensor) else owner[name] == rank
        flat = {kind: tensor.view(-1) for kind, tensor in tensors.items()}
        yield Piece(name, tuple(parameter.shape), start, flat, owned and flat[WEIGHT].numel() > 0)


def _copies(module: nn.Module) -> tuple[int, int]:
    """How many groups of ranks hold all rows, and the number of this rank's group; under fsdp there is one."""
    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 2:
            return parameter.device_mesh.size(0), parameter.device_mesh.get_local_rank(0)
    return 1, 0


def _owners(sizes: dict[str, int], world: int) -> dict[str, int]:
    """Which rank, or group, writes each of the parameters that all have: largest first, to the one with the least."""
    loads = [0] * world
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners


def _frozen_values(parameter: Tensor, held: Tensor) -> Tensor:
    """Frozen weights in float32, to be saved as they were given: on the host where the engine holds them in bf16.

    Args:
        parameter: Keeps them.
        held: What the engine computes with.
    """
    if held.dtype == torch.float32:
        return held
    if not hasattr(parameter, _VALUES):
        setattr(parameter, _VALUES, held.float().cpu())
    values: Tensor = getattr(parameter, _VALUES)
    return values


def _refresh_frozen(engine: Any) -> None:
    for parameter in engine.module.parameters():
        if hasattr(parameter, _VALUES):
            held = getattr(parameter, "ds_tensor", parameter).detach()
            held.view(-1).copy_(getattr(parameter, _VALUES))


def zero12_pieces(engine: Any, steps: int | None = None, moments: bool = True) -> Iterator[Piece]:
    """Pieces of ZeRO 1 and 2: the fragments of fp32 weights in this rank's flat partition of each group.

    Arguments as in `zero3_pieces`.
    """
    outer = engine.optimizer
    frozen = {name: p.numel() for name, p in engine.module.named_parameters() if not p.requires_grad}
    owner = _owners(frozen, dist.get_world_size())
    for name, parameter in engine.module.named_parameters():
        shape = tuple(parameter.shape)
        mapping = getattr(parameter, "_hp_mapping", None)
        if not parameter.requires_grad:
            # Every rank computes with all frozen weights; who writes one keeps its digits.
            owned, held = owner[name] == engine.global_rank, parameter.detach().view(-1)
            yield Piece(name, shape, 0, {WEIGHT: _frozen_values(parameter, held) if owned else held}, owned)
        elif mapping is not None:
            partition = outer.single_partition_of_fp32_groups[mapping.param_group_index]
            place = mapping.hp_fragment_address
            tensors = {WEIGHT: mapping.hp_fragment.detach()}
            if moments:
                state = _prepare(outer.optimizer, partition, steps)
                tensors |= {kind: state[kind].narrow(0, place.start, place.numel) for kind in MOMENTS}
            yield Piece(name, shape, mapping.lp_fragment_address.start, tensors)


def refresh_zero12(engine: Any) -> None:
    """Bring the weights of the module to those of the fp32 partitions, and let all ranks have them."""
    engine.optimizer.update_lp_params()
    _refresh_frozen(engine)


def zero3_pieces(engine: Any, steps: int | None = None, moments: bool = True) -> Iterator[Piece]:
    """Pieces of ZeRO 3: this rank's flat shard of every parameter, without the padding of the last one.

    Args:
        engine: DeepSpeed's.
        steps: Before a load: set Adam's count.
        moments: With those of the optimizer, which are made where there are none.
    """
    outer = engine.optimizer
    rank = engine.global_rank
    for name, parameter in engine.module.named_parameters():
        shape, total = tuple(parameter.ds_shape), int(parameter.ds_numel)
        shard = int(parameter.ds_tensor.numel())
        start = min(rank * shard, total)
        count = min(shard, total - start)
        if not parameter.requires_grad:
            tensors = {WEIGHT: _frozen_values(parameter, parameter.ds_tensor.detach())}
        else:
            group, at, _ = outer.grad_position[outer.get_param_id(parameter)]
            partition = outer.fp32_partitioned_groups_flat[group]
            tensors = {WEIGHT: partition.detach().narrow(0, at, shard)}
            if moments:
                state = _prepare(outer.optimizer, partition, steps)
                tensors |= {kind: state[kind].narrow(0, at, shard) for kind in MOMENTS}
        if count > 0:
            yield Piece(name, shape, start, {kind: tensor[:count] for kind, tensor in tensors.items()})


def refresh_zero3(engine: Any) -> None:
    """Bring the compute weights to those of the fp32 shards, and gather anew what ZeRO 3 keeps whole."""
    outer = engine.optimizer
    _refresh_frozen(engine)
    # The order of its own step.
    outer._partition_all_parameters()
    for group in range(len(outer.fp16_groups)):
        outer._reassign_or_swap_out_partitioned_parameters(group)
    # A second copy (hpZ) has the weights of before; the next forward pass makes it anew.
    for parameter in engine.module.parameters():
        parameter.ds_secondary_tensor = None
    if outer.persistent_parameters:
        outer.persistent_parameters[0].all_gather(outer.persistent_parameters)

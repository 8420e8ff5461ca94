"""Lightning strategies behind `parallel=`: single, ddp, ZeRO 1-3 with and without offload, fsdp, hsdp.

What a step computes is the same under all of them; they differ in where weights, gradients and optimizer live.
DeepSpeed runs on a CPU too (gloo), which is what the tests use; Lightning's own strategy insists on CUDA.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from swift.config.launcher import shard_group
from swift.config.schema import Config, ParallelConfig
from swift.parallel.base import CheckpointingStrategy
from swift.parallel.checkpoint.files import Piece
from swift.parallel.checkpoint.pieces import optimizer_steps, refresh_zero3, refresh_zero12, zero3_pieces, zero12_pieces
from swift.parallel.checkpoint.saver import Saver
from swift.parallel.environment import Ranks, build_accelerator, check_place
from swift.parallel.ranks import Place
from swift.parallel.setup import Setup
from swift.parallel.step_gate import DeepSpeedStepGate, SkipRule, leave_out
from swift.plan.memory import MB, reduce_bucket
from swift.utils import device
from swift.utils.errors import UserError

SECONDARY = "zero_hpz_partition_size"


class _ClipsByNorm:
    """Precision plugin that clips by the global norm and keeps what it was."""

    norm: Tensor | None = None
    skip: SkipRule | None = None

    def clip_gradients(self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = None) -> None:
        """Scale all gradients so that their norm is `clip_val` at most."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_val)
        self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.skip is not None:
            leave_out(optimizer, self.skip(self.norm))


class _Float32(_ClipsByNorm, Precision):
    pass


class _Bf16(_ClipsByNorm, MixedPrecision):
    """Weights and optimizer in float32, matrix products in bf16 by autocast."""


class _Single(CheckpointingStrategy, SingleDeviceStrategy):
    pass


class _Ddp(CheckpointingStrategy, DDPStrategy):
    pass


class _Fsdp(CheckpointingStrategy, DDPStrategy):
    """Torch's fully_shard over the blocks of the model and over what is left: each rank holds rows of every weight.

    Under hsdp the ranks of a group share the rows, and every group has all of them: weights are gathered inside a
    group, gradients summed inside it and then, row by row, across the groups.

    Args:
        group: Ranks of a group, neighbours in their order; all: fsdp.
        narrow: Compute in bf16; weights, gradients and optimizer stay in float32.
        kwargs: Of Lightning's DDP strategy, whose processes this uses.
    """

    def __init__(self, group: int, narrow: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.group = group
        bf16 = torch.bfloat16 if narrow else None
        self.mixed = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32 if narrow else None)

    def materialize(self) -> None:
        """Shard a module on the meta device, then give each rank memory for its part."""
        # A reconstruction is a view; nobody writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.shard(self.lightning_module.model, self.root_device.type, self.world_size)
        super().materialize()

    def shard(self, model: Any, kind: str, ranks: int) -> None:
        """Spread a model over the ranks of a device's kind."""
        mesh = init_device_mesh(kind, (ranks,))
        if self.group < ranks:
            mesh = init_device_mesh(kind, (ranks // self.group, self.group), mesh_dim_names=("copies", "shard"))
        for part in (*self.layers(model), *model.blocks(), model):
            fully_shard(part, mesh=mesh, mp_policy=self.mixed)
        for method in getattr(model, "other_forwards", ()):
            register_fsdp_forward_method(model, method)

    def layers(self, model: Any) -> Iterator[torch.nn.Module]:
        """Linear layers that are gathered by themselves: those of blocks over parallel.unit_mb, or that are over it."""
        limit = self.parallel.unit_mb
        if limit is None:
            return
        width = 4 if self.mixed.param_dtype is None else 2

        def large(part: torch.nn.Module) -> bool:
            return sum(parameter.numel() for parameter in part.parameters()) * width > limit * MB

        inside = {layer for block in model.blocks() for layer in block.modules()}
        inside_large = {layer for block in model.blocks() if large(block) for layer in block.modules()}
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear) and (layer in inside_large if layer in inside else large(layer)):
                yield layer

    def pieces(self, steps: int | None = None, moments: bool = True) -> Iterable[Piece]:
        """The pieces that this rank holds; before a load, `steps` sets Adam's count."""
        self.reshard()
        return super().pieces(steps, moments)

    @contextmanager
    def kept_gradients(self) -> Iterator[None]:
        """A context for passes between the gradients of a step and that step, which must not find whole weights."""
        with super().kept_gradients():
            try:
                yield
            finally:
                self.reshard()

    def reshard(self) -> None:
        """Give up whole weights: after a forward pass alone the outermost ones are left, and no step changes them."""
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def configure_ddp(self) -> None:
        """Nothing: the module is sharded already, in place."""
        assert any(isinstance(parameter, DTensor) for parameter in self.lightning_module.parameters())


class _DeepSpeedPrecision(DeepSpeedPrecision):
    """Leaves inputs and targets in float32 (the model casts its tokens), and scales for accumulation once."""

    def convert_input(self, data: Any) -> Any:
        """Unchanged: targets in bf16 would lose digits of the loss."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning has divided the loss by the accumulated micro-batches; the engine must not do it again."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class _DeepSpeed(DeepSpeedStepGate, CheckpointingStrategy, DeepSpeedStrategy):
    """DeepSpeed on any device torch.distributed has a backend for."""

    @property
    def root_device(self) -> torch.device:  # type: ignore[override]  # the base only says that there is one
        """The device of this rank; the CPU gets an index because DeepSpeed asks for one."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Join the other ranks: Lightning's own version refuses everything but CUDA."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As Lightning's, without its demand that each rank sees the devices of all."""
        import deepspeed

        if self.root_device.type == "cpu":
            # A faster all-reduce for inference. Training never calls it, and compiling it takes half a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """Wrap the model; with offload the optimizer becomes DeepSpeed's vectorized one, in the same groups."""
        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        if "offload_optimizer" in zero and self.config["zero_force_ds_cpu_optimizer"]:
            optimizer = cpu_adam(optimizer)
            if lr_scheduler is not None:
                lr_scheduler.optimizer = optimizer
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def pieces(self, steps: int | None = None, moments: bool = True) -> Iterable[Piece]:
        """The pieces that this rank holds; before a load, `steps` sets Adam's count."""
        return (zero3_pieces if self.zero_stage_3 else zero12_pieces)(self.deepspeed_engine, steps, moments)

    def materialize(self) -> None:
        """Give a module on the meta device memory; under ZeRO 3 module by module, each left as this rank's shard."""
        if not self.zero_stage_3:
            super().materialize()
            return
        import deepspeed
        from deepspeed.utils import groups

        self._init_config_if_needed()
        assert isinstance(self.config, dict)
        # Made once here: DeepSpeed would make it for each module, and refuses the second time.
        if (group := self.config["zero_optimization"].get(SECONDARY)) and not self._secondary():
            groups._create_zero_param_parallel_group(group)
        secondary = self._secondary()
        narrow = self.precision_plugin.precision != "32-true"
        # Inner modules first: DeepSpeed takes all parameters below a module, and those must have memory.
        for module in reversed(list(self.lightning_module.modules())):
            own = list(module.named_parameters(recurse=False))
            for name, parameter in own:
                zeros = torch.zeros_like(
                    parameter, device=self.root_device, dtype=torch.bfloat16 if narrow else torch.float32
                )
                setattr(module, name, torch.nn.Parameter(zeros, parameter.requires_grad))
            if own:
                deepspeed.zero.Init(module=module, config_dict_or_path=self.config, zero_param_parallel_group=secondary)
            for name, buffer in module.named_buffers(recurse=False):
                assert not buffer.is_meta or name not in module.state_dict(), f"{name} would be lost"
        # Tables that are no parameters are made anew from what they are functions of.
        for module in self.lightning_module.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                module._apply(lambda t: torch.empty_like(t, device=self.root_device), recurse=False)

    @staticmethod
    def _secondary() -> Any:
        """The ranks with which this one shares a second copy of the weights (hpZ), None without."""
        from deepspeed.utils import groups

        return groups._get_zero_param_intra_parallel_group()

    def _set_node_environment_variables(self) -> None:
        super()._set_node_environment_variables()
        # DeepSpeed takes it for the number of the device, which is 0 where each rank sees one only.
        os.environ["LOCAL_RANK"] = str(self.root_device.index)

    def refresh(self) -> None:
        """After a load: the engine makes its compute weights from the fp32 ones."""
        (refresh_zero3 if self.zero_stage_3 else refresh_zero12)(self.deepspeed_engine)

    def optimizer_steps(self) -> int:
        """What Adam's bias correction has counted."""
        return optimizer_steps(self.deepspeed_engine.optimizer.optimizer)


def cpu_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for the CPU over the groups of an AdamW; compiled on first use.

    Raises:
        UserError: it cannot be compiled here.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    assert isinstance(optimizer, torch.optim.AdamW), type(optimizer)
    try:
        made: torch.optim.Optimizer = DeepSpeedCPUAdam(optimizer.param_groups, adamw_mode=True)
    except Exception as error:  # DeepSpeed's builder raises whatever its tools do
        cause = error.__cause__ or error
        raise UserError(
            "parallel=zero3_offload: DeepSpeed's CPU Adam cannot be compiled here "
            f"({str(cause).splitlines()[0] if str(cause) else type(cause).__name__}): install a C++ compiler (g++), "
            "Python's headers (python3-dev) and ninja, or go on with torch's slower one: parallel.cpu_adam=false"
        ) from error
    return made


def deepspeed_config(cfg: ParallelConfig, bucket: float, element_bytes: int, group: int = 0) -> dict[str, Any]:
    """DeepSpeed's settings for a ZeRO stage.

    Args:
        cfg: `parallel=`.
        bucket: Bytes of a bucket in which gradients are reduced.
        element_bytes: Bytes of a gradient element: DeepSpeed counts buckets in elements.
        group: ZeRO 3: ranks that share a second copy of the weights; 0: there is none.
    """
    gather = int(cfg.gather_bucket_mb * MB / element_bytes)
    wide = cfg.fp32_gradients and element_bytes == 2
    # ZeRO 3 holds its bucket in the type in which it is sent, ZeRO 2 in that of the weights.
    reduce = int(bucket / (4 if wide and cfg.zero_stage == 3 else element_bytes))
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": cfg.overlap,
        # ZeRO 2 would divide by the ranks in bf16, before the sum: it rounds where they are no power of two.
        "reduce_scatter": not (wide and cfg.zero_stage == 2),
        "reduce_bucket_size": reduce,
    }
    if cfg.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = gather
        zero |= {SECONDARY: group} if group else {}
    else:
        zero["allgather_bucket_size"] = gather
    for name, wanted in (("offload_optimizer", cfg.offload_optimizer), ("offload_param", cfg.offload_parameters)):
        if wanted:
            zero[name] = {"device": "cpu", "pin_memory": device.count() > 0}
    in_fp32 = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}} if wide else {}
    return {
        **in_fp32,
        "zero_optimization": zero,
        # Torch's AdamW is untested by name only.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": cfg.cpu_adam,
    }


def build_strategy(setup: Setup) -> dict[str, Any]:
    """The arguments of the Trainer that say how a run is spread.

    Args:
        setup: Of the run.

    Returns:
        strategy, accelerator, devices, num_nodes (precision is part of the strategy).

    Raises:
        UserError: the launcher has started another number of ranks than the settings say.
    """
    cfg, place, accelerator, precision = setup.cfg, setup.place, setup.accelerator, setup.precision
    parallel = cfg.parallel
    check_place(parallel, place)
    plugin: Precision = _Float32()
    if precision == "bf16-mixed":
        plugin = _Bf16("bf16-mixed", accelerator)
    if parallel.name == "single":
        alone = Place(0, 0, 1, 1, "none")
        single = _Single(device.torch_device(accelerator), precision_plugin=plugin)
        single.parallel, single.saver = parallel, build_saver(cfg, alone)
        return {"strategy": single, "accelerator": build_accelerator(accelerator, alone), "devices": 1}
    environment = Ranks(place)
    shared: dict[str, Any] = {
        "cluster_environment": environment,
        "timeout": timedelta(minutes=parallel.timeout_minutes),
        "process_group_backend": device.COLLECTIVES[accelerator],
    }
    narrow = setup.narrow
    bucket = reduce_bucket(cfg, setup.geometry.sizes[0], narrow)
    strategy: _DeepSpeed | _Fsdp | _Ddp
    if parallel.zero_stage:
        # DeepSpeed looks for its device when it is imported.
        os.environ["DS_ACCELERATOR"] = accelerator
        group = shard_group(parallel, place.world, place.local_world)
        config = deepspeed_config(parallel, bucket, 2 if narrow else 4, group)
        strategy = _DeepSpeed(config=config, precision_plugin=_DeepSpeedPrecision(precision), **shared)  # type: ignore[arg-type]
    elif parallel.name in ("fsdp", "hsdp"):
        group = place.world if parallel.name == "fsdp" else shard_group(parallel, place.world, place.local_world)
        strategy = _Fsdp(group, narrow, precision_plugin=_Float32(), **shared)
    else:
        # Buffers are tables, the same on all ranks: nothing to broadcast. Gradients live in the reduction buckets;
        # those that were put aside get their place there again in the next backward pass.
        buckets: dict[str, Any] = {
            "broadcast_buffers": False,
            "gradient_as_bucket_view": True,
            "bucket_cap_mb": bucket / MB,
        }
        strategy = _Ddp(precision_plugin=plugin, **buckets, **shared)
    strategy.parallel, strategy.saver = parallel, build_saver(cfg, place)
    return {
        "strategy": strategy,
        "accelerator": build_accelerator(accelerator, place),
        "devices": place.local_world,
        "num_nodes": place.nodes,
    }


def build_saver(cfg: Config, place: Place) -> Saver:
    """What writes the checkpoints of this rank."""
    background, seconds = cfg.trainer.checkpoint_background, 60 * cfg.parallel.timeout_minutes
    return Saver(place.rank, place.world, cfg.trainer.keep_checkpoints, background, seconds)

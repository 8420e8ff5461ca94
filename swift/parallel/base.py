"""What all strategies of swift add to Lightning's: checkpoints of named pieces, and the step gate."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from swift.config.schema import ParallelConfig
from swift.models.init import fill
from swift.parallel.checkpoint.files import WEIGHT, Manifest, Piece
from swift.parallel.checkpoint.pieces import module_pieces, optimizer_steps, parameter_shapes
from swift.parallel.checkpoint.saver import Saver, restore
from swift.parallel.recompute import prepare_blocks
from swift.parallel.step_gate import StepGate

log = logging.getLogger(__name__)


class CheckpointingStrategy(StepGate):
    """A Lightning strategy that saves and loads named pieces; mixed into each strategy of swift.

    `trainer.save_checkpoint(FOLDER)` and `trainer.fit(ckpt_path=FOLDER)` take the folder of all checkpoints of a run.
    """

    parallel: ParallelConfig
    saver: Saver
    root_device: torch.device
    lightning_module: Any
    model: Any
    _forward_redirection: Any
    optimizers: list[torch.optim.Optimizer]
    precision_plugin: Any

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as Lightning does; a module on the meta device gets memory before and its initial values after that.

        Each rank draws the elements that it holds, in float32 also where the engine computes in bf16.
        """
        module, self.saver.where = self.lightning_module, self.root_device
        prepare_blocks(module.model, self.parallel)
        empty = any(parameter.is_meta for parameter in module.parameters())
        if empty:
            self.materialize()
        super().setup(trainer)  # type: ignore[misc]  # of the Lightning strategy this is mixed into
        if empty:
            values, seed, first = module.initial_values(), module.cfg.seed, module.first_weights
            for piece in self.pieces(moments=False):
                if first is not None and piece.name in first.shapes:
                    piece.tensors[WEIGHT].copy_(first.read(piece.name, piece.start, piece.stop))
                else:
                    fill(piece.tensors[WEIGHT], values[piece.name], seed, piece.name, piece.start)
            self.refresh()

    def materialize(self) -> None:
        """Give a model on the meta device memory on this rank's device. The metrics beside it have values already."""
        self.lightning_module.model.to_empty(device=self.root_device)
        with torch.no_grad():
            for parameter in self.lightning_module.parameters():
                parameter.zero_()

    def pieces(self, steps: int | None = None, moments: bool = True) -> Iterable[Piece]:
        """The pieces that this rank holds; before a load, `steps` sets Adam's count."""
        saver, optimizer = self.saver, self.optimizers[0] if moments else None
        return module_pieces(self.lightning_module, optimizer, saver.rank, saver.world, steps)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the module through whatever holds its weights, as Lightning calls its steps."""
        if self.model is self.lightning_module:
            return getattr(self.lightning_module, method)(*args)
        return self._forward_redirection(self.model, self.lightning_module, method, *args)

    def refresh(self) -> None:
        """After a load: nothing, where the pieces are the module's own weights."""

    def optimizer_steps(self) -> int:
        """What Adam's bias correction has counted."""
        return optimizer_steps(self.optimizers[0])

    def gradient_norm(self) -> Tensor | None:
        """Global norm of the gradients of the last optimizer step before clipping, None before the first."""
        norm: Tensor | None = self.precision_plugin.norm
        return norm

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Always: engines take the weights apart in their set-up."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Never: `load_checkpoint` has done it."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the pieces hold the weights."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the pieces hold the moments."""
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint of Lightning's state and of the pieces; returns while files are still being written."""
        dropped = ("state_dict", "optimizer_states", "loops", "lr_schedulers", "score")
        draft = Manifest(
            step=checkpoint["global_step"],
            score=checkpoint.get("score"),
            state={name: value for name, value in checkpoint.items() if name not in dropped},
            shapes={name: list(shape) for name, shape in parameter_shapes(self.lightning_module).items()},
            files={},
            ranges={},
            world=self.saver.world,
            optimizer_steps=self.optimizer_steps(),
        )
        self.saver.save(Path(filepath), list(self.pieces()), draft)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the pieces from the latest whole checkpoint of a folder.

        Returns:
            Lightning's state, the counters of its loops made from the optimizer step: they count micro-batches, and a
            run may go on with others.

        Raises:
            UserError: no whole checkpoint, or one of another model.
        """
        saver = self.saver
        path, manifest = restore(
            Path(checkpoint_path),
            parameter_shapes(self.lightning_module),
            lambda steps: list(self.pieces(steps)),
            saver.rank,
            saver.world,
        )
        self.refresh()
        rank_zero_only(log.info)("going on from %s", path)
        trainer = self.lightning_module.trainer
        schedules = [set_schedule(config.scheduler, manifest.step) for config in trainer.lr_scheduler_configs]
        return manifest.state | {
            "loops": loops_at(trainer, manifest.step),
            "lr_schedulers": schedules,
            "state_dict": {},
        }


def set_schedule(scheduler: Any, step: int) -> dict[str, Any]:
    """Set the rates of a LambdaLR's optimizer to those of optimizer step `step`; returns the schedule's state there."""
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state: dict[str, Any] = scheduler.state_dict()
    return state | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}


def loops_at(trainer: pl.Trainer, step: int) -> dict[str, Any]:
    """State of Lightning's loops after `step` optimizer steps and the validation due there, in the endless epoch."""
    accumulate, loop = trainer.accumulate_grad_batches, trainer.fit_loop
    state = loop.state_dict()

    def count(key: str, done: int, *path: str) -> None:
        place = state[key]
        for name in path:
            place = place[name]
        for span in ("total", "current"):
            place[span] = dict.fromkeys(place[span], done)

    validated = step * accumulate % int(trainer.val_check_interval) == 0
    # Lightning adds the step of a validation when it passes the place where that has been done already.
    state["epoch_loop.state_dict"] = {"_batches_that_stepped": step - validated}
    count("epoch_loop.batch_progress", step * accumulate)
    count("epoch_loop.scheduler_progress", step)
    for name in ("step", "zero_grad"):
        count("epoch_loop.automatic_optimization.optim_progress", step, "optimizer", name)
    count("epoch_loop.val_loop.batch_progress", 1)
    state["epoch_progress"]["total"] |= {"ready": 1, "started": 1}
    state["epoch_progress"]["current"] |= {"ready": 1, "started": 1}
    return {"fit_loop": state}

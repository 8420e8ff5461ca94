"""From settings to objects: the only wiring, in plain Python."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from swift.config.compose import CHECKPOINTS, FROZEN, freeze
from swift.config.schema import Config
from swift.data.locate import store_path
from swift.data.module import ClipDataModule
from swift.data.store.spaces import OWN
from swift.data.task_maps.module import MapDataModule
from swift.data.task_module import TargetDataModule, class_weights
from swift.evaluate.judge import figures
from swift.evaluate.map_judge import map_figures
from swift.models.v1 import INPUT
from swift.parallel.checkpoint.init_from import contract_differences
from swift.parallel.checkpoint.read import TensorWeights
from swift.parallel.checkpoint.saver import SaveCheckpoints
from swift.parallel.setup import Setup
from swift.parallel.strategies import build_strategy
from swift.plan.devices import recognise
from swift.plan.flops import BrainCosts, step_flops
from swift.plan.memory import gradient_bytes, host_bytes, optimizer_bytes, sharding_of, weight_bytes
from swift.train.base import TrainingModule
from swift.train.callbacks.guard import Guard
from swift.train.callbacks.log import JsonlLogger, TrimMetrics
from swift.train.callbacks.monitor import Monitor
from swift.train.callbacks.phases import Phases
from swift.train.callbacks.progress import ClipProgress
from swift.train.callbacks.provenance import Provenance
from swift.train.callbacks.signals import Heartbeat, StopOnSignal
from swift.train.callbacks.throughput import Throughput
from swift.train.finetune import FinetuneModule
from swift.train.map_task import MapModule
from swift.train.pretrain import PretrainModule
from swift.train.scan_maps import ScanMaps, shared_maps
from swift.utils import device
from swift.utils.errors import UserError

log = logging.getLogger(__name__)


def build_data(cfg: Config) -> ClipDataModule:
    """The DataModule over the store of `cfg.data`; with labels, where the task has a target."""
    path = store_path(cfg.data, cfg.seed)
    if cfg.task.target is not None:
        kind = MapDataModule if cfg.task.target.kind == "map" else TargetDataModule
        data: ClipDataModule = kind(cfg.data, cfg.task, path, seed=cfg.seed)
    else:
        data = ClipDataModule(cfg.data, path, seed=cfg.seed)
    if len(data.store.placements) > 1 and cfg.model.position in ("absolute", "rope_global"):
        raise UserError(
            f"data.mixture: stores of several spaces ({', '.join(data.store.placements)}) and a model with a table of "
            f"positions (model.position={cfg.model.position}): a voxel is not the same place in "
            "all of them; take model.position=rope"
        )
    return data


def make_module(cfg: Config, empty: bool = False) -> TrainingModule:
    """The module of a run: pre-training, or a task with a target."""
    if cfg.data.brain == "cohort" and cfg.model.cohort is None:
        raise UserError(
            "data.brain=cohort: only training and submitting fill in model.cohort; take data.brain=scan here"
        )
    if cfg.task.target is None:
        return PretrainModule(cfg, empty)
    return (MapModule if cfg.task.target.kind == "map" else FinetuneModule)(cfg, empty)


def build_module(setup: Setup, empty: bool = False) -> TrainingModule:
    """The LightningModule, its weights drawn from the run's seed.

    Args:
        setup: Of the run.
        empty: On the meta device: the strategy that trains it draws them, each rank the part that it holds.

    Raises:
        UserError: the architecture does not fit the grid, or its states do not fit this machine's memory.
    """
    clips = setup.place.world * setup.cfg.data.batch_size
    if setup.cfg.task.loss == "contrastive" and clips < 2:
        raise UserError(
            f"task.loss=contrastive: data.batch_size={setup.cfg.data.batch_size} on {setup.place.world} rank is one "
            "clip at a time, with nobody to tell it from; at least 2 are needed in all"
        )
    pl.seed_everything(setup.cfg.seed, verbose=False)
    try:
        module = make_module(setup.cfg, empty=True)
    except ValueError as error:
        raise UserError(str(error)) from error
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    check_memory(setup, module.parameter_count, trained)
    if not empty:
        module.fill()
    return module


def tell(module: TrainingModule, data: ClipDataModule) -> None:
    """Let module and data know of each other: whom the weights have seen; labels, and how to judge a validation.

    Raises:
        UserError: a test subject that the weights of init= have seen, or shared maps of another space.
    """
    changed = contract_differences(module.first_contract, data.contract() | data.beside_contract())
    if changed:
        v1 = module.first_contract.get("placement") == INPUT["placement"] and data.data.layout != "swift_v1"
        hint = "; data.layout=swift_v1 data.normalization=zscore_global gives what v1 was trained on" if v1 else ""
        log.warning("init=%s: clips differ from those of its training: %s%s", module.cfg.init, ", ".join(changed), hint)
    if not isinstance(data, TargetDataModule):
        if module.seen_before is None:
            log.warning(
                "init=%s does not say which subjects it was trained on: what is trained from it cannot say it either",
                module.cfg.init,
            )
        data.seen_before = list(module.seen_before or [])
        give_maps(module, data)
        return
    assert isinstance(module, FinetuneModule)
    if module.cfg.init is None and module.cfg.task.adapt != "scratch":
        log.warning("task.adapt=%s without init=: the encoder stays at its random weights", module.cfg.task.adapt)
    if module.first_weights is not None:
        data.check_seen(module.seen_before, str(module.cfg.init))
    info: dict[str, Any] = {"mean": data.scaling.mean, "std": data.scaling.std}
    if data.labels.classes:
        weights = class_weights(module.cfg.task, data.class_counts())
        info = {"classes": data.labels.classes, "class_weights": weights.tolist()}
    if isinstance(module, MapModule):
        assert isinstance(data, MapDataModule)
        module.target_info = data.describe()
        module.cells = torch.from_numpy(data.space.cells)
        module.map_figures = map_figures(data)
    else:
        module.target_info = info
        module.figures = figures(data, module.cfg.task.loss)
    if module.cfg.task.courses:
        give_maps(module, data)


def give_maps(module: TrainingModule, data: ClipDataModule) -> None:
    """Spatial maps from the training frames: first values of shared ones, or a maker of each scan's own.

    Raises:
        UserError: shared maps of init= belong to another space than the scans.
    """
    model = module.cfg.model
    if not model.maps:
        return
    if model.maps_of == "scan":
        assert isinstance(module, PretrainModule | FinetuneModule)
        module.scan_maps = ScanMaps(data, model.maps)
    elif module.first_weights is not None:
        there, here = module.first_contract.get("placement", ""), data.beside_contract()["placement"]
        if there != here or there == OWN:
            raise UserError(
                f"init={module.cfg.init}: its {model.maps} shared maps belong to scans of the space "
                f"'{there or 'not recorded'}', and these scans lie in '{here}': model.maps=0 or model.maps_of=scan "
                "leave them out"
            )
    else:
        made = shared_maps(data, model.maps)
        module.first_weights = TensorWeights({f"model.linear.{name}": value for name, value in made.items()})


def check_memory(setup: Setup, parameters: int, trained: int) -> None:
    """Refuse a model whose training states alone exceed the memory of the device, or that has no part for a rank.

    Args:
        setup: Of the run.
        parameters: Of the model (encoder, mask token and decoder, or head).
        trained: Those of them that have gradients and moments.

    Raises:
        UserError: with both sizes.
    """
    cfg, place, geometry = setup.cfg, setup.place, setup.geometry
    if place.world > parameters:
        raise UserError(f"parallel={cfg.parallel.name}: {place.world} ranks, but the model has {parameters} parameters")
    sharding = sharding_of(cfg, geometry, place.world, setup.narrow, place.local_world)
    # The plan is of pre-training, where all that there is trains; a head is smaller than a decoder.
    planned = geometry.total_parameters
    states = optimizer_bytes(geometry, sharding) + gradient_bytes(geometry, sharding, planned)
    need = weight_bytes(geometry, sharding) * parameters / planned + states * trained / planned
    host = host_bytes(geometry, sharding, trained)
    if setup.accelerator != "cpu":
        _check_fits(cfg, need, device.total_memory(), "a rank", "its GPU")
        need = 0.0
    ranks = f"the {place.local_world} ranks of a node" if place.local_world > 1 else "a rank"
    _check_fits(cfg, (need + host) * place.local_world, psutil.virtual_memory().total, ranks, "this machine")


def _check_fits(cfg: Config, need: float, have: float, who: str, where: str) -> None:
    if need > have:
        raise UserError(
            f"model={cfg.model.name} parallel={cfg.parallel.name}: {who} would need {need / 2**30:.0f} GiB for "
            f"weights, gradients and optimizer, and {where} has {have / 2**30:.0f} GiB: choose a smaller model "
            "or shard it over more devices (python -m swift.plan says what fits)"
        )


def build_callbacks(setup: Setup, overrides: Sequence[str]) -> list[Callback]:
    """Metrics, progress, provenance, the frozen settings, speed and the machine."""
    cfg, run_dir = setup.cfg, Path(setup.cfg.run_dir)
    frozen = FrozenConfig(replace(cfg, resume=None), run_dir / FROZEN)
    throughput = build_throughput(setup)
    timed = [throughput, Phases(cfg.trainer.phases_every, throughput), Monitor()]
    return [TrimMetrics(), ClipProgress(val_key=monitored(cfg)), Provenance(run_dir, overrides), frozen, *timed]


def monitored(cfg: Config, of_task: str = "val/loss") -> str:
    """The metric of a validation that is shown, or by which checkpoints are compared."""
    return "val/l1" if cfg.task.target is None else of_task


def build_throughput(setup: Setup) -> Throughput:
    """Clips/s and FLOP/s of the run; MFU where the peak of its device is known."""
    geometry = setup.geometry
    known = None
    if setup.accelerator != "cpu":
        known = recognise(device.name(), device.total_memory())
    peak = known.peak("bf16" if setup.narrow else "32") if known else None
    task, every = setup.cfg.task, setup.log_every
    one_set = setup.cfg.model.tokens == "box" or setup.cfg.model.cohort is not None
    of_brain = None if one_set else BrainCosts(geometry, task)
    return Throughput(step_flops(geometry, task).total, geometry.tokens, peak, every, of_brain=of_brain)


class FrozenConfig(Callback):
    """Writes the settings of the run when training starts: a run that fails before leaves none behind.

    A resumed run has restored its checkpoint by then, so settings that do not fit it have been refused.
    """

    def __init__(self, cfg: Config, path: Path) -> None:
        self.cfg, self.path = cfg, path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after a checkpoint is restored."""
        if trainer.is_global_zero:
            freeze(self.cfg, self.path)


def build_loggers(cfg: Config, run_dir: Path) -> list[Logger]:
    """metrics.jsonl and TensorBoard; Weights & Biases by option."""
    loggers: list[Logger] = [JsonlLogger(run_dir), TensorBoardLogger(run_dir, name="tensorboard", version="")]
    if cfg.trainer.wandb:
        from lightning.pytorch.loggers import WandbLogger

        try:
            loggers.append(WandbLogger(name=run_dir.name, save_dir=run_dir))
        except ModuleNotFoundError as error:
            raise UserError("trainer.wandb=true needs the extra: pip install 'swift-fmri[wandb]'") from error
    return loggers


def build_trainer(setup: Setup, overrides: Sequence[str]) -> pl.Trainer:
    """The Trainer of a run, with the strategy of `parallel=`.

    Args:
        setup: Of the run.
        overrides: The settings given on the command line, as typed.
    """
    cfg, run_dir = setup.cfg, Path(setup.cfg.run_dir)
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    # Lightning sets its own level when it is imported; its notes on devices and products are not the user's concern.
    for talkative in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    spread = build_strategy(setup)
    saves = SaveCheckpoints(
        run_dir / CHECKPOINTS, spread["strategy"].saver, cfg.trainer.checkpoint_every, monitored(cfg, "val/select")
    )
    guard = None if cfg.guard.action == "off" else Guard(cfg, run_dir, run_dir / CHECKPOINTS)
    trainer = pl.Trainer(
        **spread,
        max_steps=cfg.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=cfg.trainer.accumulate,
        # Infinite: nothing is clipped, but the norm is known.
        gradient_clip_val=cfg.trainer.clip_norm or math.inf,
        val_check_interval=cfg.trainer.val_every * cfg.trainer.accumulate,
        check_val_every_n_epoch=None,
        # A task is judged by subjects, and every one counts.
        limit_val_batches=(cfg.trainer.val_batches or 1.0) if cfg.task.target is None else 1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=setup.log_every,
        logger=build_loggers(cfg, run_dir),
        callbacks=[
            *build_callbacks(setup, overrides),
            # Before what saves: a step that is bad is dealt with first.
            *([guard] if guard is not None else []),
            saves,
            StopOnSignal(saves, guard),
            Heartbeat(run_dir),
        ],
        enable_checkpointing=False,
        default_root_dir=run_dir,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # It waits for the device at every micro-batch; the ranks agree on signals in StopOnSignal.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer

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
from swift.data.module import ClipDataModule
from swift.data.samples import SamplesUnavailable, sample_store
from swift.data.synthetic import synthetic_store
from swift.data.task_module import TargetDataModule, class_weights
from swift.evaluate.judge import figures
from swift.models.encoder import SwinEncoder
from swift.models.v1 import load_v1, read_weights
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.init_from import start_of
from swift.parallel.checkpoint.read import (
    CheckpointWeights,
    FileWeights,
    TensorWeights,
    Weights,
    check_attention,
    find_checkpoint,
    known_of,
)
from swift.parallel.checkpoint.saver import SaveCheckpoints
from swift.parallel.ranks import current_place
from swift.parallel.strategies import build_strategy
from swift.plan.devices import recognise
from swift.plan.flops import model_flops
from swift.plan.geometry import build_geometry
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
from swift.train.finetune import FinetuneModule, make_module
from swift.utils.errors import UserError

log = logging.getLogger(__name__)


def store_path(cfg: Config) -> Path:
    """Folder of the store that `cfg.data` names, made first where it is the sample or a synthetic cohort."""
    if cfg.data.name == "store":
        # Of a mixture the DataModule opens all stores itself.
        return Path(cfg.data.path or cfg.data.mixture[0].path)
    if cfg.data.name == "sample":
        try:
            return sample_store(cfg.data)
        except SamplesUnavailable as error:
            log.warning("sample scans not available (%s): going on with the synthetic cohort instead", error)
    return synthetic_store(cfg.data, cfg.seed)


def build_data(cfg: Config) -> ClipDataModule:
    """The DataModule over the store of `cfg.data`; with labels, where the task has a target."""
    if cfg.task.target is not None:
        return TargetDataModule(cfg.data, cfg.task, store_path(cfg), seed=cfg.seed)
    return ClipDataModule(cfg.data, store_path(cfg), seed=cfg.seed)


def build_module(cfg: Config, empty: bool = False) -> TrainingModule:
    """The LightningModule, its weights drawn from `cfg.seed`.

    Args:
        cfg: Of the run.
        empty: On the meta device: the strategy that trains it draws them, each rank the part that it holds.

    Raises:
        UserError: the architecture does not fit the grid, or its states do not fit this machine's memory.
    """
    check_memory(cfg)
    pl.seed_everything(cfg.seed, verbose=False)
    return make_module(cfg, empty)


def tell(module: TrainingModule, data: ClipDataModule) -> None:
    """Let module and data know of each other: whom the weights have seen; labels, and how to judge a validation.

    Raises:
        UserError: a test subject that the weights of init= have seen.
    """
    if not isinstance(data, TargetDataModule):
        data.seen_before = list(module.seen_before or [])
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
    module.target_info = info
    module.figures = figures(data, module.cfg.task.loss)


def start_from(module: TrainingModule, source: str) -> str:
    """Give a module the weights of another run, of a checkpoint, of an exported file, or of a SwiFT v1 file (encoder).

    A module on the meta device gets them from the strategy that trains it, each rank the part that it holds.

    Returns:
        What was taken, for the log.

    Raises:
        UserError: nothing readable there, or weights that do not fit the model.
    """
    weights: Weights
    try:
        if isinstance(module, FinetuneModule):
            here = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
            weights = start = start_of(Path(source), module.cfg, here)
            module.seen_before, said = start.seen, "; ".join(start.said)
        else:
            weights, said = weights_at(Path(source), module)
            module.seen_before = known_of(weights).get("subjects")
    except ValueError as error:
        raise UserError(f"init={source}: {error}") from error
    module.first_weights = weights
    if not any(parameter.is_meta for parameter in module.parameters()):
        for name, parameter in module.named_parameters():
            if name in weights.shapes:
                parameter.detach().view(-1).copy_(weights.read(name, 0, parameter.numel()))
    return said


def weights_at(path: Path, module: TrainingModule) -> tuple[Weights, str]:
    """Weights for a module from a run, from one checkpoint, or from a file; and what was taken.

    Raises:
        ValueError: there are none, they are damaged, or do not fit.
    """
    weights: Weights
    if not path.is_file():
        if not (path / checkpoint.MANIFEST).is_file() and not checkpoint.exists(path / CHECKPOINTS):
            raise ValueError("neither a file nor a run with a checkpoint")
        weights = CheckpointWeights(*find_checkpoint(path))
    elif path.suffix == ".safetensors":
        weights = FileWeights(path)
    else:
        tensors = read_weights(path)
        if not any(key.startswith("model.encoder.") for key in tensors):
            encoder = SwinEncoder(module.cfg.model, module.cfg.data.grid, module.cfg.data.frames)
            report = load_v1(encoder, tensors)
            taken = {name: value for name, value in encoder.state_dict().items() if name not in report.missing}
            return TensorWeights({f"model.encoder.{name}": value for name, value in taken.items()}), str(report)
        weights = TensorWeights(tensors)
    here = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    checkpoint.compare_shapes("the source", weights.shapes, here)
    if isinstance(weights, CheckpointWeights | FileWeights):
        check_attention(weights, module.cfg.model)
    return weights, f"{len(here)} tensors taken"


def count_parameters(cfg: Config) -> int:
    """Parameters of the model (encoder, mask token and decoder, or head), without allocating them.

    Raises:
        UserError: the architecture does not fit the grid.
    """
    try:
        module = make_module(cfg, empty=True)
    except ValueError as error:
        raise UserError(str(error)) from error
    return sum(parameter.numel() for parameter in module.parameters())


def check_memory(cfg: Config) -> None:
    """Refuse a model whose training states alone exceed the memory of the device, or that has no part for a rank.

    Raises:
        UserError: with both sizes.
    """
    place = current_place()
    parameters = count_parameters(cfg)
    if place.world > parameters:
        raise UserError(f"parallel={cfg.parallel.name}: {place.world} ranks, but the model has {parameters} parameters")
    geometry = build_geometry(cfg.model, (*cfg.data.grid, cfg.data.frames))
    sharding = sharding_of(cfg, geometry, place.world, precision(cfg) == "bf16-mixed")
    need = weight_bytes(geometry, sharding) + optimizer_bytes(geometry, sharding)
    need += gradient_bytes(geometry, sharding, parameters)
    host = host_bytes(geometry, sharding)
    if accelerator(cfg) == "gpu":
        _check_fits(cfg, need, torch.cuda.get_device_properties(0).total_memory, "a rank", "its GPU")
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


def accelerator(cfg: Config) -> str:
    """Lightning's name of the device: cpu or gpu.

    Raises:
        UserError: a GPU is asked for and none is there.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch sees no GPU here; use cpu or auto")
    if cfg.trainer.accelerator == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return cfg.trainer.accelerator


def gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


def precision(cfg: Config) -> str:
    """Lightning's name of the precision; auto is bf16 where a GPU has it in hardware, else float32.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    has_bf16 = accelerator(cfg) == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.trainer.precision == "bf16" and accelerator(cfg) == "gpu" and not has_bf16:
        raise UserError("trainer.precision=bf16: this GPU has no bf16; use 32")
    wanted = cfg.trainer.precision
    return "bf16-mixed" if wanted == "bf16" or (wanted == "auto" and has_bf16) else "32-true"


def build_callbacks(cfg: Config, run_dir: Path, overrides: Sequence[str]) -> list[Callback]:
    """Metrics, progress, provenance, the frozen settings, speed and the machine."""
    frozen = FrozenConfig(replace(cfg, resume=None), run_dir / FROZEN)
    throughput = build_throughput(cfg)
    timed = [throughput, Phases(cfg.trainer.phases_every, throughput), Monitor()]
    return [TrimMetrics(), ClipProgress(val_key=monitored(cfg)), Provenance(run_dir, overrides), frozen, *timed]


def monitored(cfg: Config, of_task: str = "val/loss") -> str:
    """The metric of a validation that is shown, or by which checkpoints are compared."""
    return "val/l1" if cfg.task.target is None else of_task


def build_throughput(cfg: Config) -> Throughput:
    """Clips/s and FLOP/s of the run; MFU where the peak of its device is known."""
    geometry = build_geometry(cfg.model, (*cfg.data.grid, cfg.data.frames))
    device = None
    if accelerator(cfg) == "gpu":
        device = recognise(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)
    peak = device.peak("bf16" if precision(cfg) == "bf16-mixed" else "32") if device else None
    return Throughput(model_flops(geometry).total, geometry.tokens, peak, cfg.trainer.log_every)


def build_guard(cfg: Config, run_dir: Path) -> list[Callback]:
    """What watches loss and gradients, unless that is switched off."""
    return [] if cfg.guard.action == "off" else [Guard(cfg, run_dir, run_dir / CHECKPOINTS)]


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


def build_trainer(cfg: Config, run_dir: Path, overrides: Sequence[str]) -> pl.Trainer:
    """The Trainer of a run, with the strategy of `parallel=`."""
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    # Lightning sets its own level when it is imported; its notes on devices and products are not the user's concern.
    for talkative in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    spread = build_strategy(cfg, accelerator(cfg), precision(cfg))
    saves = SaveCheckpoints(
        run_dir / CHECKPOINTS, spread["strategy"].saver, cfg.trainer.checkpoint_every, monitored(cfg, "val/select")
    )
    return pl.Trainer(
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
        log_every_n_steps=cfg.trainer.log_every,
        logger=build_loggers(cfg, run_dir),
        callbacks=[
            *build_callbacks(cfg, run_dir, overrides),
            # Before what saves: a step that is bad is dealt with first.
            *build_guard(cfg, run_dir),
            saves,
            StopOnSignal(saves),
            Heartbeat(run_dir),
        ],
        enable_checkpointing=False,
        default_root_dir=run_dir,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )

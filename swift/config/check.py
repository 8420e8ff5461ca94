"""Checks of the settings: every mistake that shows before a model is built or a scan is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from swift.config.check_target import check_courses, check_maps_data, check_target
from swift.config.launcher import check_launcher
from swift.config.schema import (
    Config,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TaskConfig,
    TrainerConfig,
)
from swift.config.schema_data import AugmentConfig, DataConfig
from swift.utils.bits import from_text
from swift.utils.cache import REVISION
from swift.utils.errors import UserError, require

CHOICES = {
    "model.position": ("absolute", "rope", "rope_global", "none"),
    "model.attention": ("joint", "factorized"),
    "model.last_stage": ("windowed", "full", "unshifted"),
    "model.order": ("st", "ts"),
    "model.mlp": ("shared", "each"),
    "model.decoder": ("local", "linear"),
    "model.maps_of": ("shared", "scan"),
    "model.tokens": ("box", "brain"),
    "data.name": ("sample", "synthetic", "store"),
    "data.layout": ("swift", "swift_v1"),
    "data.brain": ("scan", "cohort"),
    "data.normalization": ("zscore_voxel", "zscore_global", "percent", "minmax", "robust", "none"),
    "task.mask_kind": ("random", "tube", "temporal", "frames"),
    "task.hidden": ("token", "drop"),
    "task.loss": ("l1", "smooth_l1", "l2", "cross_entropy", "contrastive"),
    "task.adapt": ("scratch", "linear", "attentive", "last_block", "lora", "full"),
    "task.pooling": ("mean", "mean_std", "attention"),
    "task.head": ("pooled", "map_local", "map_unet"),
    "task.average": ("predictions", "features"),
    "task.select": ("loss", "auroc", "balanced_accuracy", "mae", "r", "residual_r"),
    "optimizer.name": ("adamw", "adamw_mup"),
    "parallel.name": ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp", "hsdp"),
    "parallel.activation_checkpointing": ("none", "selective", "block"),
    "guard.action": ("off", "skip", "stop", "rollback"),
    "trainer.precision": ("auto", "32", "bf16"),
    "trainer.accelerator": ("auto", "gpu", "cpu", "cuda", "xpu"),
}


def _check_choices(section: str, cfg: object) -> None:
    for name, choices in CHOICES.items():
        head, field = name.split(".")
        if head == section:
            require(getattr(cfg, field) in choices, name, getattr(cfg, field), "must be one of " + ", ".join(choices))


def _check_positive(name: str, values: Sequence[int], length: int) -> None:
    require(
        len(values) == length and all(value >= 1 for value in values),
        name,
        list(values),
        f"must be {length} positive integers",
    )


def check_model(cfg: ModelConfig) -> None:
    """Raise UserError where the fields of the architecture contradict each other."""
    _check_choices("model", cfg)
    require(cfg.embed_dim >= 1, "model.embed_dim", cfg.embed_dim, "must be at least 1")
    stages = len(cfg.depths)
    require(stages >= 1, "model.depths", cfg.depths, "must name at least one stage")
    _check_positive("model.depths", cfg.depths, stages)
    _check_positive("model.num_heads", cfg.num_heads, stages)
    _check_positive("model.patch_size", cfg.patch_size, 4)
    _check_positive("model.window", cfg.window, 4)
    require(cfg.decoder_dim >= 1, "model.decoder_dim", cfg.decoder_dim, "must be at least 1")
    wide_enough = math.isfinite(cfg.mlp_ratio) and int(cfg.mlp_ratio * cfg.embed_dim) >= 1
    legal = f"must be a number that leaves a hidden layer of model.embed_dim={cfg.embed_dim} at least one channel"
    require(wide_enough, "model.mlp_ratio", cfg.mlp_ratio, legal)
    require(cfg.maps >= 0, "model.maps", cfg.maps, "must be a number of maps, or 0 for none")
    legal = "model=v1 is as it was published: take model.tokens=box, or a size with model/variant=joint or factorized"
    require(cfg.tokens == "box" or cfg.variant != "v1", "model.tokens", cfg.tokens, legal)
    require(cfg.rope_base > 0 and math.isfinite(cfg.rope_base), "model.rope_base", cfg.rope_base, "must be above 0")
    scale = cfg.layer_scale
    require(scale is None or math.isfinite(scale), "model.layer_scale", scale, "must be a finite number or null")
    for name in ("dropout", "attention_dropout", "drop_path"):
        require(0 <= getattr(cfg, name) < 1, f"model.{name}", getattr(cfg, name), "must lie in [0, 1)")
    axes = 4 if cfg.attention == "joint" else 3
    for stage, heads in enumerate(cfg.num_heads):
        width = cfg.embed_dim * 2**stage
        place = f"stage {stage + 1} has width {width}"
        require(width % heads == 0, "model.num_heads", cfg.num_heads, f"{place}, which {heads} heads do not divide")
        if cfg.position.startswith("rope"):
            legal = (
                f"{place}, so a head has {width // heads} channels; rotary positions over {axes} axes need "
                f"an even number, at least {2 * axes}"
            )
            require((width // heads) % 2 == 0 and width // heads >= 2 * axes, "model.num_heads", cfg.num_heads, legal)


def check_data(cfg: DataConfig) -> None:
    """Raise UserError where a clip could not be cut or scaled."""
    _check_choices("data", cfg)
    _check_positive("data.grid", cfg.grid, 3)
    for name in ("frames", "frame_stride", "clip_stride", "batch_size"):
        require(getattr(cfg, name) >= 1, f"data.{name}", getattr(cfg, name), "must be at least 1")
    require(1 <= cfg.revision <= REVISION, "data.revision", cfg.revision, f"legal is 1 to {REVISION}")
    for name in ("workers", "val_gap"):
        require(getattr(cfg, name) >= 0, f"data.{name}", getattr(cfg, name), "must not be negative")
    require(cfg.spacing > 0 and math.isfinite(cfg.spacing), "data.spacing", cfg.spacing, "must be a size in mm above 0")
    legal = "must lie inside (0, 1), or be 0 beside data.split=FILE, which then says what is held out"
    well = 0 < cfg.val_fraction < 1 or (cfg.val_fraction == 0 and cfg.split is not None)
    require(well, "data.val_fraction", cfg.val_fraction, legal)
    require(math.isfinite(cfg.background), "data.background", cfg.background, "must be a finite number")
    if cfg.layout == "swift_v1":
        legal = "data.layout=swift_v1 needs zscore_global, as SwiFT v1 was trained on"
        require(cfg.normalization == "zscore_global", "data.normalization", cfg.normalization, legal)
    _check_sources(cfg)
    _check_augment(cfg.augment)


def _check_sources(cfg: DataConfig) -> None:
    """Which stores, and how much of them."""
    if cfg.name == "store":
        legal = "data=store needs the folder of a store, or data.mixture"
        require(bool(cfg.path) or bool(cfg.mixture), "data.path", cfg.path, legal)
    paths = [cohort.path for cohort in cfg.mixture]
    weights = [cohort.weight for cohort in cfg.mixture]
    require(not paths or cfg.name == "store", "data.mixture", paths, f"needs data=store, not data={cfg.name}")
    require(not paths or not cfg.path, "data.path", cfg.path, "must be null beside data.mixture: name it there too")
    require(len(set(paths)) == len(paths), "data.mixture", paths, "names a store twice")
    legal = "must be numbers above 0 for all cohorts, or null for all"
    some = [weight for weight in weights if weight is not None]
    well = len(some) in (0, len(weights)) and all(w > 0 and math.isfinite(w) for w in some)
    require(well, "data.mixture weights", weights, legal)
    for name in ("max_subjects", "max_frames"):
        value = getattr(cfg, name)
        require(value is None or value >= 1, f"data.{name}", value, "must be at least 1, or null for all")


def _check_augment(cfg: AugmentConfig) -> None:
    for name in ("flip", "affine", "intensity", "noise"):
        require(0 <= getattr(cfg, name) <= 1, f"data.augment.{name}", getattr(cfg, name), "must lie in [0, 1]")
    for name in ("shift", "intensity_scale", "intensity_shift", "noise_std"):
        value = getattr(cfg, name)
        require(value >= 0 and math.isfinite(value), f"data.augment.{name}", value, "must be 0 or more")
    require(0 <= cfg.rotate <= 180, "data.augment.rotate", cfg.rotate, "must lie in [0, 180] degrees")
    require(0 <= cfg.zoom < 1, "data.augment.zoom", cfg.zoom, "must lie in [0, 1)")


def mask_unit(task: TaskConfig, model: ModelConfig) -> list[int]:
    """Voxels x, y, z and frames hidden together, unless the task names a unit: the patch, or what can be dropped."""
    if task.mask_unit is not None:
        return list(task.mask_unit)
    boxes = task.hidden == "drop" and task.mask_kind != "frames"
    return [*droppable(model), model.patch_size[3]] if boxes else list(model.patch_size)


def droppable(model: ModelConfig) -> list[int]:
    """Voxels x, y, z of the smallest box that task.hidden=drop can leave out: a token of stage 3, or of the last."""
    return [size * 2**model.inner_stages for size in model.patch_size[:3]]


def check_task(task: TaskConfig, model: ModelConfig, data: DataConfig) -> None:
    """Raise UserError where the mask does not fit the patches or the clip."""
    require(0 < task.mask_ratio < 1, "task.mask_ratio", task.mask_ratio, "must lie inside (0, 1)")
    unit = mask_unit(task, model)
    _check_positive("task.mask_unit", unit, 4)
    legal = f"must be a multiple of model.patch_size={model.patch_size} on every axis"
    require(all(u % p == 0 for u, p in zip(unit, model.patch_size)), "task.mask_unit", unit, legal)
    volume = [*data.grid, data.frames]
    legal = f"must not be larger than a clip of {volume} voxels and frames"
    require(all(p <= n for p, n in zip(model.patch_size, volume)), "model.patch_size", model.patch_size, legal)
    require(all(u <= n for u, n in zip(unit, volume)), "task.mask_unit", unit, legal)
    counts = [-(-n // u) for n, u in zip(volume, unit)]
    drawn = {"random": counts, "tube": counts[:3]}.get(task.mask_kind, counts[3:])
    legal = f"must leave a clip of {volume} at least 2 units to choose from with task.mask_kind={task.mask_kind}"
    require(math.prod(drawn) >= 2, "task.mask_unit", unit, legal)
    if task.hidden == "drop":
        _check_drop(task, model, data, unit)


def _check_drop(task: TaskConfig, model: ModelConfig, data: DataConfig, unit: list[int]) -> None:
    """Raise UserError where the encoder could not leave hidden units out."""
    what = "with task.hidden=drop"
    require(task.target is None, "task.hidden", "drop", "is for pre-training; a task sees all patches")
    require(model.variant != "v1", "model.variant", "v1", f"is not built {what}; take factorized or joint")
    legal = f"is not built {what}: take tube (the same places in all frames), or frames (all places)"
    require(task.mask_kind in ("tube", "frames"), "task.mask_kind", task.mask_kind, legal)
    legal = f"has no patches to leave out {what}, which has a decoder of its own: leave it at local"
    require(model.decoder == "local", "model.decoder", model.decoder, legal)
    require(model.maps == 0, "model.maps", model.maps, f"is not built {what}: take model.maps=0")
    if task.mask_kind == "frames":
        steps, together = -(-data.frames // model.patch_size[3]), unit[3] // model.patch_size[3]
        legal = f"must fill whole units of {unit[3]} frames (task.mask_unit) {what} task.mask_kind=frames"
        require(steps % together == 0, "data.frames", data.frames, legal)
        return
    cell = droppable(model)
    legal = f"must be a multiple of {cell} voxels in x, y, z (a token of stage {model.inner_stages + 1}) {what}"
    require(all(u % c == 0 for u, c in zip(unit, cell)), "task.mask_unit", unit, legal)
    legal = f"must be a multiple of task.mask_unit={unit[:3]} on every axis {what}"
    require(all(n % u == 0 for n, u in zip(data.grid, unit)), "data.grid", list(data.grid), legal)


def check_tokens(cfg: Config) -> None:
    """Raise UserError for what a model on brain tokens cannot do."""
    check_cohort(cfg)
    if cfg.model.tokens == "box":
        return
    legal = "model.tokens=brain has no tokens outside the brain: take false, or model.tokens=box"
    require(not cfg.task.loss_background, "task.loss_background", True, legal)
    dropped = cfg.task.target is None and cfg.task.hidden == "drop"
    legal = "task.hidden=drop shows units of the brain only, and computes all of their tokens: take model.tokens=box"
    require(not dropped, "model.tokens", "brain", legal)


def check_cohort(cfg: Config) -> None:
    """Raise UserError where the cells of a cohort's brains are not those of the clips."""
    cohort, brain = cfg.model.cohort, cfg.data.brain
    if brain == "scan":
        legal = "the model has the tokens of its cohort (model.cohort): leave it at cohort"
        require(cohort is None, "data.brain", brain, legal)
        return
    legal = "is about the tokens of model.tokens=brain; model.tokens=box computes all"
    require(cfg.model.tokens == "brain", "data.brain", brain, legal)
    legal = "is not built with data.layout=swift_v1, which moves the brains: take scan"
    require(cfg.data.layout == "swift", "data.brain", brain, legal)
    if cohort is None:
        return  # filled in when the stores are opened
    try:
        there = "x".join(map(str, from_text(cohort).shape))
    except ValueError as error:
        raise UserError(f"model.cohort: {error}; leave it out, data.brain=cohort fills it in") from error
    cells = [-(-n // p) for n, p in zip(cfg.data.grid, cfg.model.patch_size)]
    legal = (
        f"has {'x'.join(map(str, cells))} patches, but model.cohort was made for {there}: it belongs to another grid"
    )
    require(there == "x".join(map(str, cells)), "data.grid", list(cfg.data.grid), legal)


def check_optimizer(cfg: OptimizerConfig) -> None:
    """Raise UserError for rates and betas no optimizer can use."""
    _check_choices("optimizer", cfg)
    for name in ("lr", "eps"):
        value = getattr(cfg, name)
        require(0 < value < math.inf, f"optimizer.{name}", value, "must be a finite number above 0")
    legal = "must be a finite number, not negative"
    require(0 <= cfg.weight_decay < math.inf, "optimizer.weight_decay", cfg.weight_decay, legal)
    legal = "must be two numbers in [0, 1)"
    require(len(cfg.betas) == 2 and all(0 <= b < 1 for b in cfg.betas), "optimizer.betas", cfg.betas, legal)
    require(cfg.warmup_steps >= 0, "optimizer.warmup_steps", cfg.warmup_steps, "must not be negative")
    require(0 <= cfg.min_lr_ratio <= 1, "optimizer.min_lr_ratio", cfg.min_lr_ratio, "must lie in [0, 1]")
    if cfg.name == "adamw_mup":
        legal = "optimizer=adamw_mup needs the embed_dim of its base model, at least 1"
        require(cfg.base_width is not None and cfg.base_width >= 1, "optimizer.base_width", cfg.base_width, legal)
    else:
        legal = "must be null: only optimizer=adamw_mup has a base width"
        require(cfg.base_width is None, "optimizer.base_width", cfg.base_width, legal)
        legal = "must be false: only optimizer=adamw_mup has a width to scale eps by"
        require(not cfg.eps_scaled, "optimizer.eps_scaled", cfg.eps_scaled, legal)


def check_mup(cfg: Config) -> None:
    """Raise UserError where the base model of muP cannot exist, or the attention is scaled for another one."""
    base, attention = cfg.optimizer.base_width, cfg.model.attention_base_width
    legal = "must be at least 1, or null"
    require(attention is None or attention >= 1, "model.attention_base_width", attention, legal)
    if base is None:
        return
    legal = f"must equal optimizer.base_width={base} (leave it out and it follows)"
    require(attention == base, "model.attention_base_width", attention, legal)
    try:
        check_model(replace(cfg.model, embed_dim=base))
    except UserError as error:
        raise UserError(f"optimizer.base_width={base}: no model of that width has these heads ({error})") from error


def check_trainer(cfg: TrainerConfig) -> None:
    """Raise UserError for counts that no run can have."""
    _check_choices("trainer", cfg)
    for name in ("max_steps", "val_every", "accumulate", "keep_checkpoints"):
        require(getattr(cfg, name) >= 1, f"trainer.{name}", getattr(cfg, name), "must be at least 1")
    every = cfg.log_every
    require(every is None or every >= 1, "trainer.log_every", every, "must be at least 1, or null")
    for name in ("val_batches", "clip_norm", "threads", "checkpoint_every", "phases_every"):
        require(getattr(cfg, name) >= 0, f"trainer.{name}", getattr(cfg, name), "must not be negative")


def check_guard(cfg: GuardConfig) -> None:
    """Raise UserError for a guard that could not decide anything."""
    _check_choices("guard", cfg)
    for name, least in (("window", 4), ("limit", 1), ("patience", 0), ("records", 0), ("batches", 0)):
        require(getattr(cfg, name) >= least, f"guard.{name}", getattr(cfg, name), f"must be at least {least}")
    for name in ("spike", "weights_mb"):
        value = getattr(cfg, name)
        require(0 <= value < math.inf, f"guard.{name}", value, "must be a finite number, not negative")


def cannot_compile(cfg: Config) -> tuple[str, object, str] | None:
    """The setting with which blocks cannot be compiled, its value and what is legal; None: there is none."""
    parallel, compiled = cfg.parallel, ("parallel.compile", True)
    if cfg.model.tokens == "brain" and cfg.data.brain == "scan":
        legal = "brains differ in their tokens, and each would be a graph of its own: take data.brain=cohort, or false"
        return *compiled, legal
    if cfg.task.target is None and cfg.task.hidden == "drop":
        return *compiled, "is not built with task.hidden=drop: its tokens have other places, or times, in every clip"
    if parallel.activation_checkpointing == "selective":
        how = "selective checkpointing cannot look into a compiled block; use block or none, or parallel.compile=false"
        return "parallel.activation_checkpointing", "selective", how
    if parallel.zero_stage == 3:
        return *compiled, "ZeRO 3 gathers weights inside a block, which is no graph then: take false, or parallel=zero2"
    if parallel.unit_mb is not None:
        return *compiled, "a block gathered layer by layer is no graph: take false, or parallel.unit_mb=null"
    return None


FP32_GRADIENTS = ("zero2", "zero3")
"""Strategies that sum bf16 gradients in bf16 unless they are told otherwise, and can be."""
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def check_parallel(cfg: ParallelConfig) -> None:
    """Raise UserError for settings that contradict the strategy they belong to."""
    _check_choices("parallel", cfg)
    stage = ZERO_STAGES.get(cfg.name, 0)
    require(cfg.zero_stage == stage, "parallel.zero_stage", cfg.zero_stage, f"parallel={cfg.name} means {stage}")
    require(cfg.devices >= 0, "parallel.devices", cfg.devices, "must not be negative (0: all that are there)")
    require(cfg.group >= 0, "parallel.group", cfg.group, "must not be negative (0: the ranks of a node)")
    legal = "only parallel=hsdp and zero3 have groups"
    require(cfg.group == 0 or cfg.name in ("hsdp", "zero3"), "parallel.group", cfg.group, legal)
    legal = "each rank would hold all weights, as under parallel=zero2; give 2 or more, or 0 for none"
    require(cfg.group != 1 or cfg.name != "zero3", "parallel.group", cfg.group, legal)
    require(cfg.nodes >= 1, "parallel.nodes", cfg.nodes, "must be at least 1")
    if cfg.name == "single":
        for name in ("devices", "nodes"):
            value = getattr(cfg, name)
            require(value == 1, f"parallel.{name}", value, "parallel=single has one; choose parallel=ddp or another")
    for name in ("offload_optimizer", "offload_parameters"):
        offloads = getattr(cfg, name)
        require(
            not offloads or stage == 3, f"parallel.{name}", offloads, "only ZeRO 3 offloads: parallel=zero3_offload"
        )
    legal = "weights are offloaded together with their optimizer: parallel.offload_optimizer=true"
    require(cfg.offload_optimizer or not cfg.offload_parameters, "parallel.offload_parameters", True, legal)
    legal = "only parallel=zero2 and zero3 have it (DeepSpeed's ZeRO 1 would take another optimizer)"
    require(not cfg.fp32_gradients or cfg.name in FP32_GRADIENTS, "parallel.fp32_gradients", True, legal)
    legal = "only parallel=fsdp and hsdp gather by unit"
    require(cfg.unit_mb is None or cfg.name in ("fsdp", "hsdp"), "parallel.unit_mb", cfg.unit_mb, legal)
    for name in ("reduce_bucket_mb", "gather_bucket_mb", "unit_mb", "timeout_minutes"):
        value = getattr(cfg, name)
        require(value is None or value > 0, f"parallel.{name}", value, "must be above 0")


def check(cfg: Config, model: bool = True) -> None:
    """All cross-field checks of a composed configuration.

    Args:
        cfg: Settings.
        model: False: those of the model play no part (baselines).

    Raises:
        UserError: names the value and what is legal.
    """
    require(bool(cfg.run_dir), "run_dir", repr(cfg.run_dir), "must name a folder")
    require(0 <= cfg.seed < 1 << 32, "seed", cfg.seed, "must lie in [0, 4294967295]")
    if model:
        check_model(cfg.model)
    check_data(cfg.data)
    _check_choices("task", cfg.task)
    if model:
        check_task(cfg.task, cfg.model, cfg.data)
    check_target(cfg.task, cfg.init)
    check_maps_data(cfg.task, cfg.data)
    if model:
        check_courses(cfg)
        check_tokens(cfg)
    check_optimizer(cfg.optimizer)
    if model:
        check_mup(cfg)
    check_parallel(cfg.parallel)
    check_trainer(cfg.trainer)
    check_guard(cfg.guard)
    if cfg.parallel.compile and (found := cannot_compile(cfg)):
        require(False, *found)
    if cfg.launcher:
        check_launcher(cfg.launcher)

"""Checks of tasks with a target: what is predicted, from which labels, with which head and loss."""

from __future__ import annotations

import math

from swift.config.schema import Config, TargetConfig, TaskConfig
from swift.config.schema_data import DataConfig
from swift.utils.errors import require

TARGET_CHOICES = {
    "kind": ("binary", "multiclass", "regression", "map"),
    "per": ("subject", "frame"),
    "source": ("manifest", "events", "confounds", "nifti"),
    "others": ("refuse", "leave_out"),
    "response": ("shift", "hrf"),
}


def class_names(target: TargetConfig) -> list[str]:
    """Names of the classes, without the other ways to write them."""
    return [entry.split("|")[0] for entry in target.classes]


def check_adaptation(task: TaskConfig) -> None:
    """Raise UserError for values of the adaptation that no task can use."""
    require(0 < task.layer_decay <= 1, "task.layer_decay", task.layer_decay, "must lie in (0, 1]")
    require(task.lora_rank >= 1, "task.lora_rank", task.lora_rank, "must be at least 1")
    alpha = task.lora_alpha
    require(alpha > 0 and math.isfinite(alpha), "task.lora_alpha", alpha, "must be a finite number above 0")
    require(task.patience >= 0, "task.patience", task.patience, "must not be negative")
    stride = task.eval_stride
    require(stride is None or stride >= 1, "task.eval_stride", stride, "must be at least 1, or null")
    require(0 < task.test_fraction < 1, "task.test_fraction", task.test_fraction, "must lie inside (0, 1)")
    weights = task.class_weights
    well = weights is None or all(w > 0 and math.isfinite(w) for w in weights)
    require(well, "task.class_weights", weights, "must be numbers above 0, or null")


def check_target(task: TaskConfig, init: str | None) -> None:
    """Raise UserError where the target, the loss, the adaptation and init= contradict each other."""
    check_adaptation(task)
    target = task.target
    if target is None:
        require(task.name == "pretrain", "task.name", task.name, "a task without task.target is pretrain")
        legal = "is for tasks with task.target; pre-training takes l1, smooth_l1 or l2"
        require(task.loss not in ("cross_entropy", "contrastive"), "task.loss", task.loss, legal)
        _check_not_map(task)
        require(task.adapt == "scratch", "task.adapt", task.adapt, "is for tasks with task.target")
        return
    require(task.name != "pretrain", "task.name", task.name, "a task with task.target needs a name of its own")
    for name, choices in TARGET_CHOICES.items():
        value = getattr(target, name)
        require(value in choices, f"task.target.{name}", value, "must be one of " + ", ".join(choices))
    for name in ("delay_seconds", "bridge_seconds"):
        value = getattr(target, name)
        require(value >= 0 and math.isfinite(value), f"task.target.{name}", value, "must be seconds, 0 or more")
    _check_target_source(target)
    if target.kind == "map":
        check_map(task, target)
    else:
        _check_not_map(task)
        _check_classes(task, target)
    legal = "adapt=attentive pools by attention: leave it at mean"
    require(task.adapt != "attentive" or task.pooling == "mean", "task.pooling", task.pooling, legal)
    if task.adapt == "scratch":
        legal = "task.adapt=scratch begins with random weights; choose linear, attentive, last_block, lora or full"
        require(init is None, "init", init, legal)
    elif task.adapt in ("last_block", "lora", "full"):
        legal = "needs init=RUN_OR_FILE; task.adapt=scratch trains from random weights"
        require(init is not None, "task.adapt", task.adapt, legal)


def check_courses(cfg: Config) -> None:
    """Raise UserError where task.courses asks for maps that a head could not use."""
    task, model = cfg.task, cfg.model
    if not task.courses:
        return
    require(task.target is not None, "task.courses", True, "is for tasks with task.target")
    require(model.maps > 0, "task.courses", True, "needs maps: model.maps=40, or init= of a model that has them")
    alike = task.target is not None and task.target.per == "frame" and cfg.data.split is None
    legal = (
        "each scan's own maps are in an order of their own, so that their courses cannot be compared across subjects: "
        "take model.maps_of=shared, or a per-frame task whose scans are cut in time (data.split=null)"
    )
    require(model.maps_of == "shared" or alike, "model.maps_of", model.maps_of, legal)


def _check_target_source(target: TargetConfig) -> None:
    per_subject = target.per == "subject"
    legal = "per=subject is read from source=manifest (maps: nifti), per=frame from source=events or confounds"
    require(per_subject == (target.source in ("manifest", "nifti")), "task.target.source", target.source, legal)
    legal = "kind=map is read from source=nifti, and nothing else is"
    require((target.kind == "map") == (target.source == "nifti"), "task.target.source", target.source, legal)
    if target.kind == "map":
        return
    needs_column = target.source != "events" or target.kind == "regression"
    require(bool(target.column) or not needs_column, "task.target.column", target.column, "must name a column")
    legal = "convolves numbers of events: it needs source=events and kind=regression"
    well = target.response != "hrf" or (target.source == "events" and target.kind == "regression")
    require(well, "task.target.response", target.response, legal)


def check_map(task: TaskConfig, target: TargetConfig) -> None:
    """Raise UserError for a task of maps that no head or loss could do."""
    legal = "maps take map_local or map_unet"
    require(task.head != "pooled", "task.head", task.head, legal)
    require(task.loss in ("l2", "contrastive"), "task.loss", task.loss, "maps take l2 or contrastive")
    require(task.select in ("loss", "residual_r"), "task.select", task.select, "maps take loss or residual_r")
    for name in ("balance", "class_weights"):
        require(not getattr(task, name), f"task.{name}", getattr(task, name), "a map has no classes")
    require(not target.classes, "task.target.classes", target.classes, "a map has none; it has contrasts")
    twice = len(set(target.contrasts)) < len(target.contrasts)
    require(not twice, "task.target.contrasts", target.contrasts, "names a contrast twice")
    step = task.map_step
    require(step is None or step >= 1, "task.map_step", step, "must be at least 1, or null")
    for name in ("margin_own", "margin_other"):
        ends = getattr(task, name)
        well = len(ends) == 2 and all(0 <= end < math.inf for end in ends)
        require(well, f"task.{name}", ends, "must be two finite numbers, 0 or more: at the first and the last step")


def _check_not_map(task: TaskConfig) -> None:
    """Raise UserError for what only maps have."""
    require(task.head == "pooled", "task.head", task.head, "is for task.target.kind=map; other tasks take pooled")
    require(task.loss != "contrastive", "task.loss", task.loss, "is for task.target.kind=map")
    require(task.pooling != "attention", "task.pooling", task.pooling, "is for maps; other tasks: adapt=attentive")
    require(task.select != "residual_r", "task.select", task.select, "is for task.target.kind=map")
    require(task.average == "predictions", "task.average", task.average, "is for task.target.kind=map")


def check_maps_data(task: TaskConfig, data: DataConfig) -> None:
    """Raise UserError for data that maps cannot be predicted from."""
    if task.target is None or task.target.kind != "map":
        return
    for name in ("flip", "affine"):
        legal = "would move the scan away from its map: a task of maps takes 0"
        require(getattr(data.augment, name) == 0, f"data.augment.{name}", getattr(data.augment, name), legal)
    require(data.layout == "swift", "data.layout", data.layout, "maps lie as the store does: layout=swift")


def _check_classes(task: TaskConfig, target: TargetConfig) -> None:
    names = class_names(target)
    if target.kind == "regression":
        require(not names, "task.target.classes", target.classes, "a regression has none")
        require(task.loss != "cross_entropy", "task.loss", task.loss, "a regression takes l1, smooth_l1 or l2")
        require(task.class_weights is None, "task.class_weights", task.class_weights, "a regression has no classes")
        require(not task.balance, "task.balance", task.balance, "a regression has no classes to balance")
    else:
        require(task.loss == "cross_entropy", "task.loss", task.loss, "classes are trained with cross_entropy")
        many = len(names) == 2 if target.kind == "binary" else len(names) >= 3
        legal = "two names for kind=binary, three or more for kind=multiclass"
        require(many, "task.target.classes", target.classes, legal)
        spellings = [text for entry in target.classes for text in entry.split("|")]
        well = all(spellings) and len(set(spellings)) == len(spellings)
        require(well, "task.target.classes", target.classes, "names must differ, and none may be empty")
        weights = task.class_weights
        legal = f"one number for each of the {len(names)} classes"
        require(weights is None or len(weights) == len(names), "task.class_weights", weights, legal)
    legal_select = ("loss", "mae", "r") if target.kind == "regression" else ("loss", "auroc", "balanced_accuracy")
    legal = f"kind={target.kind} takes {', '.join(legal_select)}"
    require(task.select in legal_select, "task.select", task.select, legal)

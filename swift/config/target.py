"""Checks of what a task predicts and of how the model is adapted to it."""

from __future__ import annotations

import math

from swift.config.schema import TargetConfig, TaskConfig
from swift.utils.errors import UserError

CHOICES = {
    "kind": ("binary", "multiclass", "regression"),
    "per": ("subject", "frame"),
    "source": ("manifest", "events", "confounds"),
    "others": ("refuse", "leave_out"),
    "response": ("shift", "hrf"),
}
SELECT = {"regression": ("loss", "mae", "r")}
"""Kind -> legal task.select; others are those of classes."""
SELECT_CLASSES = ("loss", "auroc", "balanced_accuracy")


def _require(condition: bool, name: str, value: object, legal: str) -> None:
    if not condition:
        raise UserError(f"{name}={value}: {legal}")


def class_names(target: TargetConfig) -> list[str]:
    """Names of the classes, without the other ways to write them."""
    return [entry.split("|")[0] for entry in target.classes]


def check_adaptation(task: TaskConfig) -> None:
    """Raise UserError for values of the adaptation that no task can use."""
    _require(0 < task.layer_decay <= 1, "task.layer_decay", task.layer_decay, "must lie in (0, 1]")
    _require(task.lora_rank >= 1, "task.lora_rank", task.lora_rank, "must be at least 1")
    alpha = task.lora_alpha
    _require(alpha > 0 and math.isfinite(alpha), "task.lora_alpha", alpha, "must be a finite number above 0")
    _require(task.patience >= 0, "task.patience", task.patience, "must not be negative")
    stride = task.eval_stride
    _require(stride is None or stride >= 1, "task.eval_stride", stride, "must be at least 1, or null")
    _require(0 < task.test_fraction < 1, "task.test_fraction", task.test_fraction, "must lie inside (0, 1)")
    weights = task.class_weights
    well = weights is None or all(w > 0 and math.isfinite(w) for w in weights)
    _require(well, "task.class_weights", weights, "must be numbers above 0, or null")


def check_target(task: TaskConfig, init: str | None) -> None:
    """Raise UserError where the target, the loss, the adaptation and init= contradict each other."""
    check_adaptation(task)
    target = task.target
    if target is None:
        _require(task.name == "pretrain", "task.name", task.name, "a task without task.target is pretrain")
        legal = "is for tasks with task.target; pre-training takes l1, smooth_l1 or l2"
        _require(task.loss != "cross_entropy", "task.loss", task.loss, legal)
        _require(task.adapt == "scratch", "task.adapt", task.adapt, "is for tasks with task.target")
        return
    _require(task.name != "pretrain", "task.name", task.name, "a task with task.target needs a name of its own")
    for name, choices in CHOICES.items():
        value = getattr(target, name)
        _require(value in choices, f"task.target.{name}", value, "must be one of " + ", ".join(choices))
    for name in ("delay_seconds", "bridge_seconds"):
        value = getattr(target, name)
        _require(value >= 0 and math.isfinite(value), f"task.target.{name}", value, "must be seconds, 0 or more")
    _check_source(target)
    _check_classes(task, target)
    legal = "adapt=attentive pools by attention: leave it at mean"
    _require(task.adapt != "attentive" or task.pooling == "mean", "task.pooling", task.pooling, legal)
    if task.adapt == "scratch":
        legal = "task.adapt=scratch begins with random weights; choose linear, attentive, last_block, lora or full"
        _require(init is None, "init", init, legal)
    elif task.adapt in ("last_block", "lora", "full"):
        legal = "needs init=RUN_OR_FILE; task.adapt=scratch trains from random weights"
        _require(init is not None, "task.adapt", task.adapt, legal)


def _check_source(target: TargetConfig) -> None:
    per_subject = target.per == "subject"
    legal = "per=subject is read from source=manifest, per=frame from source=events or confounds"
    _require(per_subject == (target.source == "manifest"), "task.target.source", target.source, legal)
    needs_column = target.source != "events" or target.kind == "regression"
    _require(bool(target.column) or not needs_column, "task.target.column", target.column, "must name a column")
    legal = "convolves numbers of events: it needs source=events and kind=regression"
    well = target.response != "hrf" or (target.source == "events" and target.kind == "regression")
    _require(well, "task.target.response", target.response, legal)


def _check_classes(task: TaskConfig, target: TargetConfig) -> None:
    names = class_names(target)
    if target.kind == "regression":
        _require(not names, "task.target.classes", target.classes, "a regression has none")
        _require(task.loss != "cross_entropy", "task.loss", task.loss, "a regression takes l1, smooth_l1 or l2")
        _require(task.class_weights is None, "task.class_weights", task.class_weights, "a regression has no classes")
        _require(not task.balance, "task.balance", task.balance, "a regression has no classes to balance")
    else:
        _require(task.loss == "cross_entropy", "task.loss", task.loss, "classes are trained with cross_entropy")
        many = len(names) == 2 if target.kind == "binary" else len(names) >= 3
        legal = "two names for kind=binary, three or more for kind=multiclass"
        _require(many, "task.target.classes", target.classes, legal)
        spellings = [text for entry in target.classes for text in entry.split("|")]
        well = all(spellings) and len(set(spellings)) == len(spellings)
        _require(well, "task.target.classes", target.classes, "names must differ, and none may be empty")
        weights = task.class_weights
        legal = f"one number for each of the {len(names)} classes"
        _require(weights is None or len(weights) == len(names), "task.class_weights", weights, legal)
    legal_select = SELECT.get(target.kind, SELECT_CLASSES)
    legal = f"kind={target.kind} takes {', '.join(legal_select)}"
    _require(task.select in legal_select, "task.select", task.select, legal)

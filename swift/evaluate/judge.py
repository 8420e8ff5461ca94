"""Judging a fine-tuned model: from what it says of clips to predictions of subjects or frames, figures and summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift.config.compose import CHECKPOINTS
from swift.data.task_module import TargetDataModule
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import MAIN, choose_threshold, judge, scores
from swift.parallel.checkpoint import files as checkpoint
from swift.train.finetune import ClipRows, gathered

FLOOR = 1e-12
"""Smallest probability in a log-loss."""


def predictions_of(rows: ClipRows, data: TargetDataModule) -> Predictions:
    """One prediction a subject, or one a labelled frame: the clips that speak of it averaged once."""
    labels, scans = data.labels, data.store.scans
    subject = np.array([scans[scan].subject for scan in rows.scan])
    scan = np.array([scans[place].scan_id for place in rows.scan])
    if labels.per == "subject":
        target = np.array([float(labels.values[place]) for place in rows.scan])
        return Predictions.from_clips(labels.kind, labels.classes, subject, scan, rows.start, target, rows.scores)
    clips, steps = rows.target.shape
    frame = rows.start[:, None] + np.arange(steps) * data.spec.frame_stride
    target = np.array([labels.values[place][own] for place, own in zip(rows.scan, frame, strict=True)])
    known = np.isfinite(target)

    def each(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, steps).reshape(clips, steps)[known]

    return Predictions.from_clips(
        labels.kind,
        labels.classes,
        each(subject),
        each(scan),
        each(rows.start),
        target[known],
        rows.scores[known],
        frame[known],
    )


def figures(data: TargetDataModule, loss: str) -> Callable[[ClipRows], dict[str, float]]:
    """What a validation logs of its rows: the loss of the averaged predictions, and the scores.

    Args:
        data: With labels and scaling.
        loss: Of the task; of a regression in units of the training labels' standard deviation.
    """

    def figures_of(rows: ClipRows) -> dict[str, float]:
        predictions = predictions_of(rows, data)
        threshold = choose_threshold(predictions)
        return {"loss": mean_loss(predictions, loss, data.scaling.std)} | scores(predictions, threshold)

    return figures_of


def mean_loss(predictions: Predictions, loss: str, std: float) -> float:
    """Mean loss of the units: cross entropy, or l1, l2, smooth_l1 of errors in units of `std`."""
    if predictions.kind != "regression":
        own = predictions.scores[np.arange(len(predictions)), predictions.target.astype(np.int64)]
        return float(-np.log(np.maximum(own, FLOOR)).mean())
    error = np.abs(predictions.scores[:, 0] - predictions.target) / std
    each = {"l1": error, "l2": error**2, "smooth_l1": np.where(error < 1, error**2 / 2, error - 0.5)}[loss]
    return float(each.mean())


@torch.no_grad()
def evaluate(batches: Iterable[Any], predict: Callable[[Any], dict[str, np.ndarray]]) -> ClipRows:
    """What the model says of all clips of a part, gathered from all ranks; all ranks call it together.

    Args:
        batches: Dense, on the module's device.
        predict: `FinetuneModule.predict`, through whatever holds the weights.
    """
    return gathered([predict(batch) for batch in batches])


def judge_run(trainer: Any) -> dict[str, Any]:
    """Take the weights that validation chose, and read the test set, once; all ranks call it together.

    Leaves RUN/predictions/*.csv.

    Returns:
        What RUN/summary.json says; {} on other ranks than the first.
    """
    strategy, module, data = trainer.strategy, trainer.lightning_module, trainer.datamodule
    cfg, device = module.cfg, strategy.root_device
    run_dir = Path(cfg.run_dir)
    step = take_best(strategy, run_dir / CHECKPOINTS)
    module.eval()

    def predict(packed: Any) -> dict[str, np.ndarray]:
        on_device = data.transfer_batch_to_device(data.on_before_batch_transfer(packed), device, 0)
        found: dict[str, np.ndarray] = strategy.call("predict", data.on_after_batch_transfer(on_device))
        return found

    with trainer.precision_plugin.val_step_context():
        parts = [
            predictions_of(evaluate(loader, predict), data)
            for loader in (data.val_dataloader(), data.test_dataloader())
        ]
    if not trainer.is_global_zero:
        return {}
    val, test = parts
    for name, predictions in (("val", val), ("test", test)):
        predictions.save(run_dir / "predictions" / f"{name}.csv")
    said = {
        "task": cfg.task.name,
        "adapt": cfg.task.adapt,
        "init": cfg.init,
        "seed": cfg.seed,
        "split": cfg.data.split,
        "split_hash": data.split_hash,
        "store": [str(store.path) for store in data.store.stores],
        "select": cfg.task.select,
        "best_step": trainer.global_step if step is None else step,
        "trained": sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
        "n": {part: len(data.subjects_of(part)) for part in data.parts},
        "scaling": {"mean": data.scaling.mean, "std": data.scaling.std},
    }
    return said | judge(val, test, cfg.seed)


def take_best(strategy: Any, folder: Path) -> int | None:
    """Fill the model with the weights of the best checkpoint; its optimizer step, None if no checkpoint has a score."""
    path = strategy.broadcast(checkpoint.best(folder) if strategy.is_global_zero else None)
    if path is None:
        return None
    manifest = checkpoint.Manifest.read(path)
    checkpoint.Reader(path, manifest).fill(list(strategy.pieces(moments=False)))
    strategy.refresh()
    return manifest.step


def table(summary: dict[str, Any], run_dir: Path) -> str:
    """The table printed at the end: scores of validation and test, with the test's intervals."""
    told = summary["scores"]
    n, per = summary["n"], summary["per"]
    lines = [
        f"{summary['task']}: {summary['kind']}, test of {summary['units']['test']} {per}s, weights of step "
        f"{summary['best_step']} (chosen by validation {summary['select']})",
        f"  {'score':<18} {'val':>9} {'test':>9}  95 % interval",
    ]
    for name in told["test"]:
        low, high = summary["intervals"]["test"].get(name, (None, None))
        interval = f"[{number(low)}, {number(high)}]"
        mark = "  <-" if name == MAIN[summary["kind"]] else ""
        lines.append(f"  {name:<18} {number(told['val'][name]):>9} {number(told['test'][name]):>9}  {interval}{mark}")
    if summary["kind"] == "binary":
        lines.append(f"  threshold {summary['threshold']:.4f} on p({summary['classes'][1]}), from validation")
    used = f"adapt={summary['adapt']}, init={summary['init'] or 'none'}, split {summary['split'] or 'in time'}"
    lines.append(f"used: {used}, seed {summary['seed']}")
    lines.append(f"subjects: {n['train']} train, {n['val']} val, {n['test']} test")
    lines.append(f"predictions, summary and checkpoints: {run_dir}")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4f}"

"""Judging a fine-tuned model: from what it says of clips to predictions of subjects or frames, figures and summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift.data.task_module import TargetDataModule
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import MAIN, choose_threshold, interval_text, scores

FLOOR = 1e-12
"""Smallest probability in a log-loss."""


@dataclass(frozen=True)
class ClipRows:
    """What was said of R clips, in order of their numbers.

    Attributes:
        clip: (R,) number in the part.
        scan: (R,) scan of the store.
        start: (R,) first frame.
        scores: (R, K) probabilities or values in the label's unit, float64; (R, T, K) per frame.
        target: (R,) or (R, T) labels, NaN: none.
    """

    clip: np.ndarray
    scan: np.ndarray
    start: np.ndarray
    scores: np.ndarray
    target: np.ndarray

    @staticmethod
    def joined(parts: list[dict[str, np.ndarray]]) -> ClipRows:
        """Rows of batches or ranks together; every clip once, in an order that the ranks do not change."""
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        _, first = np.unique(whole["clip"], return_index=True)
        return ClipRows(**{name: value[first] for name, value in whole.items()})


def gathered(parts: list[dict[str, np.ndarray]]) -> ClipRows:
    """The rows of all ranks, on every rank; all ranks call it together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        said: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, parts)
        parts = [part for rank in said for part in rank]
    return ClipRows.joined(parts)


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
        interval = interval_text(summary, name, 4) or "[-, -]"
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

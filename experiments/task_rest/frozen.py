"""A penalised linear head on frozen features of frames, fitted to the end; all settings are chosen before the test.

    python experiments/task_rest/frozen.py --out REAL/frozen $SET task.allow_seen=true task.courses=true init=REAL/maps

Features of a frame, each the mean over the clips of its part that hold it: the patch tokens of the last stage, averaged
over the brain, and the courses of the scan's maps (the first 10, 20, or all). Each feature is brought to unit variance
over the training frames; the head is logistic regression, its penalty chosen in blocks of training frames, as in the
baseline on volumes. Which features, and whether a frame is averaged with the one before and after it: chosen by the
log-loss on training frames (each block said by a head fitted to the others) and validation frames together; so is the
threshold. The test is read once, by the features chosen.

Legend: N frames, F features, K maps, T frames of a clip, C channels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift.config.compose import composed
from swift.config.schema import Config
from swift.data.clips.order import ValBatches
from swift.evaluate import classical
from swift.evaluate.baselines import leave, units_of
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import choose_threshold, judge

PARTS = ("train", "val", "test")
MAPS = (10, 20, None)
"""Numbers of courses that are tried; None: all."""
Features = dict[str, np.ndarray]


def frame_means(scan: np.ndarray, frame: np.ndarray, values: np.ndarray, wanted: list[tuple[int, int]]) -> np.ndarray:
    """(N, F) mean of the rows (R, F) that speak of each wanted (scan, frame).

    Args:
        scan, frame: (R,) what each row speaks of.
        values: (R, F).
        wanted: N of them, each with a row at least.
    """
    place = {key: n for n, key in enumerate(wanted)}
    at = np.array([place.get(key, -1) for key in zip(scan.tolist(), frame.tolist(), strict=True)])
    total = np.zeros((len(wanted), values.shape[1]))
    np.add.at(total, at[at >= 0], values[at >= 0])
    return total / np.bincount(at[at >= 0], minlength=len(wanted))[:, None]


def smoothed(values: np.ndarray, wanted: list[tuple[int, int]]) -> np.ndarray:
    """(N, F) each row averaged with those of the frame before and after it, where they are there."""
    place = {key: n for n, key in enumerate(wanted)}
    beside = [[place[s, f + d] for d in (-1, 0, 1) if (s, f + d) in place] for s, f in wanted]
    return np.stack([values[rows].mean(0) for rows in beside])


@torch.inference_mode()
def features(cfg: Config, data: Any) -> dict[str, Features]:
    """Part -> tokens (N, C) and courses (N, K) of its labelled frames, in the order of `units_of`."""
    from swift.parallel.setup import resolve
    from swift.train.init_weights import start_from
    from swift.train.wiring import build_module, tell

    module: Any = build_module(resolve(cfg))
    print(start_from(module, str(cfg.init)))
    tell(module, data)
    module.eval()
    found = {}
    for part in PARTS:
        index = data.parts[part]
        rows: dict[str, list[np.ndarray]] = {"scan": [], "frame": [], "tokens": [], "courses": []}
        for packed in data._loader(index, ValBatches(len(index), cfg.data.batch_size, 0, 1), False):
            batch = data.dense(packed)
            bold, brain = batch["bold"], batch["brain"]
            maps = module.scan_maps(batch, training=False) if module.scan_maps is not None else None
            courses = module.model.linear.courses_of_all(bold, brain, maps)
            tokens = module.model.head.norm(module.model.head._pooled(*_last(module.model, bold, brain)))
            steps = np.arange(bold.shape[-1]) * data.spec.frame_stride
            for clip in batch["valid"].nonzero()[:, 0].tolist():
                rows["scan"].append(np.full(len(steps), int(batch["scan"][clip])))
                rows["frame"].append(int(batch["start"][clip]) + steps)
                rows["tokens"].append(tokens[clip].repeat_interleave(cfg.model.patch_size[3], 0)[: len(steps)].numpy())
                rows["courses"].append(courses[clip].numpy())
        units = units_of(data, part)
        wanted = list(zip(units.scan.tolist(), units.frame.tolist(), strict=True))
        scan, frame = np.concatenate(rows["scan"]), np.concatenate(rows["frame"])
        found[part] = {
            name: frame_means(scan, frame, np.concatenate(rows[name]), wanted) for name in ("tokens", "courses")
        }
    return found


def _last(model: Any, bold: torch.Tensor, brain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the last stage, and which of its tokens lie in the brain."""
    from swift.models.pooling import brain_tokens

    return model.encoder(bold, brain)[-1], brain_tokens(brain, model.head.patch, model.head.stage)


def candidates(found: dict[str, Features], wanted: dict[str, list[tuple[int, int]]]) -> dict[str, Features]:
    """Name -> part -> (N, F)."""
    chosen: dict[str, Features] = {"tokens": {part: found[part]["tokens"] for part in PARTS}}
    for count in MAPS:
        courses = {part: found[part]["courses"][:, :count] for part in PARTS}
        name = f"{courses['train'].shape[1]} courses"
        chosen[name] = courses
        chosen[f"tokens, {name}"] = {part: np.hstack([found[part]["tokens"], courses[part]]) for part in PARTS}
    smooth = {
        f"{name}, three frames": {part: smoothed(values[part], wanted[part]) for part in PARTS}
        for name, values in chosen.items()
    }
    return chosen | smooth


def said_without_own_block(values: np.ndarray, units: Any, balance: bool) -> np.ndarray:
    """(N, 2) probabilities of the training frames, each block's by a head fitted to the other blocks."""
    from sklearn.model_selection import KFold

    out = np.zeros((len(units), 2))
    for fit, rest in KFold(classical.FOLDS).split(values):
        part = classical.Units(*(column[fit] for column in vars(units).values()))
        model = classical.fitted(values[fit], part, "binary", balance)
        out[rest] = classical.predicted(model, values[rest], part, "binary", 2)
    return out


def main() -> None:
    """The command line."""
    from swift.data.locate import store_path
    from swift.data.task_module import TargetDataModule

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("settings", nargs="+", help="as of swift.train, init= among them")
    options = parser.parse_args()
    begin = time.perf_counter()
    cfg = composed([*options.settings, "task.adapt=linear", f"run_dir={options.out}"])[0]
    torch.set_num_threads(max(cfg.trainer.threads, 1))
    data = TargetDataModule(cfg.data, cfg.task, store_path(cfg.data, cfg.seed), cfg.seed)
    units = {part: units_of(data, part) for part in PARTS}
    wanted = {part: list(zip(one.scan.tolist(), one.frame.tolist(), strict=True)) for part, one in units.items()}
    every = candidates(features(cfg, data), wanted)
    seen: dict[str, Predictions] = {}
    losses = {}
    for name, values in every.items():
        model = classical.fitted(values["train"], units["train"], "binary", cfg.task.balance)
        val = classical.predicted(model, values["val"], units["train"], "binary", 2)
        scores = np.concatenate([said_without_own_block(values["train"], units["train"], cfg.task.balance), val])
        seen[name] = predictions(data, [units["train"], units["val"]], scores)
        own = scores[np.arange(len(scores)), seen_target(units).astype(int)]
        losses[name] = float(-np.log(np.maximum(own, 1e-12)).mean())
    for name, loss in sorted(losses.items(), key=lambda item: item[1]):
        print(f"{loss:.4f}  {name}")
    best = min(losses, key=lambda name: losses[name])
    model = classical.fitted(every[best]["train"], units["train"], "binary", cfg.task.balance)
    test = predictions(
        data, [units["test"]], classical.predicted(model, every[best]["test"], units["train"], "binary", 2)
    )
    summary = {"task": cfg.task.name, "method": f"frozen, penalised head ({best})", "init": str(cfg.init)}
    summary |= {"seed": cfg.seed, "split": None, "split_hash": None, "n": {"train": 1, "val": 1, "test": 1}}
    summary |= judge(seen[best], test, cfg.seed) | {"losses": losses, "seconds": time.perf_counter() - begin}
    leave(options.out, {"val": seen[best], "test": test}, summary)
    print(best, choose_threshold(seen[best]), json.dumps(summary["scores"]["test"]))
    print(json.dumps(summary["intervals"]["test"]))


def seen_target(units: dict[str, Any]) -> np.ndarray:
    """Labels of training and validation frames."""
    return np.concatenate([units["train"].target, units["val"].target])


def predictions(data: Any, parts: list[Any], scores: np.ndarray) -> Predictions:
    """Of the frames of some parts."""
    whole = [np.concatenate(columns) for columns in zip(*((u.scan, u.subject, u.frame, u.target) for u in parts))]
    scan, subject, frame, target = whole
    names = [data.store.scans[place].scan_id for place in scan.tolist()]
    start = np.zeros(len(scan), np.int64)
    return Predictions.from_clips("binary", data.labels.classes, subject, names, start, target, scores, frame)


if __name__ == "__main__":
    main()

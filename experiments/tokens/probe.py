"""What the tokens of pre-training are worth to a label: box, brain and drop at equal CPU time, judged by probes.

    python experiments/tokens/probe.py [--out FOLDER] [--seconds 60] [--seeds 0 1 2]
    python experiments/tokens/probe.py --show

Pre-trains on subjects of a synthetic cohort of whom no label is used, each setting for the same CPU time, then judges
on the same test subjects: a penalised linear head on frozen features, for a label of two classes and for a number;
fine-tuning of everything on few subjects, for the label of two classes, equally many steps for all; and filling in what
is hidden, single patches and tubes. Trains what is not in probe.jsonl yet, then writes probe.md and
probe.png. See README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.learning.train_point import clip_rows, make  # noqa: E402
from swift.config.compose import composed  # noqa: E402
from swift.config.schema import Config  # noqa: E402
from swift.data.clips.order import ValBatches  # noqa: E402
from swift.data.labels.splits import Split, deal, save_splits  # noqa: E402
from swift.data.labels.subjects import people_of  # noqa: E402
from swift.data.store.reader import Store  # noqa: E402
from swift.data.synthetic import CohortSpec, write_store  # noqa: E402
from swift.evaluate import classical  # noqa: E402
from swift.evaluate.baselines import units_of  # noqa: E402
from swift.evaluate.compare import from_draws  # noqa: E402
from swift.evaluate.predictions import Predictions  # noqa: E402
from swift.evaluate.resampling import draw_weights, weighted_scores  # noqa: E402
from swift.evaluate.scores import DRAWS, decide  # noqa: E402
from swift.models.masking import draw_mask, draw_shown, mask_voxels  # noqa: E402
from swift.models.pooling import brain_tokens  # noqa: E402
from swift.models.visible import Units  # noqa: E402
from swift.parallel.setup import resolve  # noqa: E402
from swift.train.optim import build_optimizer, lr_factor  # noqa: E402
from swift.train.pretrain import PretrainModule  # noqa: E402
from swift.train.wiring import build_data, build_module, tell  # noqa: E402

PARTS = {"extra": 160, "train": 100, "val": 40, "test": 100}
"""Subjects, and the generator below, are those of experiments/downstream, on a coarser grid."""
SPEC = CohortSpec(
    n_subjects=sum(PARTS.values()),
    grid=(12, 12, 12),
    spacing=10.5,
    frames=64,
    seed=1,
    signal=2.0,
    noise_white=0.5,
    noise_smooth=0.4,
    drift=0.3,
    motion=0.3,
    amplitude_gain=0.8,
    coupling_gain=0.6,
    map_variability=0.2,
)
PATCH, UNIT = (2, 2, 2, 4), (4, 4, 4)
BASE = [
    *("model.embed_dim=24", "model.depths=[2,2]", "model.num_heads=[2,4]", "model.window=[4,4,4,4]"),
    *(f"model.patch_size={list(PATCH)}", "model.position=rope_global", "model.decoder_dim=32", "data=store"),
    *("data.grid=[12,12,12]", "data.spacing=10.5", "data.frames=16", "data.clip_stride=8", "data.batch_size=16"),
    *("data.normalization=percent", "data.workers=0", "data.verify=false", "trainer.threads=1", "run_dir=unused"),
]
PRETRAIN = ["task.loss=l2", "optimizer.lr=4e-3", "trainer.max_steps=20000"]
TUBES = ["task.mask_unit=[4,4,4,4]", "task.mask_kind=tube"]
POINTS: dict[str, list[str]] = {
    "box, token, 1 patch": ["model.tokens=box"],
    "brain, token, 1 patch": ["model.tokens=brain"],
    "brain, token, 2 patches in all frames": ["model.tokens=brain", *TUBES],
    "drop, 2 patches in all frames": ["task.hidden=drop", "task.mask_kind=tube"],
}
UNTRAINED = "random weights"
PAIRS = [
    ("brain, token, 1 patch", "box, token, 1 patch"),
    ("brain, token, 1 patch", "drop, 2 patches in all frames"),
    ("brain, token, 2 patches in all frames", "drop, 2 patches in all frames"),
]
STEPS = 50
"""Of fine-tuning, for all settings: what a task costs is not compared here."""
PROBES = {
    "linear, label": ("synthetic_binary",),
    "linear, number": ("synthetic_continuous",),
    "full, label": ("synthetic_binary", "data.max_subjects=20"),
}
"""Task and settings. With 20 of the 100 training subjects fine-tuning does not reach the planted level by itself."""
FIGURES = {
    "linear, label": "AUROC, frozen + linear",
    "linear, number": "r, frozen + linear",
    "full, label": "AUROC, fine-tuned (20)",
    "patches": "L1, hidden patches",
    "tubes": "L1, hidden tubes",
}
LOWER = ("patches", "tubes")
RESULTS = HERE / "probe.jsonl"
Row = dict[str, Any]


# --- training -------------------------------------------------------------------------------------------------------
def make_cohort(out: Path) -> None:
    """The store and the two splits: for pre-training, and for the labels."""
    if (out / "pretrain.json").is_file():
        return
    write_store(SPEC, out / "store")
    people = people_of(Store(out / "store").scans, "label_binary")
    extra, train, val, test = deal(people, [count / SPEC.n_subjects for count in PARTS.values()], seed=0)
    save_splits(out / "split.json", [Split({"train": tuple(train), "val": tuple(val), "test": tuple(test)})])
    # Reconstruction is judged on the test subjects too, so that all figures are of the same people.
    both = tuple(sorted([*extra, *train]))
    save_splits(out / "pretrain.json", [Split({"train": both, "val": tuple(test), "test": ()})])


def settings(out: Path, split: str, seed: int, *more: str) -> Config:
    """Settings of a training."""
    return composed([*BASE, f"data.path={out / 'store'}", f"data.split={out / split}", f"seed={seed}", *more])[0]


def fit(module: Any, data: Any, loss: Callable[[Row], Tensor], seconds: float | None, steps: int) -> tuple[int, float]:
    """Train for so many CPU seconds (or, None, so many steps), the rate falling; steps made, and seconds spent."""
    cfg = module.cfg
    module.train()
    optimizer = build_optimizer(module.model, cfg.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    spent, step = 0.0, 0
    for packed in data.train_dataloader():
        began = time.process_time()
        part = step / steps if seconds is None else spent / seconds
        factor = lr_factor(round(1e6 * part), 50_000, 10**6, cfg.optimizer.min_lr_ratio)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        batch = data.dense(packed)
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.clip_norm)
        optimizer.step()
        step += 1
        spent += time.process_time() - began
        if spent >= seconds if seconds is not None else step == steps:
            break
    return step, spent


# --- judgement ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def reconstruction(module: PretrainModule, data: Any) -> dict[str, dict[str, list[float]]]:
    """Sum of |error| and hidden voxels of each test subject under masks that are the same for all models."""
    module.eval()
    found: dict[str, dict[str, list[float]]] = {"patches": {}, "tubes": {}}
    for packed in data.val_dataloader():
        batch = data.dense(packed)
        volume = tuple(batch["bold"].shape[2:])
        units = Units(volume, UNIT, PATCH, 1, 5)
        masks = {
            "patches": draw_mask(1000, batch["sample_id"], volume, PATCH, PATCH, 0.8, "random"),
            "tubes": units.mask(draw_shown(1000, batch["sample_id"], units.touched(batch["brain"]), units.shown)),
        }
        for kind, mask in masks.items():
            prediction = module.reconstruct_under(batch, mask)
            for row in clip_rows(data, batch, mask_voxels(mask, PATCH, volume), prediction, 0, None):
                total = found[kind].setdefault(row["subject"], [0.0, 0])
                total[0] += row["sum"]
                total[1] += row["voxels"]
    return found


@torch.no_grad()
def features(module: Any, data: Any) -> dict[str, np.ndarray]:
    """Part -> (N, F): what the head would see of each subject, the mean over its clips."""
    module.eval()
    head, rows = module.model.head, {}
    for part in ("train", "test"):
        index = data.parts[part]
        seen: dict[int, list[np.ndarray]] = {}
        for packed in data._loader(index, ValBatches(len(index), 32, 0, 1), False):
            batch = data.dense(packed)
            last = module.model.encoder(batch["bold"], batch["brain"])[-1]
            pooled = head._pooled(last, brain_tokens(batch["brain"], head.patch, head.stage)).numpy()
            for clip in batch["valid"].nonzero()[:, 0].tolist():
                seen.setdefault(int(batch["scan"][clip]), []).append(pooled[clip])
        rows[part] = np.stack([np.mean(seen[scan], 0) for scan in units_of(data, part).scan.tolist()])
    return rows


@torch.no_grad()
def said(module: Any, data: Any) -> dict[str, list[float]]:
    """Label and probability of class 1 of each test subject, the mean over its clips."""
    module.eval()
    index, scores = data.parts["test"], {}
    for packed in data._loader(index, ValBatches(len(index), 32, 0, 1), False):
        rows = module.predict(data.dense(packed))
        for scan, target, score in zip(rows["scan"].tolist(), rows["target"].tolist(), rows["scores"].tolist()):
            scores.setdefault(data.store.scans[scan].subject, (target, []))[1].append(score[1])
    return {subject: [target, float(np.mean(values))] for subject, (target, values) in scores.items()}


def linear(values: dict[str, np.ndarray], data: Any, kind: str) -> dict[str, list[float]]:
    """Label and what a penalised linear head says of each test subject."""
    train, test = units_of(data, "train"), units_of(data, "test")
    model = classical.fitted(values["train"], train, kind)
    scores = classical.predicted(model, values["test"], train, kind, 2)[:, -1]
    return dict(zip(test.subject.tolist(), ([float(t), float(s)] for t, s in zip(test.target, scores))))


def judged(out: Path, seed: int, options: list[str], encoder: dict[str, Tensor] | None) -> Row:
    """Probes of an encoder; None: of random weights."""
    tokens = [one for one in options if one.startswith("model.")]
    values: dict[str, np.ndarray] = {}
    found: Row = {}
    for name, (task, *more) in PROBES.items():
        # Everything is trained at one rate; the weights of the encoder are put in below.
        common = [f"task={task}", "task.adapt=scratch", "task.pooling=mean_std", *tokens, "optimizer.lr=3e-3"]
        cfg = settings(out, "split.json", seed, *common, f"trainer.max_steps={STEPS}", *more)
        module: Any = build_module(resolve(cfg))
        data = build_data(cfg)
        tell(module, data)
        if encoder is not None:
            module.model.encoder.load_state_dict(encoder)
        if name.startswith("linear"):
            values = values or features(module, data)
            found[name] = linear(values, data, cfg.task.target.kind)
        else:
            fit(module, data, lambda batch, one=module: one.loss(one.outputs(batch), batch["target"]), None, STEPS)
            found[name] = said(module, data)
    return found


def point(out: Path, name: str, seed: int, seconds: float) -> Row:
    """Pre-train and judge one setting."""
    if name == UNTRAINED:
        return {"name": name, "seed": seed, "seconds": 0, "steps": 0} | judged(out, seed, [], None)
    cfg = settings(out, "pretrain.json", seed, *PRETRAIN, *POINTS[name])
    module, data = make(cfg)
    steps, spent = fit(module, data, module.loss, seconds, 0)
    assert spent >= seconds, "the loader ended: raise trainer.max_steps"
    row: Row = {"name": name, "seed": seed, "seconds": seconds, "steps": steps} | reconstruction(module, data)
    return row | judged(out, seed, POINTS[name], module.model.encoder.state_dict())


# --- table and figure -----------------------------------------------------------------------------------------------
def kept() -> list[Row]:
    """Trainings that are done."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def drawn(rows: list[Row], figure: str) -> np.ndarray:
    """(1 + draws,) of a figure: on all test subjects, then under a bootstrap over them; the mean over seeds."""
    return np.mean([_drawn(json.dumps(row[figure], sort_keys=True), figure) for row in rows], 0)


@cache
def _drawn(content: str, figure: str) -> np.ndarray:
    of = json.loads(content)
    subjects = sorted(of)
    pairs = np.array([of[subject] for subject in subjects])
    weights = np.vstack([np.ones(len(subjects)), *draw_weights(np.arange(len(subjects)), 0, DRAWS)])
    if figure in LOWER:
        return np.asarray(weights @ pairs[:, 0] / (weights @ pairs[:, 1]))
    if figure == "linear, number":
        rows = Predictions.from_clips("regression", [], subjects, subjects, [0] * len(subjects), *pairs.T)
        return np.asarray(weighted_scores(rows, None, weights)["r"])
    both = np.stack([1 - pairs[:, 1], pairs[:, 1]], 1)
    rows = Predictions.from_clips("binary", ["0", "1"], subjects, subjects, [0] * len(subjects), pairs[:, 0], both)
    return np.asarray(weighted_scores(rows, decide(rows), weights)["auroc"])


def tables(rows: list[Row]) -> list[str]:
    """Lines of probe.md: a row a setting, then the paired differences."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(row["name"], []).append(row)
    names = [name for name in (*POINTS, UNTRAINED) if name in by]
    lines = [
        "| pre-trained with | CPU-s | seeds | steps | " + " | ".join(FIGURES.values()) + " |",
        "|" + "---|" * (4 + len(FIGURES)),
    ]
    for name in names:
        mine = by[name]
        steps = sum(row["steps"] for row in mine) / len(mine)
        cells = []
        for figure in FIGURES:
            if figure not in mine[0]:
                cells.append("")
                continue
            values = drawn(mine, figure)
            low, high = np.nanquantile(values[1:], [0.025, 0.975])
            cells.append(f"{values[0]:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {name} | {mine[0]['seconds']:.0f} | {len(mine)} | {steps:.0f} | " + " | ".join(cells) + " |")
    lines += ["", "| first minus second | " + " | ".join(FIGURES.values()) + " |", "|" + "---|" * (1 + len(FIGURES))]
    for first, second in PAIRS:
        if first not in by or second not in by:
            continue
        cells = []
        for figure in FIGURES:
            apart = drawn(by[first], figure) - drawn(by[second], figure)
            test = from_draws(float(apart[0]), apart[1:], len(by[first][0][figure]))
            cells.append(f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]")
        lines.append(f"| {first} - {second} | " + " | ".join(cells) + " |")
    return lines


def show() -> None:
    """Table and figure of what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = kept()
    lines = tables(rows)
    names = [name for name in (*POINTS, UNTRAINED) if any(row["name"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(FIGURES), figsize=(14, 2.6), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, FIGURES.items()):
        for place, name in enumerate(names):
            mine = [row for row in rows if row["name"] == name and key in row]
            if not mine:
                continue
            values = drawn(mine, key)
            low, high = np.nanquantile(values[1:], [0.025, 0.975])
            axis.plot([low, high], [place, place], "-", color="0.5")
            axis.plot([drawn([row], key)[0] for row in mine], [place] * len(mine), "o", color="C0", alpha=0.5)
            axis.plot(values[0], place, "|", color="black", markersize=14)
        axis.set_xlabel(title)
        axis.set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(HERE / "probe.png", dpi=110)
    (HERE / "probe.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"), help="the cohort goes there (runs/tokens)")
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of a pre-training (60)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, order and masks (0 1 2)")
    parser.add_argument("--only", nargs="+", choices=[*POINTS, UNTRAINED], default=[*POINTS, UNTRAINED], metavar="NAME")
    parser.add_argument("--show", action="store_true", help="table and figure of what is kept, no training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.show:
        out = options.out.resolve()
        make_cohort(out)
        for seed in options.seeds:
            for name in options.only:
                if any((row["name"], row["seed"]) == (name, seed) for row in kept()):
                    continue
                row = point(out, name, seed, options.seconds)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, seed, row["steps"], *(f"{key} {drawn([row], key)[0]:.4f}" for key in FIGURES if key in row))
                sys.stdout.flush()
    show()


if __name__ == "__main__":
    main()

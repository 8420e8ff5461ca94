"""Which tokens: box or brain, mask tokens or hidden units left out, and how large a unit, at equal CPU time.

    python experiments/tokens/run.py [--seconds 25] [--seeds 0 1 2] [--only NAME ...]
    python experiments/tokens/run.py --show

Trains what is not in results.jsonl yet, adds a line for each training, then writes table.md and tokens.png beside it.
Clips are those of the two sample scans (48x48x48 voxels of 4 mm, 10 frames). A patch has 4 voxels, so that a unit of
one, two and four patches stands for one of 6, 12 and 24 voxels at 2 mm with patches of 6: four patches are one token of
stage 3. All models are judged on the same held-out clips under the same masks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.learning.train_point import clip_rows, make  # noqa: E402
from swift.config.compose import composed  # noqa: E402
from swift.evaluate.linear_baselines import fit_linear  # noqa: E402
from swift.evaluate.reconstruction_baselines import brain_mean  # noqa: E402
from swift.models.masking import draw_mask, draw_shown, mask_voxels  # noqa: E402
from swift.models.visible import Units  # noqa: E402
from swift.train.optim import build_optimizer, lr_factor  # noqa: E402
from swift.train.pretrain import PretrainModule  # noqa: E402

BASE = [
    *("data.frames=10", "data.batch_size=1", "data.workers=0", "model.patch_size=[4,4,4,1]", "model.depths=[2,2,2]"),
    *("model.num_heads=[4,8,8]", "optimizer.lr=2e-3", "trainer.threads=1", "trainer.max_steps=20000"),
    "run_dir=unused",
]
POINTS: dict[str, list[str]] = {
    "box, token, 1 patch": ["model.tokens=box"],
    "brain, token, 1 patch": ["model.tokens=brain"],
    "brain, token, 4 patches in all frames": [
        "model.tokens=brain",
        "task.mask_unit=[16,16,16,1]",
        "task.mask_kind=tube",
    ],
    "drop, 4 patches in all frames": ["task.hidden=drop", "task.mask_kind=tube"],
    "brain, token, 2 patches": ["model.tokens=brain", "task.mask_unit=[8,8,8,1]"],
    "brain, token, 4 patches": ["model.tokens=brain", "task.mask_unit=[16,16,16,1]"],
    "box, token, 4 patches in all frames": ["model.tokens=box", "task.mask_unit=[16,16,16,1]", "task.mask_kind=tube"],
}
LINEAR = "low-rank of each scan, fitted to its training frames"
RESULTS = HERE / "results.jsonl"
WARMUP = 0.05
MASKS = ("patches", "tubes")
MASK_SEEDS = 2
Row = dict[str, Any]


def judge_mask(kind: str, module: PretrainModule, batch: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    """Hidden patches (B, x, y, z, t): single ones at random in every frame, or units of four in all frames."""
    volume, patch, ratio = tuple(batch["bold"].shape[2:]), (4, 4, 4, 1), 0.8
    if kind == "patches":
        return draw_mask(seed, batch["sample_id"], volume, patch, patch, ratio, "random")
    # As in training with hidden=drop: what is shown lies in the brain.
    units = Units(volume, (16, 16, 16), patch, 2, 5)
    return units.mask(draw_shown(seed, batch["sample_id"], units.touched(batch["brain"]), units.shown))


@torch.no_grad()
def judge(module: PretrainModule, data: Any) -> dict[str, list[Row]]:
    """Sum of |error| and hidden voxels of every held-out clip and mask, and those of the brain's mean beside it."""
    module.eval()
    found: dict[str, list[Row]] = {kind: [] for kind in MASKS}
    for kind in MASKS:
        for seed in range(MASK_SEEDS):
            for packed in data.val_dataloader():
                batch = data.dense(packed)
                mask = judge_mask(kind, module, batch, 1000 + seed)
                hidden = mask_voxels(mask, (4, 4, 4, 1), batch["bold"].shape[2:])
                prediction = module.reconstruct_under(batch, mask)
                rows = clip_rows(data, batch, hidden, prediction, seed, None)
                mean = clip_rows(data, batch, hidden, brain_mean(batch["bold"], hidden, batch["brain"]), seed, None)
                for row, other in zip(rows, mean, strict=True):
                    row["brain_mean"] = other["sum"]
                found[kind] += rows
    return found


def train(name: str, seed: int, seconds: float) -> Row:
    """Train for so many CPU seconds, the rate falling along them, and judge."""
    cfg = composed([*BASE, *POINTS[name], f"seed={seed}"])[0]
    module, data = make(cfg)
    module.train()
    optimizer = build_optimizer(module.model, cfg.optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    spent, step = 0.0, 0
    for packed in data.train_dataloader():
        began = time.process_time()
        factor = lr_factor(round(1e6 * spent / seconds), round(1e6 * WARMUP), 10**6, cfg.optimizer.min_lr_ratio)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        batch = data.dense(packed)
        optimizer.zero_grad(set_to_none=True)
        module.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.clip_norm)
        optimizer.step()
        step += 1
        spent += time.process_time() - began
        if spent >= seconds:
            break
    assert spent >= seconds, "the loader ended: raise trainer.max_steps"
    return {"name": name, "seed": seed, "seconds": seconds, "steps": step, "clips": judge(module, data)}


def fit(seed: int) -> Row:
    """What a linear prediction reaches under the same masks, its rank chosen under hidden tubes: no network."""
    cfg = composed([*BASE, *POINTS["brain, token, 4 patches in all frames"], f"seed={seed}"])[0]
    module, data = make(cfg)
    began = time.process_time()
    models = fit_linear(data, cfg, len(data.val_index))
    models.names = [models.name]
    spent = time.process_time() - began
    found: dict[str, list[Row]] = {kind: [] for kind in MASKS}
    for kind in MASKS:
        for draw in range(MASK_SEEDS):
            for packed in data.val_dataloader():
                batch = data.dense(packed)
                hidden = mask_voxels(
                    judge_mask(kind, module, batch, 1000 + draw), (4, 4, 4, 1), batch["bold"].shape[2:]
                )
                prediction = models.predict(*(batch["bold"], hidden, batch["brain"], batch["scan"], batch["valid"]))
                found[kind] += clip_rows(data, batch, hidden, prediction[models.name], draw, None)
    return {"name": LINEAR, "seed": seed, "seconds": round(spent), "steps": 0, "clips": found}


def kept() -> list[Row]:
    """Trainings that are done."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def error(row: Row, kind: str, which: str = "sum") -> float:
    """Mean |error| over all hidden voxels of the brain."""
    rows = row["clips"][kind]
    return float(sum(one[which] for one in rows) / sum(one["voxels"] for one in rows))


def show() -> None:
    """Table and figure of what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = kept()
    lines = ["| trained with | CPU-s | seeds | steps | L1, hidden patches | L1, hidden tubes |", "|" + "---|" * 6]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    means = {kind: error(rows[0], kind, "brain_mean") for kind in MASKS}
    places = [*POINTS, LINEAR]

    def order(one: tuple[str, float]) -> tuple[bool, float, int]:
        return one[0] == LINEAR, one[1], places.index(one[0])

    done = sorted({(row["name"], row["seconds"]) for row in rows}, key=order)
    for place, (name, seconds) in enumerate(done):
        mine = [row for row in rows if (row["name"], row["seconds"]) == (name, seconds)]
        steps = sum(row["steps"] for row in mine) / len(mine)
        cells = []
        for axis, kind in zip(axes, MASKS):
            values = [error(row, kind) for row in mine]
            middle = sum(values) / len(values)
            spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{middle:.4f}{spread}")
            axis.plot(values, [place] * len(values), "o", color="C0", alpha=0.6)
            axis.plot(middle, place, "|", color="black", markersize=14)
        lines.append(f"| {name} | {seconds:.0f} | {len(mine)} | {steps:.0f} | {cells[0]} | {cells[1]} |")
    lines.append(f"| brain mean, nothing trained | | | | {means['patches']:.4f} | {means['tubes']:.4f} |")
    for axis, kind in zip(axes, MASKS):
        axis.axvline(means[kind], color="0.6", linestyle=":", label="brain mean")
        axis.set_xlabel(f"held-out L1, hidden {kind}")
        axis.set_yticks(range(len(done)), [f"{name}, {seconds:.0f} s" for name, seconds in done])
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="small")
    figure.savefig(HERE / "tokens.png", dpi=110)
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=25, help="CPU time of a training (25)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, order and masks (0 1 2)")
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS), metavar="NAME", help="trainings")
    parser.add_argument("--show", action="store_true", help="table and figure of what is kept, no training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if options.show else options.seeds:
        for name in options.only:
            if not any((row["name"], row["seed"], row["seconds"]) == (name, seed, options.seconds) for row in kept()):
                row = train(name, seed, options.seconds)
                with RESULTS.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(name, seed, row["steps"], *(f"{kind} {error(row, kind):.4f}" for kind in MASKS), flush=True)
    if not options.show and not any(row["name"] == LINEAR for row in kept()):
        with RESULTS.open("a") as out:
            out.write(json.dumps(fit(0)) + "\n")
    show()


if __name__ == "__main__":
    main()

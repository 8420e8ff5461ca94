"""Does the best learning rate of a narrow model serve a wide one? A sweep over widths, with and without muP.

Trains small models on the synthetic cohort through swift's own module, optimizer groups and schedule, in one process
without a Trainer, on the same batches in the same order. Writes sweep.csv (one line a run; a run that is in it is not
repeated), summary.json and mu_transfer.png beside this file. See README.md.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift.config.schema import Config
from swift.report.style import COLOURS, figure, gridded
from swift.train.coord_check import MODES, loss_of, mode_config
from swift.train.pretrain import Batch, PretrainModule
from swift.train.wiring import build_data

HERE = Path(__file__).resolve().parent
WIDTHS = (16, 48, 144)
EXPONENTS = tuple(range(-10, -2))
"""Peak learning rates are powers of 2."""
STEPS, SEEDS, HELD_OUT = 120, 2, 8
TITLES = dict(zip(MODES, ("with muP", "without muP"), strict=True))
COLUMNS = ("mode", "width", "log2_lr", "seed", "steps", "train_l1", "val_l1", "seconds")


def settings(mode: str, width: int, exponent: int, seed: int, steps: int) -> Config:
    """One run: 12x12x12 voxels in patches of 3x3x3, 8 frames in pairs; widths from 16 on, the first is muP's base."""
    overrides = [
        f"model.embed_dim={width}",
        "model.depths=[2,2]",
        "model.num_heads=[2,4]",
        "model.patch_size=[3,3,3,2]",
        "model.window=[2,2,2,2]",
        "model.decoder_dim=32",
        "data=synthetic",
        "data.grid=[12,12,12]",
        "data.spacing=16.0",
        "data.frames=8",
        "data.batch_size=4",
        "data.workers=0",
        "task.mask_ratio=0.5",
        f"trainer.max_steps={steps}",
    ]
    return mode_config(overrides, mode, WIDTHS[0], 2.0**exponent, seed)


def batches(cfg: Config) -> tuple[list[Batch], list[Batch]]:
    """All training batches of a run in their order, and the held-out ones; the cohort is that of the seed."""
    data = build_data(cfg)

    def taken(loader: Any, number: int) -> list[Batch]:
        dense = (data.dense(packed) for packed in itertools.islice(loader, number))
        return [{name: value.clone() for name, value in batch.items()} for batch in dense]

    return taken(data.train_dataloader(), cfg.trainer.max_steps), taken(data.val_dataloader(), HELD_OUT)


def train(cfg: Config, training: list[Batch], held_out: list[Batch]) -> tuple[float, float]:
    """Mean training loss of the last tenth, and held-out loss at the end; nan if the run diverged."""
    torch.manual_seed(cfg.seed)
    module = PretrainModule(cfg)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    losses = []
    for batch in training:
        optimizer.zero_grad()
        loss = loss_of(module, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return math.nan, math.nan
    with torch.no_grad():
        module.eval()
        held = [float(loss_of(module, batch)) for batch in held_out]
    return float(np.mean(losses[-max(len(losses) // 10, 1) :])), float(np.mean(held))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a sweep that has been run, in numbers."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    whole = ("width", "log2_lr", "seed", "steps")
    return [
        {name: value if name == "mode" else (int if name in whole else float)(value) for name, value in row.items()}
        for row in rows
    ]


def sweep(path: Path, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Run what is not in the table yet; each run is written as it ends."""
    rows = read(path)
    done = {(row["mode"], row["width"], row["log2_lr"], row["seed"], row["steps"]) for row in rows}
    for seed in range(seeds):
        training: list[Batch] = []
        for width, mode, exponent in itertools.product(WIDTHS, TITLES, EXPONENTS):
            if (mode, width, exponent, seed, steps) in done:
                continue
            cfg = settings(mode, width, exponent, seed, steps)
            if not training:
                training, held_out = batches(cfg)
            started = time.process_time()
            last, held = train(cfg, training, held_out)
            row = dict(zip(COLUMNS, (mode, width, exponent, seed, steps, last, held, time.process_time() - started)))
            rows.append(row)
            with path.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(row | {name: f"{row[name]:.5f}" for name in ("train_l1", "val_l1", "seconds")})
            print(
                f"{mode:8} width {width:3} lr 2^{exponent:3} seed {seed}: val {held:.4f}, {row['seconds']:.1f} CPU-s",
                flush=True,
            )
    return rows


def whole_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the seeds that have every mode, width and rate: an average over other seeds elsewhere would mislead."""
    cells = len(TITLES) * len(WIDTHS) * len(EXPONENTS)
    numbers = [row["seed"] for row in rows]
    return [row for row in rows if numbers.count(row["seed"]) == cells]


def curves(rows: list[dict[str, Any]], key: str) -> dict[tuple[str, int], np.ndarray]:
    """(mode, width) -> mean over the seeds at every rate; nan where a seed diverged."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for mode, width in itertools.product(TITLES, WIDTHS):
        at = [[r[key] for r in rows if (r["mode"], r["width"], r["log2_lr"]) == (mode, width, e)] for e in EXPONENTS]
        found[mode, width] = np.array([np.mean(values) if values else np.nan for values in at])
    return found


def best(curve: np.ndarray) -> int:
    """Exponent of the rate with the lowest loss."""
    return EXPONENTS[int(np.nanargmin(curve))]


def summary(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Best rates, how far they move, and what the narrow model's rate costs the widest one."""
    table = curves(rows, key)
    result: dict[str, Any] = {
        "judged_by": key,
        "seeds": len({r["seed"] for r in rows}),
        "cpu_minutes": sum(r["seconds"] for r in rows) / 60,
    }
    for mode in TITLES:
        rates = {width: best(table[mode, width]) for width in WIDTHS}
        widest = table[mode, WIDTHS[-1]]
        carried = widest[EXPONENTS.index(rates[WIDTHS[0]])]
        result[mode] = {
            "best_log2_lr": rates,
            "moves_by_steps_of_2": max(rates.values()) - min(rates.values()),
            "best_loss": {width: float(np.nanmin(table[mode, width])) for width in WIDTHS},
            "loss_of_widest_at_rate_of_narrowest": float(carried),
        }
    result["passed"] = result["mup"]["moves_by_steps_of_2"] <= 1 < result["standard"]["moves_by_steps_of_2"]
    return result


def draw(rows: list[dict[str, Any]], key: str, out: Path) -> None:
    """Loss against rate, a curve a width; the best rate of each is marked."""
    table, seeds = curves(rows, key), sorted({row["seed"] for row in rows})
    single = [curves([row for row in rows if row["seed"] == seed], key) for seed in seeds]
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in table.values()])
    with figure(3.4, out) as fig:
        axes = fig.subplots(1, 2, sharey=True)
        for ax, (mode, title) in zip(axes, TITLES.items(), strict=True):
            for index, width in enumerate(WIDTHS):
                curve = table[mode, width]
                ax.plot(EXPONENTS, curve, color=COLOURS[index], marker="o", ms=3, lw=1.4, label=f"width {width}")
                if len(seeds) > 1:
                    each = np.stack([one[mode, width] for one in single])
                    ax.vlines(EXPONENTS, each.min(0), each.max(0), color=COLOURS[index], lw=0.8)
                ax.plot(best(curve), np.nanmin(curve), color=COLOURS[index], marker="*", ms=12, mec="white")
            ax.set_title(title, loc="left", fontweight="bold")
            ax.set_xlabel("peak learning rate, log2" + (f" (at width {WIDTHS[0]})" if mode == "mup" else ""))
            gridded(ax)
        axes[0].set_ylabel("held-out L1 at hidden voxels\n(SD of each voxel)")
        axes[0].set_ylim(finite.min() - 0.01, np.percentile(finite, 90) + 0.01)
        axes[0].legend()
        what = (
            "one seed: no interval" if len(seeds) == 1 else f"mean of {len(seeds)} seeds; bars: lowest to highest seed"
        )
        fig.supxlabel(f"stars: best rate of each width; curves that leave the top are worse still; {what}", fontsize=8)


def main() -> None:
    """Run the sweep, or only judge and draw what lies there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/mu_transfer"), help="folder of sweep.csv, summary.json, mu_transfer.png"
    )
    parser.add_argument("--draw", action="store_true", help="run nothing, only judge and draw sweep.csv")
    parser.add_argument("--judge", choices=("val_l1", "train_l1"), default="val_l1")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sweep.csv"
    rows = read(path) if options.draw else sweep(path, options.steps, options.seeds)
    rows = whole_seeds(rows)
    if not rows:
        raise SystemExit(f"{path}: no seed has all its runs yet")
    result = summary(rows, options.judge)
    (options.out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, options.judge, options.out / "mu_transfer.png")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Does the best learning rate of a narrow model serve a wide one? A sweep over widths, with and without muP.

Trains small models on a synthetic cohort through swift's own module, optimizer groups and schedule, in one process
without a Trainer, on the same batches in the same order. Rates are added until every valley has two on each side of
its lowest. Writes sweep.csv (one line a run; a run that is in it is not repeated), summary.json and mu_transfer.png.
How they are judged: valleys.py. See README.md.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from valleys import CURVES, WIDTHS, Curve, draw, lowest, summary, text

from swift.config.schema import Config
from swift.data.synthetic import CohortSpec
from swift.data.synthetic.write import made_once
from swift.train.coord_check import loss_of, mode_config
from swift.train.pretrain import Batch, PretrainModule
from swift.train.wiring import build_data

STEPS, SEEDS, HELD_OUT = 80, 3, 8
FIRST = 5
"""Rates of a curve before any is added."""
MOST = 12
"""Rates of a curve at most."""
COLUMNS = ("curve", "width", "log2_lr", "seed", "steps", "train_l1", "val_l1", "seconds")
Row = dict[str, Any]


def cohort(folder: Path, seed: int) -> Path:
    """The store of a seed: 16 subjects of 120 frames with a tenth of the usual noise, so that the rate matters."""
    quiet: dict[str, Any] = {"noise_white": 0.1, "noise_smooth": 0.1, "drift": 0.0, "motion": 0.0}
    spec = CohortSpec(n_subjects=16, frames=120, grid=(12, 12, 12), spacing=16.0, seed=seed, **quiet)
    target = folder / "cohorts" / str(seed)
    if not made_once(spec, target):
        raise SystemExit(f"{target}: holds something else than the cohort of this study; use a new --out")
    return target


def settings(store: Path, curve: Curve, width: int, exponent: int, seed: int, steps: int) -> Config:
    """One run: 12x12x12 voxels in patches of 3x3x3, 4 frames in pairs, half of the patches hidden."""
    overrides = [
        f"model.embed_dim={width}",
        "model.depths=[2,2]",
        "model.num_heads=[2,4]",
        "model.patch_size=[3,3,3,2]",
        "model.window=[2,2,2,2]",
        "model.decoder_dim=32",
        "data=store",
        f"data.path={store}",
        "data.frames=4",
        "data.clip_stride=4",
        "data.batch_size=4",
        "data.workers=0",
        "task.mask_ratio=0.5",
        f"trainer.max_steps={steps}",
    ]
    return mode_config(overrides, curve.mode, curve.base, 2.0**exponent, seed)


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


def read(path: Path) -> list[Row]:
    """Rows of a sweep that has been run, in numbers."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    whole = ("width", "log2_lr", "seed", "steps")
    return [
        {name: value if name == "curve" else (int if name in whole else float)(value) for name, value in row.items()}
        for row in rows
    ]


def missing(rows: list[Row], curve: Curve, width: int, seeds: Sequence[int]) -> tuple[int, int] | None:
    """The next (seed, exponent) of a curve: its first rates, then rates beside a lowest loss near an edge.

    Args:
        rows: Of the sweep so far.
        curve: With or without muP.
        width: Of the models.
        seeds: Those that every rate must have.
    """
    found = {(r["seed"], r["log2_lr"]): r["val_l1"] for r in rows if (r["curve"], r["width"]) == (curve.name, width)}
    first = range(curve.first[width], curve.first[width] + FIRST)
    wanted = sorted({*first, *(exponent for _, exponent in found)})
    for seed, exponent in itertools.product(seeds, wanted):
        if (seed, exponent) not in found:
            return seed, exponent
    means = np.array([np.mean([found[seed, exponent] for seed in seeds]) for exponent in wanted])
    at = lowest(means)
    if len(wanted) >= MOST:
        return None
    if at < 2:
        return seeds[0], wanted[0] - 1
    return (seeds[0], wanted[-1] + 1) if at > len(wanted) - 3 else None


def sweep(folder: Path, steps: int, seeds: int) -> list[Row]:
    """Run what is not in the table yet; each run is written as it ends."""
    path = folder / "sweep.csv"
    rows = [row for row in read(path) if row["steps"] == steps]
    loaded: dict[int, tuple[list[Batch], list[Batch]]] = {}
    # Seed by seed, so that what has ended can be judged at any time.
    for upto, curve, width in itertools.product(range(1, seeds + 1), CURVES, WIDTHS):
        if width not in curve.first:
            continue
        while (place := missing(rows, curve, width, range(upto))) is not None:
            seed, exponent = place
            cfg = settings(cohort(folder, seed), curve, width, exponent, seed, steps)
            if seed not in loaded:
                loaded = {seed: batches(cfg)}
            started = time.process_time()
            last, held = train(cfg, *loaded[seed])
            values = (curve.name, width, exponent, seed, steps, last, held, time.process_time() - started)
            row = dict(zip(COLUMNS, values, strict=True))
            rows.append(row)
            with path.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(row | {name: f"{row[name]:.5f}" for name in ("train_l1", "val_l1", "seconds")})
            print(
                f"{curve.name:8} width {width:3} lr 2^{exponent:3} seed {seed}: val {held:.4f}, "
                f"{row['seconds']:.1f} CPU-s",
                flush=True,
            )
    return rows


def main() -> int:
    """Run the sweep, or only judge and draw what lies there; status 1 where the check fails."""
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
    rows = read(path) if options.draw else sweep(options.out, options.steps, options.seeds)
    if not rows:
        raise SystemExit(f"{path}: holds no run yet")
    result = summary(rows, options.judge)
    (options.out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, result, options.out / "mu_transfer.png")
    print(text(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

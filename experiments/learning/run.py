"""What does masked pre-training learn beside the strongest linear predictions? See README.md.

Three parts; what is in results.json is not done again, so that the study can be stopped and gone on with:
linear: closed forms and the untrained model with maps, on the demo's held-out clips under some mask seeds;
cohort: the same on held-out subjects of a synthetic cohort;
train: the demo's recipe, today's and with maps, from `python -m swift.train`, with the CPU time of the process.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from swift.config.compose import composed
from swift.config.schema import Config
from swift.data.labels.splits import Split, save_splits
from swift.data.module import ClipDataModule
from swift.data.synthetic import CohortSpec, write_store
from swift.evaluate.linear_baselines import fit_linear
from swift.evaluate.reconstruction_baselines import brain_mean, masked_l1_sum
from swift.models.masking import mask_voxels
from swift.parallel.setup import resolve
from swift.report.style import COLOURS, DPI, STYLE, WIDTH, save
from swift.train.pretrain import PretrainModule
from swift.train.wiring import build_data, build_module, tell
from swift.utils import jsonl

HERE = Path(__file__).resolve().parent
DEMO = ["data.workers=0", "trainer.threads=1", "run_dir=unused"]
COHORT = ["model.embed_dim=24", "model.depths=[2,2]", "model.num_heads=[4,8]", "model.patch_size=[4,4,4,1]",
          "data.grid=[16,16,16]", "data.spacing=8.0", "data.batch_size=4", "model.maps_of=shared"]  # fmt: skip
ARMS = {
    "today": ["trainer.val_every=50"],
    "maps": ["model.maps=40", "trainer.val_every=25"],
}


def scores(cfg: Config, data: ClipDataModule, seeds: int) -> list[dict[str, Any]]:
    """Sum of |error| and number of hidden voxels of every prediction, for each held-out clip and mask seed."""
    module = build_module(resolve(cfg))
    assert isinstance(module, PretrainModule)
    tell(module, data)
    if module.first_weights is not None:
        for name, parameter in module.named_parameters():
            if name in module.first_weights.shapes:
                parameter.data.copy_(module.first_weights.tensors[name])
    module.eval()
    linear = fit_linear(data, cfg, len(data.val_index))
    print(*linear.notes, sep="\n")
    rows = []
    for seed in range(seeds):
        module.cfg = replace(cfg, seed=seed)
        for packed in data.val_dataloader():
            batch = data.dense(packed)
            with torch.no_grad():
                prediction, mask = module.reconstruct(batch)
                hidden = mask_voxels(mask, cfg.model.patch_size, batch["bold"].shape[2:])
                place = (batch["bold"], hidden, batch["brain"])
                found = {"brain mean": brain_mean(*place), **linear.predict(*place, batch["scan"], batch["valid"])}
                found["model with maps, untrained"] = prediction
            for name, values in found.items():
                for clip in batch["valid"].nonzero()[:, 0].tolist():
                    one = slice(clip, clip + 1)
                    total, count = masked_l1_sum(values[one], *(part[one] for part in place))
                    scan = data.store.scans[int(batch["scan"][clip])]
                    about = {"seed": seed, "subject": scan.subject, "start": int(batch["start"][clip])}
                    rows.append({"prediction": name, **about, "sum": float(total), "voxels": int(count)})
    return rows


def table(rows: list[dict[str, Any]], reference: str, unit: str) -> dict[str, Any]:
    """L1 of each prediction, and its difference to `reference` with a 95 % bootstrap interval over `unit`s."""
    names = sorted({row["prediction"] for row in rows})
    units = sorted({(row[unit] if unit == "subject" else (row["subject"], row["start"])) for row in rows})
    sums = np.zeros((len(names), len(units), 2))
    for row in rows:
        key = row[unit] if unit == "subject" else (row["subject"], row["start"])
        sums[names.index(row["prediction"]), units.index(key)] += row["sum"], row["voxels"]
    draws = np.random.default_rng(0).integers(len(units), size=(4000, len(units)))
    level = sums.sum(1)[:, 0] / sums.sum(1)[:, 1]
    drawn = sums[:, draws].sum(2)
    drawn = drawn[..., 0] / drawn[..., 1]
    base = names.index(next(name for name in names if name.startswith(reference) and "+" not in name))
    found = {}
    for place, name in enumerate(names):
        low, high = np.percentile(drawn[place] - drawn[base], [2.5, 97.5])
        found[name] = {"l1": level[place], "difference": level[place] - level[base], "low": low, "high": high}
    return found


def linear_part(seeds: int) -> dict[str, Any]:
    cfg = composed([*DEMO, "model.maps=40"])[0]
    rows = scores(cfg, build_data(cfg), seeds)
    return {"table": table(rows, "low-rank", "clip"), "rows": rows}


def cohort_part(cache: Path) -> dict[str, Any]:
    store, split = cache / "learning-cohort", cache / "learning-split.json"
    if not (store / "store.json").exists():
        write_store(CohortSpec(n_subjects=60, grid=(16, 16, 16), spacing=8.0, frames=100, seed=0), store)
    base = [*DEMO, *COHORT, "data=store", f"data.path={store}"]
    subjects = sorted({scan.subject for scan in build_data(composed(base)[0]).store.scans})
    save_splits(split, [Split({"train": tuple(subjects[:48]), "val": tuple(subjects[48:]), "test": ()})])
    cfg = composed([*base, f"data.split={split}", "model.maps=20"])[0]
    rows = scores(cfg, build_data(cfg), 1)
    return {"table": table(rows, "low-rank", "subject"), "rows": rows}


def train_part(arm: str, runs: Path, steps: int) -> dict[str, Any]:
    """One run of the command; CPU seconds are those of the whole process, start, baselines and figures included."""
    run = runs / f"learning-{arm}"
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    options = ["trainer.threads=1", "data.workers=0", f"trainer.max_steps={steps}", f"run_dir={run}", *ARMS[arm]]
    subprocess.run([sys.executable, "-m", "swift.train", *options], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    summary = json.loads((run / "summary.json").read_text())
    curve = [[line["step"], line["val/l1"]] for line in jsonl.read(run / "metrics.jsonl") if "val/l1" in line]
    return {"cpu_seconds": spent, "wall_seconds": time.time() - started, "curve": curve, "summary": summary}


def draw(results: dict[str, Any], out: Path) -> None:
    """Difference of each prediction to the low-rank Gaussian, with its interval; a panel for each part."""
    parts = [part for part in ("linear", "cohort") if part in results]
    titles = {"linear": "the demo's held-out clips", "cohort": "held-out synthetic subjects"}
    with mpl.rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, 2.4), dpi=DPI, layout="constrained")
        for ax, part in zip(np.atleast_1d(fig.subplots(1, len(parts))), parts):
            rows = sorted(results[part]["table"].items(), key=lambda item: -item[1]["l1"])
            for place, (name, one) in enumerate(rows):
                colour = COLOURS[1] if name.startswith("model") else COLOURS[0]
                ax.plot([one["low"], one["high"]], [place, place], color=colour, lw=1.5)
                ax.plot(one["difference"], place, "o", color=colour, ms=4)
            ax.axvline(0, color="0.6", lw=0.8)
            ax.set_yticks(range(len(rows)), [f"{name}  {one['l1']:.4f}" for name, one in rows], fontsize=6)
            ax.locator_params(axis="x", nbins=4)
            ax.set_xlabel("held-out L1 beside low-rank", fontsize=7)
            ax.set_title(titles[part], fontsize=7.5)
        save(fig, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["linear", "cohort", *ARMS], help="linear | cohort | today | maps")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs and the cohort are kept")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=10, help="mask seeds of the linear part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in options.parts:
        if part in results:
            continue
        began = time.process_time()
        if part in ARMS:
            results[part] = train_part(part, options.runs, options.steps)
        else:
            made = linear_part(options.seeds) if part == "linear" else cohort_part(options.runs)
            with (HERE / f"{part}.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, made["rows"][0].keys())
                writer.writeheader()
                writer.writerows(made.pop("rows"))
            results[part] = {**made, "cpu_seconds": time.process_time() - began}
        path.write_text(json.dumps(results, indent=1) + "\n")
    for part in ("linear", "cohort"):
        rows = results.get(part, {}).get("table", {})
        for name, one in sorted(rows.items(), key=lambda item: item[1]["l1"]):
            interval = f"[{one['low']:+.4f}, {one['high']:+.4f}]"
            print(f"{part:<7} {name:<44} {one['l1']:.4f}  {one['difference']:+.4f} {interval}")
    if "linear" in results:
        draw(results, HERE / "learning.png")


if __name__ == "__main__":
    main()

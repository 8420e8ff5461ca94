"""Planted maps from rest: a dense head beside every baseline, on one cohort and split.

    python experiments/task_maps/run.py [--work FOLDER] [--subjects N] [--only NAME ...] [--keep]

Makes a synthetic cohort with maps of couplings, of amplitudes and of nothing in the scans (four draws), fits the
baselines, trains map_unet with and without the courses of 24 spatial maps and with and without pre-training on the
training subjects, and writes summary.json, table.md and maps.png (into FOLDER, with --keep beside
this file). The settings (courses, rate, steps) were chosen on the validation subjects. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

HERE = Path(__file__).parent
MODEL = [
    "model.embed_dim=24",
    "model.depths=[2,2]",
    "model.num_heads=[4,8]",
    "model.patch_size=[4,4,4,4]",
    "model.window=[3,3,3,5]",
    "model.decoder_dim=32",
]
CLIPS = ["data.frames=20", "data.frame_stride=3", "data.clip_stride=10"]
COURSES = ["model.maps=24", "task.courses=true"]
PRETRAINED = "pretrained"
TRAINED = {
    "map_unet with courses, random encoder": (200, 2, ["task.head=map_unet", "task.adapt=linear", *COURSES]),
    "map_unet with courses, pre-trained encoder": (
        200,
        1,
        ["task.head=map_unet", "task.adapt=linear", *COURSES, f"init={PRETRAINED}"],
    ),
    "map_unet with courses, pre-trained, all weights": (
        100,
        1,
        ["task.head=map_unet", "task.adapt=full", *COURSES, f"init={PRETRAINED}"],
    ),
    "map_unet with courses, scratch": (100, 1, ["task.head=map_unet", *COURSES]),
    "map_unet, scratch": (100, 1, ["task.head=map_unet"]),
}
"""Name -> steps, seeds, settings. All weights learn the training subjects by heart sooner than the head alone."""
BASELINES = ("mean_map", "mean_amplitude", "connectivity", "fc_components", "nearest")
PLANTED = ("coupling", "amplitude")
UNRELATED = ("unrelated", "unrelated2", "unrelated3", "unrelated4")
SHOWN = ("residual_r", "identification", "r")


def command(*words: str) -> None:
    """A command of swift; what it says goes to this one's output."""
    subprocess.run([sys.executable, "-m", *words], check=True)


def prepare(work: Path, subjects: int) -> list[str]:
    """The cohort, its split and the settings that all methods share."""
    cohort, split = work / "cohort", work / "split.json"
    if not (cohort / "store.json").exists():
        size = ["--subjects", str(subjects), "--frames", "160", "--grid", "24", "28", "24", "--spacing", "6"]
        command("swift.data", "synthetic", "--task-maps", *size, "--out", str(cohort))
    if not split.exists():
        parts = ["--val", "0.15", "--test", "0.3", "--out", str(split)]
        command("swift.data", "split", str(cohort), "--label", "label_binary", *parts)
    return ["data=store", f"data.path={cohort}", f"data.split={split}", "data.workers=0", *CLIPS]


def map_task(work: Path) -> list[str]:
    """The settings of the task of maps."""
    maps = work / "cohort" / "task_maps"
    return [
        "task=task_map",
        f"task.target.maps={maps / 'maps'}",
        f"task.target.retest={maps / 'retest'}",
        f"task.target.contrasts=[{','.join((*PLANTED, *UNRELATED))}]",
        "task.eval_stride=50",
    ]


def train_heads(work: Path, data: list[str], names: list[str]) -> dict[str, list[Path]]:
    """Train what is not there yet.

    Returns:
        Name of a head -> the folder of each of its seeds.
    """
    training = ["trainer.threads=1", "optimizer.lr=6e-3", "optimizer.warmup_steps=20", "data.batch_size=8"]
    pretrained = work / PRETRAINED
    if not (pretrained / "summary.json").exists() and any(PRETRAINED in " ".join(TRAINED[name][2]) for name in names):
        settings = ["model.maps=24", "trainer.max_steps=200", "trainer.val_every=100", f"run_dir={pretrained}"]
        command("swift.train", *data, *MODEL, *training, *settings)
    folders: dict[str, list[Path]] = {}
    for name in names:
        steps, seeds, own = TRAINED[name]
        own = [f"init={pretrained}" if word == f"init={PRETRAINED}" else word for word in own]
        slug = name.replace(", ", "-").replace(" ", "-")
        folders[name] = [work / f"{slug}-{seed}" for seed in range(seeds)]
        for seed, folder in enumerate(folders[name]):
            if not (folder / "summary.json").exists():
                length = [f"trainer.max_steps={steps}", f"trainer.val_every={steps // 4}"]
                rest = ["trainer.figures=true", "task.select=residual_r", f"seed={seed}", f"run_dir={folder}"]
                command("swift.train", *data, *map_task(work), *MODEL, *training, *own, *length, *rest)
    return folders


def main() -> None:
    """Run what is not there yet, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/task_maps"), help="cohort and runs")
    parser.add_argument("--subjects", type=int, default=80)
    parser.add_argument("--only", nargs="+", choices=TRAINED, default=list(TRAINED), help="heads to train")
    parser.add_argument("--keep", action="store_true", help="write the results beside this file, not into --work")
    options = parser.parse_args()
    work: Path = options.work
    out = HERE if options.keep else work
    data = prepare(work, options.subjects)
    fitted = [work / "baselines" / name for name in BASELINES]
    if not all((folder / "summary.json").exists() for folder in fitted):
        command("swift.baselines", *data, *map_task(work), f"run_dir={work / 'baselines'}")
    heads = train_heads(work, data, options.only)

    found = {}
    for name, folders in [*((None, [folder]) for folder in fitted), *heads.items()]:
        seeds = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        kept = {key: seeds[0][key] for key in ("contrasts", "n", "chance", "seed")}
        kept["residual_r_of_seeds"] = {
            contrast: [said["contrasts"][contrast]["scores"]["residual_r"] for said in seeds]
            for contrast in kept["contrasts"]
        }
        kept["beyond_components"] = [beyond(folder, work / "baselines" / "fc_components") for folder in folders]
        found[name or seeds[0]["method"]] = kept
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "table.md").write_text(table(found))
    from swift.report.figures.maps import maps_figure

    maps_figure(heads[options.only[0]][0] / "figures" / "maps.npz", out / "maps.png")


def beyond(folder: Path, reference: Path) -> list[float]:
    """Residual r of the first contrast less that of another method, of the same test subjects.

    Returns:
        The mean difference and its 95 % interval, by 10,000 draws of subjects.
    """
    own, other = (np.load(where / "figures" / "maps.npz", allow_pickle=False) for where in (folder, reference))
    if own["residual"].shape != other["residual"].shape or own["contrast"] != other["contrast"]:
        raise SystemExit(f"{folder} and {reference}: other subjects or another contrast")
    difference = np.diag(own["residual"]) - np.diag(other["residual"])
    draws = np.random.default_rng(0).integers(0, len(difference), (10_000, len(difference)))
    return [float(difference.mean()), *np.percentile(difference[draws].mean(1), [2.5, 97.5]).tolist()]


def table(found: dict[str, dict]) -> str:
    """Methods by contrasts: residual r and identification with intervals, and p of shuffled subjects."""
    contrasts = list(next(iter(found.values()))["contrasts"])
    lines = []
    for contrast in contrasts:
        lines += [
            f"**{contrast}**",
            "",
            "| method | residual r | identification | r | p (residual r) | residual r of further seeds |",
            "|---|---|---|---|---|---|",
        ]
        for name, said in found.items():
            one = said["contrasts"][contrast]
            cells = []
            for score in SHOWN:
                low, high = one["intervals"][score]
                cells.append(f"{one['scores'][score]:.2f} [{low:.2f}, {high:.2f}]")
            further = ", ".join(f"{value:.2f}" for value in said["residual_r_of_seeds"][contrast][1:])
            lines.append(f"| {name} | {' | '.join(cells)} | {one['p']['residual_r']:.4f} | {further} |")
        ceiling = next(iter(found.values()))["contrasts"][contrast]["scores"]
        lines += [
            "",
            f"Ceiling (retest): residual r {ceiling['ceiling_residual_r']:.2f}, r {ceiling['ceiling_r']:.2f}.",
            "",
        ]
    lines += [
        "**Mean over the draws of unrelated maps** (from the lowest to the highest draw)",
        "",
        "| method | residual r | identification |",
        "|---|---|---|",
    ]
    for name, said in found.items():
        cells = []
        for score in ("residual_r", "identification"):
            each = [said["contrasts"][contrast]["scores"][score] for contrast in UNRELATED]
            cells.append(f"{sum(each) / len(each):.2f} [{min(each):.2f}, {max(each):.2f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"**{contrasts[0]}: residual r less that of connectome to map components**, of the same subjects; each seed",
        "",
        "| method | difference |",
        "|---|---|",
    ]
    for name, said in found.items():
        cells = [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" for mean, low, high in said["beyond_components"]]
        lines.append(f"| {name} | {', '.join(cells)} |")
    lines.append("")
    chance = next(iter(found.values()))["chance"]["identification"]
    return "\n".join([*lines, f"Chance of identification: {chance:.3f}."]) + "\n"


if __name__ == "__main__":
    main()

"""Planted maps from rest: a dense head beside every baseline, on one cohort and split.

    python experiments/task_maps/run.py [--work FOLDER] [--subjects N] [--only NAME ...]

Makes a synthetic cohort with maps of couplings, of amplitudes and of nothing in the scans (four draws), fits the
baselines, trains map_unet with and without the courses of 24 spatial maps, and writes summary.json, table.md and
maps.png beside this file. The settings (courses, rate, steps) were chosen on the validation subjects.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

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
TRAINED = {
    "map_unet with courses, random encoder": (200, ["task.head=map_unet", "task.adapt=linear", *COURSES]),
    "map_unet with courses, scratch": (100, ["task.head=map_unet", *COURSES]),
    "map_unet, scratch": (100, ["task.head=map_unet"]),
}
"""Name -> steps, settings. All weights learn the training subjects by heart sooner than the head alone."""
PLANTED = ("coupling", "amplitude")
UNRELATED = ("unrelated", "unrelated2", "unrelated3", "unrelated4")
SHOWN = ("residual_r", "identification", "r")


def command(*words: str) -> None:
    """A command of swift; what it says goes to this one's output."""
    subprocess.run([sys.executable, "-m", *words], check=True)


def main() -> None:
    """Run what is not there yet, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/task_maps"), help="cohort and runs")
    parser.add_argument("--subjects", type=int, default=80)
    parser.add_argument("--only", nargs="+", choices=TRAINED, default=list(TRAINED), help="heads to train")
    options = parser.parse_args()
    work: Path = options.work
    size = ["--subjects", str(options.subjects), "--frames", "160", "--grid", "24", "28", "24", "--spacing", "6"]
    if not (work / "cohort" / "store.json").exists():
        command("swift.data", "synthetic", "--task-maps", *size, "--out", str(work / "cohort"))
    if not (work / "split.json").exists():
        parts = ["--val", "0.15", "--test", "0.3", "--out", str(work / "split.json")]
        command("swift.data", "split", str(work / "cohort"), "--label", "label_binary", *parts)
    maps = work / "cohort" / "task_maps"
    task = [
        "task=task_map",
        f"task.target.maps={maps / 'maps'}",
        f"task.target.retest={maps / 'retest'}",
        f"task.target.contrasts=[{','.join((*PLANTED, *UNRELATED))}]",
        "data=store",
        f"data.path={work / 'cohort'}",
        f"data.split={work / 'split.json'}",
        *CLIPS,
        "task.eval_stride=50",
        "data.workers=0",
    ]
    baselines = ["mean_map", "mean_amplitude", "connectivity", "fc_components", "nearest"]
    if not all((work / "baselines" / name / "summary.json").exists() for name in baselines):
        command("swift.baselines", *task, f"run_dir={work / 'baselines'}")
    training = [
        "trainer.figures=true",
        "trainer.threads=1",
        "optimizer.lr=6e-3",
        "optimizer.warmup_steps=20",
        "data.batch_size=8",
        "task.select=residual_r",
    ]
    folders = {name: work / name.replace(", ", "-").replace(" ", "-") for name in options.only}
    for name in options.only:
        steps, own = TRAINED[name]
        if not (folders[name] / "summary.json").exists():
            command(
                "swift.train",
                *task,
                *MODEL,
                *training,
                *own,
                f"trainer.max_steps={steps}",
                f"trainer.val_every={steps // 4}",
                f"run_dir={folders[name]}",
            )
    every = [*((None, work / "baselines" / name) for name in baselines), *folders.items()]
    found = {}
    for name, folder in every:
        said = json.loads((folder / "summary.json").read_text())
        kept = {key: said[key] for key in ("contrasts", "n", "chance", "seed")}
        found[name or said["method"]] = kept
    (HERE / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "table.md").write_text(table(found))
    from swift.report.figures.maps import maps_figure

    maps_figure(folders[options.only[0]] / "figures" / "maps.npz", HERE / "maps.png")


def table(found: dict[str, dict]) -> str:
    """Methods by contrasts: residual r and identification with intervals, and p of shuffled subjects."""
    contrasts = list(next(iter(found.values()))["contrasts"])
    lines = []
    for contrast in contrasts:
        lines += [
            f"**{contrast}**",
            "",
            "| method | residual r | identification | r | p (residual r) |",
            "|---|---|---|---|---|",
        ]
        for name, said in found.items():
            one = said["contrasts"][contrast]
            cells = []
            for score in SHOWN:
                low, high = one["intervals"][score]
                cells.append(f"{one['scores'][score]:.2f} [{low:.2f}, {high:.2f}]")
            lines.append(f"| {name} | {' | '.join(cells)} | {one['p']['residual_r']:.4f} |")
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
    lines.append("")
    chance = next(iter(found.values()))["chance"]["identification"]
    return "\n".join([*lines, f"Chance of identification: {chance:.3f}."]) + "\n"


if __name__ == "__main__":
    main()

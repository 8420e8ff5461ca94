"""Attribution against a planted region, with the weights that were learned and with the same weights shuffled.

Makes a synthetic cohort in which one network follows a per-frame label, trains a small model to predict the label of
every frame, and compares attributions of test scans with the planted region. Writes result.json and overlap.png beside
this file, and the maps under --work. See README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from swift.analysis.attribution import overlap
from swift.analysis.style import BLUE, DPI, ORANGE, STYLE, VERMILION, WIDTH, save
from swift.data.splits import load_split
from swift.data.store import Store
from swift.data.synthetic import CohortSpec, write_store
from swift.data.synthetic.write import load_truth

HERE = Path(__file__).resolve().parent
SPEC = CohortSpec(
    n_subjects=24,
    frames=120,
    grid=(24, 24, 24),
    spacing=8.0,
    seed=5,
    sites=1,
    site_effect=0.0,
    frame_r=0.9,
    signal=3.0,
    noise_white=0.5,
    noise_smooth=0.3,
    drift=0.2,
    motion=0.2,
)
"""Little noise: the question is what attribution makes of a model that has learned, not how hard it is to learn."""
MODEL = (
    "model.embed_dim=24",
    "model.depths=[2,2]",
    "model.num_heads=[4,8]",
    "model.patch_size=[3,3,3,1]",
    "model.window=[4,4,4,4]",
)
DATA = ("data.grid=[24,24,24]", "data.spacing=8.0", "data.frames=8", "data.clip_stride=4", "data.batch_size=4")
MAPS = {"ig_size": "integrated gradients", "occlusion": "occlusion", "ig_size_random": "shuffled weights"}
CLIPS = 5


def command(*arguments: object) -> None:
    """One of swift's own commands; its failure is ours."""
    print("$ python -m", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True)


def train(store: Path, split: Path, run: Path, steps: int) -> None:
    """From scratch: what the model finds is in these scans."""
    settings = [f"data.path={store}", f"data.split={split}", f"run_dir={run}", f"trainer.max_steps={steps}"]
    settings += ["data=store", "data.workers=0", "task=synthetic_frame", "task.adapt=scratch", "optimizer.lr=2e-3"]
    settings += [f"trainer.val_every={steps // 4}", "trainer.figures=false", "trainer.accelerator=cpu"]
    command("swift.train", *MODEL, *DATA, *settings)


def judge(folder: Path, store: Store, names: list[str], truth: dict[str, Any]) -> dict[str, Any]:
    """Overlaps of every map of every scan with the planted region, and the sanity check."""
    region = truth["space"]["region_frame"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MAPS}
    ranks, gaps = [], []
    for name in names:
        said = json.loads((folder / f"{name}.json").read_text())
        mask = store.mask(store.find(name))
        ranks.append(said["rank_correlation_with_random_weights"])
        change = np.abs(np.subtract(said["output"], said["baseline"]))
        gaps.append(float((np.abs(said["completeness_gap"]) / change).max()))
        for kind in MAPS:
            values = np.asarray(nib.load(said["maps"][kind]).dataobj)
            found[kind].append(overlap(values, region & mask, mask))
    result: dict[str, Any] = {"scans": names, "rank_correlation": ranks, "largest_completeness_gap": max(gaps)}
    for kind, rows in found.items():
        result[kind] = {key: [row[key] for row in rows] for key in rows[0]}
    return result


def table(result: dict[str, Any]) -> str:
    """Mean and range over the scans, as Markdown."""
    lines = ["| map | AUROC of its size for the planted region | Dice of as many top voxels | at random |"]
    lines += ["|---|---|---|---|"]
    for kind, title in MAPS.items():
        cells = [title]
        for key in ("auroc", "dice"):
            values = result[kind][key]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append("| " + " | ".join([*cells, f"{np.mean(result[kind]['chance']):.2f}"]) + " |")
    ranks = result["rank_correlation"]
    lines.append(f"\nrank correlation of the sizes with those of shuffled weights: {np.mean(ranks):.2f}")
    lines.append(f"largest completeness gap: {100 * result['largest_completeness_gap']:.1f} % of the difference")
    return "\n".join(lines)


def draw(result: dict[str, Any], out: Path) -> None:
    """A dot a scan, a bar for the mean, chance as a line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), dpi=DPI, layout="constrained")
        for axis, (key, label) in zip(
            figure.subplots(1, 2), (("auroc", "AUROC"), ("dice", "Dice of as many top voxels")), strict=True
        ):
            for place, (kind, colour) in enumerate(zip(MAPS, (BLUE, ORANGE, VERMILION), strict=True)):
                values = result[kind][key]
                axis.bar(place, np.mean(values), 0.55, color=colour, alpha=0.35)
                spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0.0]
                axis.plot(place + np.asarray(spread), values, "o", ms=3, color=colour)
            chance = 0.5 if key == "auroc" else np.mean(result["ig_size"]["chance"])
            axis.axhline(chance, color="0.4", lw=0.8, ls="--")
            axis.text(2.48, chance, "chance", ha="right", va="bottom", fontsize=8, color="0.3")
            axis.set(ylabel=label, ylim=(0, 1.02), xticks=range(3), xticklabels=MAPS.values())
        save(figure, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the cohort, the run and the maps")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scans", type=int, default=4, help="test scans to explain")
    options = parser.parse_args()
    store, split, run, maps = (options.work / name for name in ("store", "split.json", "run", "maps"))
    if not store.exists():
        write_store(SPEC, store)
        command("swift.data", "split", store, "--out", split, "--val", 0.2, "--test", 0.2)
    if not (run / "summary.json").exists():
        train(store, split, run, options.steps)
    opened = Store(store)
    held_out = set(load_split(str(split)).parts["test"])
    names = [scan.scan_id for scan in opened.scans if scan.subject in held_out][: options.scans]
    for name in names:
        if not (maps / f"{name}.json").exists():
            given = ("--which", "best", "--clips", CLIPS, "--window", 3, "--batch", 8, "--randomise", "--quiet")
            command("swift.attribute", run, f"{store}:{name}", "--out", maps, *given)
    result = judge(maps, opened, names, load_truth(store))
    summary = json.loads((run / "summary.json").read_text())
    result["scores"] = summary.get("scores")
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, HERE / "overlap.png")
    print(table(result))
    print("scores of the model:", json.dumps(result["scores"]))


if __name__ == "__main__":
    main()

"""Attribution against a planted region, with the weights that were learned and with the same weights shuffled.

Makes a synthetic cohort in which one network carries a per-frame label and no other does, trains a small model to
predict the label of every frame, and compares attributions of test scans with the planted region. Writes result.json,
overlap.png and maps.png beside this file, and the maps under --work. See README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from swift.data.labels.splits import load_split
from swift.data.store.reader import Store
from swift.data.synthetic import CohortSpec, write_store
from swift.data.synthetic.write import load_truth
from swift.inference.attribution import overlap
from swift.report.style import BLUE, DPI, GREEN, ORANGE, STYLE, VERMILION, WIDTH, save

HERE = Path(__file__).resolve().parent
CORRELATED = CohortSpec(
    n_subjects=24,
    frames=120,
    grid=(16, 16, 16),
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
COHORTS = {
    "clean": CORRELATED.with_(
        networks=8,
        frame_r=1.0,
        coupling_gain=0.0,
        amplitude_gain=0.0,
        map_variability=0.0,
        noise_white=2.0,
        noise_smooth=1.0,
    ),
    "correlated": CORRELATED,
}
"""clean: the driven network's course is the label, so that nothing outside its map says anything of it (the networks'
own courses are correlated, but the label with none of them), and all subjects have it in one place. correlated: the
rest of its course (19 % of the variance) is correlated with other networks, from which a model may take it away, and a
subject's networks lie a little elsewhere."""
MODEL = (
    "model.embed_dim=32",
    "model.depths=[2]",
    "model.num_heads=[4]",
    "model.patch_size=[4,4,4,1]",
    "model.window=[4,4,4,4]",
    "model.position=absolute",
    "model.patch_norm=false",
)
DATA = ("data.grid=[16,16,16]", "data.spacing=8.0", "data.frames=4", "data.clip_stride=2", "data.batch_size=16")
MAPS = {
    "ig_share": ("integrated gradients", BLUE),
    "ig_share_random": ("the same, shuffled\nweights", VERMILION),
    "occlusion": ("occlusion", GREEN),
    "ig_size": ("sizes before\naveraging", ORANGE),
    "ig_size_random": ("the same, shuffled\nweights", VERMILION),
}
CLIPS, WINDOW = 30, 4


def command(*arguments: object) -> None:
    """One of swift's own commands; its failure is ours."""
    print("$ python -m", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True)


def train(store: Path, split: Path, run: Path, steps: int) -> None:
    """From scratch: what the model finds is in these scans."""
    settings = [f"data.path={store}", f"data.split={split}", f"run_dir={run}", f"trainer.max_steps={steps}"]
    settings += ["data=store", "data.workers=0", "task=synthetic_frame", "task.adapt=scratch", "optimizer.lr=5e-3"]
    settings += [f"trainer.val_every={steps // 4}", "trainer.figures=false", "trainer.accelerator=cpu"]
    command("swift.train", *MODEL, *DATA, *settings, "trainer.threads=1")


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
            values = np.asarray(nib.load(said["maps"][kind]).dataobj, dtype=np.float64)
            found[kind].append(overlap(values, region & mask, mask))
    result: dict[str, Any] = {"scans": names, "rank_correlation": ranks, "largest_completeness_gap": max(gaps)}
    result["region_voxels"] = int(region.sum())
    for kind, rows in found.items():
        result[kind] = {key: [row[key] for row in rows] for key in rows[0]}
    return result


def table(result: dict[str, Any]) -> str:
    """Mean and range over the scans, as Markdown."""
    chance = np.mean(result["ig_share"]["chance"])
    lines = ["| map | AUROC | Dice | in the region |", "|---|---|---|---|"]
    for kind, (title, _) in MAPS.items():
        cells = [title.replace("\n", " ")]
        for key in ("auroc", "dice", "inside"):
            values = result[kind][key]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| by chance | 0.50 | {chance:.2f} | {chance:.2f} |")
    ranks = result["rank_correlation"]
    lines.append(f"\nrank correlation of the shares' sizes with those of shuffled weights: {np.mean(ranks):.2f}")
    lines.append(f"largest completeness gap: {100 * result['largest_completeness_gap']:.1f} % of the difference")
    return "\n".join(lines)


def draw(result: dict[str, Any], out: Path) -> None:
    """A dot a scan, a bar for the mean, chance as a line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.1), dpi=DPI, layout="constrained")
        panels = (("auroc", "AUROC for the planted region"), ("dice", "Dice with the planted region"))
        for axis, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
            for place, (kind, (_, colour)) in enumerate(MAPS.items()):
                values = result[kind][key]
                axis.bar(place, np.mean(values), 0.55, color=colour, alpha=0.35)
                spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0.0]
                axis.plot(place + np.asarray(spread), values, "o", ms=3, color=colour)
            chance = 0.5 if key == "auroc" else np.mean(result["ig_share"]["chance"])
            axis.axhline(chance, color="0.3", lw=0.8, ls="--", label="chance")
            axis.set(ylabel=label, ylim=(0, 1.02), xticks=range(len(MAPS)))
            axis.set_xticklabels([title for title, _ in MAPS.values()], rotation=40, ha="right", rotation_mode="anchor")
            axis.legend(loc="upper right")
        count = len(result["scans"])
        figure.suptitle(f"bar: mean of {count} test scans; dot: one scan", fontsize=8.5, color="0.3")
        save(figure, out)


def draw_maps(folder: Path, name: str, mask: np.ndarray, space: dict[str, Any], out: Path) -> None:
    """Sizes of the shares of one scan, slice by slice, with the planted region's edge."""
    said = json.loads((folder / f"{name}.json").read_text())
    region = space["region_frame"]
    slices = sorted(np.argsort(-region.sum((0, 1)), kind="stable")[:6])
    rows = {"ig_share": "integrated gradients", "ig_share_random": "shuffled weights", "occlusion": "occlusion"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), dpi=DPI, layout="constrained")
        grid = figure.subplots(len(rows), len(slices))
        for axes, (kind, title) in zip(grid, rows.items(), strict=True):
            sizes = np.where(mask, 100 * np.abs(np.asarray(nib.load(said["maps"][kind]).dataobj)), np.nan)
            # the largest few would leave the rest black
            top = float(np.nanpercentile(sizes, 99))
            for axis, z in zip(axes, slices, strict=True):
                image = axis.imshow(sizes[:, :, z].T, origin="lower", cmap="magma", vmin=0, vmax=top)
                # edges of voxels, not lines between their centres
                fine = np.kron(region[:, :, z].T, np.ones((20, 20)))
                extent = (-0.5, region.shape[0] - 0.5, -0.5, region.shape[1] - 0.5)
                axis.contour(fine, [0.5], colors="#00E5FF", linewidths=0.9, extent=extent)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if kind == "ig_share":
                    axis.set_title(f"z = {space['affine'][2, 2] * z + space['affine'][2, 3]:.0f} mm", fontsize=8)
            axes[0].set_ylabel(title)
            bar = figure.colorbar(image, ax=list(axes), extend="max", pad=0.01)
            unit = "cube" if kind == "occlusion" else "voxel"
            bar.set_label(f"% of the\nchange, a {unit}", fontsize=7.5)
        figure.suptitle(f"{name}: sizes of the maps; line: planted region; left is left", fontsize=8.5, color="0.3")
        save(figure, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the cohort, the run and the maps")
    parser.add_argument(
        "--results", type=Path, default=HERE, help="result.json and figures (default: beside this file)"
    )
    parser.add_argument("--cohort", choices=list(COHORTS), default="clean", help="see README.md (default: clean)")
    parser.add_argument("--steps", type=int, default=200, help="of training (default: 200)")
    parser.add_argument("--scans", type=int, default=5, help="test scans to explain (default: 5, all)")
    options = parser.parse_args()
    begin, worked = time.perf_counter(), time.process_time()
    store, split, run, maps = (options.work / name for name in ("store", "split.json", "run", "maps"))
    if not store.exists():
        write_store(COHORTS[options.cohort], store)
        command("swift.data", "split", store, "--out", split, "--val", 0.2, "--test", 0.2)
    if not (run / "summary.json").exists():
        train(store, split, run, options.steps)
    opened = Store(store)
    held_out = set(load_split(str(split)).parts["test"])
    names = [scan.scan_id for scan in opened.scans if scan.subject in held_out][: options.scans]
    given = ("--which", "best", "--clips", CLIPS, "--window", WINDOW, "--batch", 16, "--randomise", "--quiet")
    for number, name in enumerate(names):
        if not (maps / f"{name}.json").exists():
            # every scan with weights shuffled otherwise: one shuffle may lie well or badly
            place = ("--out", maps, "--seed", number, "--device", "cpu")
            command("swift.attribute", run, f"{store}:{name}", *place, *given)
    truth = load_truth(store)
    result = {"cohort": asdict(truth["spec"]), "steps": options.steps, "clips": CLIPS}
    result |= judge(maps, opened, names, truth)
    result["scores"] = json.loads((run / "summary.json").read_text())["scores"]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.results / "overlap.png")
    draw_maps(maps, names[0], opened.mask(opened.find(names[0])), truth["space"], options.results / "maps.png")
    print(table(result))
    print("scores of the model:", json.dumps(result["scores"]))
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime + time.process_time() - worked
    print(f"{time.perf_counter() - begin:.0f} s, of which {spent:.0f} s of one core's time")


if __name__ == "__main__":
    main()

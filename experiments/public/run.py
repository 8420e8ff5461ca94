"""Does pre-training help on a public data set with labels? nilearn's fetch_development_fmri: 155 subjects, one film.

    python experiments/public/run.py --out runs/public                  # fetches 155 scans (OSF), then all
    python experiments/public/run.py --out runs/try --stand-in 24       # the same path without a network, on made scans

Ingests, splits by subject, pre-trains on the training subjects without any label, then trains for two labels: child or
adult, and age in years; from scratch, frozen with a linear head, and in full, with three seeds; with all baselines on
the same split. One table: OUT/table/table1.md. What is finished is not done again. See README.md.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SPACE = "MNI152NLin2009cAsym"
BOLD = "{}_task-pixar_space-" + SPACE + "_desc-preproc_bold.nii.gz"
TR = 2.0
"""As nilearn says of this data set; the stand-in has it too."""
COLUMNS = ("participant_id", "Age", "AgeGroup", "Child_Adult", "Gender", "Handedness")
TASKS = {
    "child_adult": ("task=sex", "task.name=child_adult", "task.target.column=Child_Adult",
                    "task.target.classes=[child,adult]"),
    "age": ("task=age", "task.target.column=Age"),
}  # fmt: skip
METHODS = {
    "scratch": ("task.adapt=scratch", "optimizer.lr=1e-3"),
    "linear": ("task.adapt=linear", "optimizer.lr=5e-3"),
    "full": ("task.adapt=full", "optimizer.lr=1e-3"),
}
PRETRAINED = ("linear", "full")


def fetch(out: Path) -> Path:
    """The folder of nilearn's copy of the data; it downloads what is not there."""
    from nilearn.datasets import fetch_development_fmri

    found = fetch_development_fmri(data_dir=str(out / "nilearn"), reduce_confounds=False)
    folder = Path(found.func[0]).parent
    rows = found.phenotypic[list(COLUMNS)]
    rows.to_csv(folder / "labels.tsv", sep="\t", index=False)
    return folder


def stand_in(folder: Path, subjects: int) -> Path:
    """Synthetic scans in a folder of the same shape: file names, space, TR and columns; the labels are planted."""
    import nibabel as nib

    from swift.data.synthetic import CohortSpec, make_subject

    if (folder / "labels.tsv").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    spec = CohortSpec(n_subjects=subjects, grid=(24, 28, 24), spacing=8.0, frames=60, tr=TR)
    with (folder / "labels.tsv.part").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(COLUMNS)
        for number in range(subjects):
            scan = make_subject(spec, number)
            who, name = scan.person, f"sub-pixar{number + 1:03d}"
            image = nib.Nifti1Image(scan.dense(), scan.affine)
            image.header.set_xyzt_units("mm", "sec")
            image.header.set_zooms((spec.spacing,) * 3 + (TR,))
            image.set_sform(scan.affine, 4)
            nib.save(image, folder / BOLD.format(name))
            adult = bool(who.label_binary)
            age = f"{who.label_continuous / 5:.2f}"
            writer.writerow([name, age, "Adult" if adult else "8-12yo", "adult" if adult else "child", who.sex, "R"])
    (folder / "labels.tsv.part").rename(folder / "labels.tsv")
    return folder


def call(*words: str | Path) -> None:
    """Run a command of swift's; its failure ends this."""
    print("$ python -m", *words, flush=True)
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def train(folder: Path, settings: Sequence[str]) -> None:
    """A training, unless it is finished."""
    if not (folder / "summary.json").exists():
        call("swift.train", *settings, f"run_dir={folder}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stand-in", type=int, metavar="N", help="N synthetic subjects in place of the download")
    parser.add_argument("--grid", type=int, default=48, help="voxels along an axis (48)")
    parser.add_argument("--spacing", type=float, default=4.0, help="mm (4, as the scans have it)")
    parser.add_argument("--steps", type=int, default=2000, help="of pre-training (2000)")
    parser.add_argument("--tune-steps", type=int, default=400, help="of each training for a label (400)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="settings of every run: model=7m trainer.threads=8 ...")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    source = fetch(out) if options.stand_in is None else stand_in(out / "stand-in", options.stand_in)
    store, split = out / "store", out / "split.json"
    if not (store / "store.json").exists():
        place = ("--grid", str(options.grid), "--spacing", str(options.spacing), "--space", SPACE, "--tr", str(TR))
        call("swift.data", "ingest", source, "--out", store, *place, "--participants", source / "labels.tsv")
    if not split.exists():
        # Dealt by this label, so that every part holds children and adults.
        call("swift.data", "split", store, "--label", "Child_Adult", "--out", split, "--val", "0.15", "--test", "0.25")
    common = ("data=store", f"data.path={store}", f"data.grid=[{options.grid},{options.grid},{options.grid}]",
              f"data.spacing={options.spacing}", f"data.split={split}", "model.maps=20", *options.set)  # fmt: skip
    pretrained = out / "pretrain"
    train(pretrained, [*common, "optimizer.lr=3e-3", f"trainer.max_steps={options.steps}"])
    for task, about in TASKS.items():
        baselines = out / "runs" / task / "baselines"
        if not (baselines / "done").exists():
            call("swift.baselines", *about, *common, f"run_dir={baselines}")
            (baselines / "done").touch()
        for method, how in METHODS.items():
            for seed in range(options.seeds):
                init = [f"init={pretrained}"] if method in PRETRAINED else []
                steps = [f"trainer.max_steps={options.tune_steps}", f"seed={seed}", "task.pooling=mean_std",
                         f"trainer.val_every={max(options.tune_steps // 6, 1)}", "task.courses=true"]  # fmt: skip
                train(out / "runs" / task / f"{method}-{seed}", [*about, *common, *how, *init, *steps])
    call("swift.report", "table1", out / "runs", "--out", out / "table")


if __name__ == "__main__":
    main()

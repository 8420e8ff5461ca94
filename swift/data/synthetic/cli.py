"""The command `python -m swift.data synthetic`."""

from __future__ import annotations

import argparse
import json
import time

from tqdm import tqdm

from swift.data.synthetic.spec import CohortSpec
from swift.data.synthetic.task_maps import write_task_maps
from swift.data.synthetic.write import write_bids, write_store

# Options that are a field of CohortSpec by the same name: help text.
FIELDS = {
    "runs": "runs of each subject",
    "frames": "frames of each run",
    "tr": "repetition time, s",
    "spacing": "voxel size, mm",
    "seed": "seed of the cohort",
    "task": "task name in file names",
    "sites": "number of sites",
    "networks": "number of networks",
    "binary_auroc": "AUROC of the planted latent for label_binary",
    "continuous_r": "Pearson r of the planted latent with label_continuous",
    "frame_r": "Pearson r over frames of the driven network with the convolved valence",
    "signal": "network signal, percent",
    "noise_white": "white noise, percent",
    "noise_smooth": "smooth noise, percent",
    "drift": "scanner drift, percent; 0: none",
    "motion": "size of movements; 0: none",
    "site_effect": "size of the differences between sites; 0: none",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser that has --json and --quiet."""
    default = CohortSpec()
    parser.description = (
        "Make a cohort of 4D BOLD scans with planted effects of chosen size, and save the truth beside."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--format",
        choices=("bids", "store"),
        default="store",
        help="NIfTI in BIDS layout, or a store",
    )
    parser.add_argument(
        "--subjects",
        type=int,
        default=default.n_subjects,
        metavar="N",
        help="number of subjects",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=3,
        default=default.grid,
        metavar=("X", "Y", "Z"),
        help="voxels",
    )
    parser.add_argument(
        "--site-tr",
        type=float,
        nargs="+",
        metavar="S",
        help="TR of each site, s (default: --tr)",
    )
    parser.add_argument(
        "--task-maps",
        action="store_true",
        help="also write maps of tasks that follow from couplings, from amplitudes and from nothing: DIR/task_maps",
    )
    for name, text in FIELDS.items():
        value = getattr(default, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help=f"{text} (default: {value})")


def run(args: argparse.Namespace) -> int:
    """Makes the cohort the options describe.

    Returns:
        0.

    Raises:
        UserError: an illegal value, or a folder that is not empty or cannot be written.

    """
    spec = CohortSpec(
        n_subjects=args.subjects,
        grid=tuple(args.grid),
        site_tr=None if args.site_tr is None else tuple(args.site_tr),
        **{name: getattr(args, name) for name in FIELDS},
    )
    write = write_bids if args.format == "bids" else write_store
    start = time.perf_counter()
    with tqdm(total=spec.n_subjects * spec.runs, unit="scan", disable=True if args.quiet else None) as bar:
        folder = write(spec, args.out, progress=lambda _: bar.update())
    if args.task_maps:
        write_task_maps(spec, folder / "task_maps")
    seconds = time.perf_counter() - start
    scans = spec.n_subjects * spec.runs
    if args.json:
        print(json.dumps({"folder": str(folder), "scans": scans, "seconds": round(seconds, 3)}))
    else:
        print(f"{scans} scans in {seconds:.1f} s: {folder} (truth in {folder}/truth)")
    return 0

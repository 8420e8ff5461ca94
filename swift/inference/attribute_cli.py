"""`python -m swift.attribute MODEL SCAN --out FOLDER`: which voxels the prediction of a fine-tuned model rests on.

Integrated gradients and occlusion, as NIfTI on the scan's own grid and affine, with a figure and the figures behind it.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.inference.options import add_model_options, fitting_of
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

if TYPE_CHECKING:
    import nibabel as nib
    import numpy as np
    import torch

    from swift.inference.attribution import Score
    from swift.inference.fit_scan import FittedScan
    from swift.inference.model import Trained

log = logging.getLogger("swift.attribute")


def run(options: argparse.Namespace) -> None:
    """Everything the command does."""
    _check(options)

    from swift.inference.attribution import choose_target, explains, score_of
    from swift.inference.embedding import choose_device
    from swift.inference.fit_scan import find_scans, fit, mean_image
    from swift.inference.model import load_trained

    trained = load_trained(options.model, options.which, options.config)
    place = choose_target(trained, options.target)
    fitting = fitting_of(options)
    fitting.check()
    device = choose_device(options.device)
    scans = find_scans([options.scan], trained.contract)
    if len(scans) != 1:
        raise UserError(f"{options.scan} holds {len(scans)} scans: name one (a NIfTI file, or STORE:SCAN_ID)")
    check_folder(options.out, scans[0].scan_id)
    scan = fit(scans[0], trained.contract, fitting)
    for note in scan.notes:
        log.info("%s: %s", scan.scan_id, note)
    said: dict[str, Any] = {"scan": scan.scan_id, "model": trained.source, "step": trained.step}
    said["explains"] = explains(trained, place)
    found = _maps(options, trained, score_of(trained, place), scan, device, said)
    _write(options.out, scan, found, mean_image(scans[0], scan), said)
    _say(options, said)


def _maps(
    options: argparse.Namespace,
    trained: Trained,
    score: Score,
    scan: FittedScan,
    device: torch.device,
    said: dict[str, Any],
) -> dict[str, np.ndarray]:
    """The maps by name; what else there is to tell goes into `said`."""
    from tqdm import tqdm

    from swift.inference.attribution import attribute, rank_correlation, shuffle_weights, some

    starts = some(scan.starts(), options.clips)
    trained.model.to(device).requires_grad_(False)
    kept: dict[str, Any] = {"limit": options.limit, "baseline": options.baseline, "batch": options.batch}
    rounds = 2 if options.randomise else 1
    with tqdm(total=len(starts) * rounds, unit="clip", desc="attribute", disable=options.quiet) as bar:
        maps = attribute(score, scan, starts, device, window=options.window or None, progress=bar.update, **kept)
        found = {"ig": maps.gradients, "ig_size": maps.size, "ig_share": maps.share}
        if maps.occlusion is not None:
            found["occlusion"] = maps.occlusion
        said |= {
            "clips": starts,
            "output": maps.outputs.tolist(),
            "baseline": maps.baselines.tolist(),
            "completeness_gap": maps.gaps.tolist(),
        }
        if options.randomise:
            shuffle_weights(trained.model, options.seed)
            lost = attribute(score, scan, starts, device, progress=bar.update, **kept)
            found |= {"ig_size_random": lost.size, "ig_share_random": lost.share}
            said["rank_correlation_with_random_weights"] = rank_correlation(maps.share, lost.share, scan.mask)
    return found


def _write(
    folder: Path, scan: FittedScan, found: dict[str, np.ndarray], mean: nib.Nifti1Image, said: dict[str, Any]
) -> None:
    import nibabel as nib

    from swift.inference.attribution import on_own_grid
    from swift.parallel.checkpoint.write import write_text
    from swift.report.figures.attribution import draw

    images = {name: on_own_grid(values, scan) for name, values in found.items()}
    said |= _where(scan, images["ig"])
    said["notes"] = [*scan.notes, *_other_places(folder, said)]
    for note in said["notes"][len(scan.notes) :]:
        log.warning("--out %s: %s", folder, note)
    said["maps"] = {}
    try:
        for name, image in images.items():
            path = folder / f"{scan.scan_id}_{name}.nii.gz"
            nib.save(image, path)
            said["maps"][name] = str(path)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror or error})") from error
    said["figure"] = str(folder / f"{scan.scan_id}.png")
    draw(images, mean, f"{scan.scan_id}  {said['explains']}", Path(said["figure"]))
    write_text(folder / f"{scan.scan_id}.json", json.dumps(said, indent=2) + "\n")


def _where(scan: FittedScan, image: nib.Nifti1Image) -> dict[str, Any]:
    """Where the maps of a scan lie, for those who put them beside others."""
    return {
        "subject": scan.subject,
        "space": scan.space,
        "placement": scan.placement,
        "shape": list(image.shape),
        "affine": image.affine.tolist(),
    }


def places_differ(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Why a voxel of two scans' maps is not the same place; "" where it is. Takes what their JSON files say."""
    import numpy as np

    from swift.data.store.spaces import OWN

    if any(name not in said for said in (one, other) for name in ("subject", "space", "placement", "affine")):
        return "where the maps lie is not recorded"
    own_spaces = OWN in (one["placement"], other["placement"])
    if one["placement"] != other["placement"] or (own_spaces and one["space"] != other["space"]):
        return " and ".join(f"space {said['space'] or 'not known'} ({said['placement']})" for said in (one, other))
    if own_spaces and one["subject"] != other["subject"]:
        return f"each subject's own space ({one['space'] or 'its name is not known'})"
    if one["shape"] != other["shape"] or not np.allclose(one["affine"], other["affine"], atol=1e-3):
        return "other voxel grids"
    return ""


def _other_places(folder: Path, said: dict[str, Any]) -> list[str]:
    """A sentence for each way in which maps that are in the folder already lie elsewhere than these."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(other, dict) and "maps" in other and (why := places_differ(said, other)):
            found.setdefault(why, []).append(str(other.get("scan", path.stem)))
    return [
        f"holds maps of {len(names)} scans ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) that do not lie "
        f"where these do, voxel by voxel: {why}; do not average them"
        for why, names in found.items()
    ]


def check_folder(folder: Path, scan_id: str) -> None:
    """Make the folder. Raises UserError where it cannot be, or holds attributions of this scan."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made a folder ({error.strerror})") from error
    if (folder / f"{scan_id}.json").exists():
        raise UserError(f"--out {folder}: holds {scan_id}.json already")


def _check(options: argparse.Namespace) -> None:
    for name, least in (("clips", 0), ("window", 0), ("batch", 1), ("limit", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")


def _say(options: argparse.Namespace, said: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(said, indent=2))
        return
    change = [out - still for out, still in zip(said["output"], said["baseline"])]
    mean = [sum(values) / len(values) for values in (said["output"], said["baseline"])]
    print(f"{said['explains']}: {mean[0]:.4g} (baseline {mean[1]:.4g}), mean of {len(change)} clips")
    worst = max(abs(gap) for gap in said["completeness_gap"])
    print(f"integrated gradients sum to the differences but for {worst:.2g} at most")
    if "rank_correlation_with_random_weights" in said:
        print(f"rank correlation with random weights: {said['rank_correlation_with_random_weights']:.2f}")
    for path in [*said["maps"].values(), said["figure"]]:
        print(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m swift.attribute", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="fine-tuned: run directory, checkpoint or exported .safetensors"
    )
    parser.add_argument("scan", metavar="SCAN", help="NIfTI file, or STORE:SCAN_ID")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--target", metavar="CLASS", help="class to explain (default, of two: the positive one)")
    parser.add_argument(
        "--clips", type=int, default=4, metavar="N", help="clips to explain, spread over the scan (default: 4; 0: all)"
    )
    parser.add_argument(
        "--window", type=int, default=8, metavar="VOXELS", help="edge of occlusion's cubes (default: 8; 0: none)"
    )
    parser.add_argument(
        "--baseline",
        choices=("zero", "mean"),
        default="zero",
        help="zero: 0 after normalization (default) | mean: each voxel's mean over the clip",
    )
    parser.add_argument("--limit", type=int, default=600, metavar="N", help="gradients a clip at most (default: 600)")
    parser.add_argument(
        "--randomise", action="store_true", help="sanity check: the map of the same model with shuffled weights too"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --randomise")
    add_model_options(parser)
    parser.add_argument(
        "--batch", type=int, default=4, metavar="N", help="clips through the model at once (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parser().parse_args(arguments)
    set_up_logging()
    reported(lambda: run(options))


if __name__ == "__main__":
    main()

"""How well could anything predict the hidden voxels of the synthetic cohort? Its truth is known, so this has an answer.

    python -m experiments.learning.bounds --work DIR        # the folder of the study's work; adds to DIR/points.jsonl

Three Gaussian predictions of the study's held-out clips, under its masks. Each is given the visible voxels of a frame
and of the two beside it, and the true covariance of the noise:

- noise alone: every network, drift and movement is known exactly, so that only noise is left to predict. No model can
  be better, but for what frames further away say of the noise (its autocorrelation is 0.3 a frame).
- own maps known: the covariance of the subject's scan without noise is known (its maps, their variances and
  autocorrelation), the courses are not.
- training subjects: the mean of these covariances over the training subjects. The best that one linear prediction for
  all can do from three frames.

Legend: V brain voxels, v visible voxels, T frames.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

from experiments.learning.points import Point
from experiments.learning.train_point import COHORT_SPEC, clip_rows, l1_of, make, prepare_cohort, settings
from swift.data.synthetic import make_subject
from swift.data.synthetic.labels import person
from swift.data.synthetic.maps import subject_anatomy
from swift.data.synthetic.scan import noise_autocorrelation, site_of, smooth_bases
from swift.data.synthetic.spec import BASELINE
from swift.models.masking import mask_voxels
from swift.utils import jsonl
from swift.utils.files import replace_text

NAMES = ("noise alone", "own maps known", "training subjects' covariance")
LAGS = (-1, 0, 1)
STARTS = (0, 40, 80)
"""First frames of the clips that are predicted, of five in each scan: early, in the middle and late."""
EVERY = 2
"""Of so many training subjects one is used, to save time."""


class Truth:
    """What is behind the z-scored voxels of one subject.

    Attributes:
        known: (T, V) what is not noise.
        covariance: (2, 3, V, V) of what is not noise over the scan, and of the noise, at lags of 0, 1 and 2 frames.
    """

    def __init__(self, subject: int) -> None:
        spec = COHORT_SPEC
        scan = make_subject(spec, subject)
        still = make_subject(spec.with_(noise_white=0.0, noise_smooth=0.0), subject)
        scale = scan.bold.std(0)
        self.mask = scan.mask
        self.known = ((still.bold - still.bold.mean(0)) / scale).astype(np.float32)
        signal = np.stack([_lagged(self.known, lag) for lag in range(3)])
        site = site_of(spec, scan.person.site_index)
        base = subject_anatomy(spec, subject)[1][scan.mask]
        unit = 0.01 * site.noise * base * site.gain * site.bias[scan.mask] / scale
        inside = np.nonzero(scan.mask)
        low, high = [i.min() for i in inside], [i.max() + 1 for i in inside]
        smooth = np.ones((len(base), len(base)), np.float32)
        for axis, basis in enumerate(smooth_bases(spec, low, high)):
            place = inside[axis] - low[axis]
            smooth *= (basis @ basis.T)[place[:, None], place]
        smooth *= np.outer(unit, unit) * spec.noise_smooth**2
        white = np.diag((unit * spec.noise_white * BASELINE / base) ** 2)
        phi = noise_autocorrelation(scan.tr)
        self.covariance = np.stack([signal, np.stack([smooth + white, phi * smooth, phi**2 * smooth])]).astype(
            np.float32
        )


def _lagged(values: np.ndarray, lag: int) -> np.ndarray:
    """(V, V) symmetric covariance of (T, V) values with themselves so many frames later.

    Divided by T at every lag: only so the covariance of a few frames together has no negative eigenvalue.
    """
    found = values[: len(values) - lag].T @ values[lag:] / len(values)
    return (found + found.T) / 2


def mean_covariance(truths: Iterable[Truth], index: np.ndarray, cells: int) -> np.ndarray:
    """(3, n, n) float32 mean covariance of subjects over the voxels at the flat places `index` of a grid of `cells`.

    Each voxel is scaled for those that do not have it; one that nobody has is like no other one.
    """
    at = np.full(cells, -1)
    at[index] = np.arange(len(index))
    total, count = np.zeros((3, len(index), len(index)), np.float32), np.zeros(len(index), np.float32)
    for truth in truths:
        place = at[np.flatnonzero(truth.mask)]
        mine = np.flatnonzero(place >= 0)
        place = place[mine]
        count[place] += 1
        total[:, place[:, None], place] += truth.covariance.sum(0)[:, mine[:, None], mine]
    nobody = np.flatnonzero(count == 0)
    total[0, nobody, nobody] = 1.0
    scale = 1 / np.sqrt(np.maximum(count, 1))
    total *= scale[:, None] * scale
    return total


def conditional_mean(values: np.ndarray, hidden: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Expected value of hidden voxels given the visible ones of the same frame and of the two beside it.

    Args:
        values: (T, V), anything where hidden.
        hidden: (T, V) bool.
        covariance: (3, V, V) at lags of 0, 1 and 2 frames.

    Returns:
        (T, V), 0 where visible.
    """
    out = np.zeros_like(values)
    for frame in range(len(values)):
        used = [frame + lag for lag in LAGS if 0 <= frame + lag < len(values)]
        seen = [np.flatnonzero(~hidden[t]) for t in used]
        inner = np.block(
            [[covariance[abs(a - b)][np.ix_(p, q)] for b, q in zip(used, seen)] for a, p in zip(used, seen)]
        )
        wanted = np.flatnonzero(hidden[frame])
        outer = np.concatenate([covariance[abs(frame - t)][np.ix_(wanted, p)] for t, p in zip(used, seen)], 1)
        known = np.concatenate([values[t, p] for t, p in zip(used, seen)])
        out[frame, wanted] = outer @ scipy.linalg.solve(inner, known, assume_a="pos")
    return out


def bounds(work: Path) -> list[dict[str, Any]]:
    """A result for each of NAMES, on the study's held-out clips under its first mask."""
    module, data = make(settings(Point("bounds", "cohort", ()), prepare_cohort(work), judged=True))
    number = {f"sub-{person(COHORT_SPEC, i).subject}": i for i in range(COHORT_SPEC.n_subjects)}
    held = {int(scan) for scan in data.val_index.scan}
    truths = {place: Truth(number[data.store.scans[place].subject]) for place in held}
    index = np.flatnonzero(np.any([truth.mask for truth in truths.values()], axis=0))
    others = [one.subject for place, one in enumerate(data.store.scans) if place not in held][::EVERY]
    group = mean_covariance((Truth(number[one]) for one in others), index, int(np.prod(COHORT_SPEC.grid)))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for packed in data.val_dataloader():
        batch = data.dense(packed)
        hidden = mask_voxels(module.draw_mask(batch), module.cfg.model.patch_size, batch["bold"].shape[2:])
        found = {name: torch.zeros_like(batch["bold"]) for name in NAMES}
        for clip in batch["valid"].nonzero()[:, 0].tolist():
            brain, truth = batch["brain"][clip], truths[int(batch["scan"][clip])]
            values = batch["bold"][clip, 0][brain].T.numpy()
            cover = hidden[clip][brain].T.numpy()
            start = int(batch["start"][clip])
            if start not in STARTS:
                continue
            known = truth.known[start : start + len(values)]
            place = np.searchsorted(index, np.flatnonzero(truth.mask))
            made = (
                known + conditional_mean(values - known, cover, truth.covariance[1]),
                conditional_mean(values, cover, truth.covariance.sum(0)),
                conditional_mean(values, cover, group[:, place[:, None], place]),
            )
            for name, one in zip(NAMES, made):
                found[name][clip, 0][brain] = torch.from_numpy(one.T).float()
        for name in NAMES:
            made_rows = clip_rows(data, batch, hidden, found[name], 0, None)
            rows[name] += [row for row in made_rows if row["start"] in STARTS]
    return [
        {"point": f"cohort: bound, {name}", "suite": "cohort", "l1": l1_of(rows[name]), "rows": rows[name]}
        for name in NAMES
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that holds the cohort")
    parser.add_argument("--out", type=Path, required=True, help="points.jsonl to add to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = bounds(options.work)
    kept = (
        [line for line in jsonl.read(options.out) if not line["point"].startswith("cohort: bound")]
        if options.out.exists()
        else []
    )
    replace_text(options.out, "".join(json.dumps(line) + "\n" for line in [*kept, *found]))
    for line in found:
        print(f"{line['point']}: {line['l1']:.4f}")


if __name__ == "__main__":
    main()

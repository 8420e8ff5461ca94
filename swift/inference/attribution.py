"""Which voxels a model's output rests on: integrated gradients (Sundararajan et al. 2017) and occlusion, by captum.

Both compare a clip with a baseline, in which nothing happens. Integrated gradients share the difference of the outputs
among all voxels and frames (they sum to it: completeness); occlusion puts one cube of voxels at the baseline, in all
frames, and gives its voxels what the output loses.

Of one clip an attribution is mostly noise: input times gradient, as large in voxels that the model hardly uses as in
those it rests on. Over clips the noise cancels, if it may keep its sign: so clips are summed before sizes are taken,
each weighed by how far its output is from the baseline's (`Share`), for what pushes a prediction up in one clip
pushes it down in another.

Legend: X Y Z grid, T frames of a clip, V brain voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from swift.config.check_target import class_names
from swift.data.ingest.nifti import Volumes, as_stored
from swift.inference.fit_scan import FittedScan
from swift.inference.model import Trained
from swift.utils.errors import UserError

Score = Callable[[Tensor, Tensor], Tensor]
"""bold (B, 1, X, Y, Z, T), brain (B, X, Y, Z) -> (B,): the number to explain."""
BASELINES = ("zero", "mean")
POINTS = 6
"""Of the Gauss-Legendre rule on one piece of the way from the baseline to the clip."""
TOLERANCE = 0.01
"""Largest error of a whole integral, as a part of the difference of the outputs."""


def choose_target(trained: Trained, wanted: str | None) -> int | None:
    """The place of the class to explain; None: the model predicts a number.

    Args:
        trained: A fine-tuned model.
        wanted: Name of a class; None: the positive one of two.

    Raises:
        UserError: a pre-trained model, one of brain maps, one that needs maps of the scan, or no such class.
    """
    target = trained.config.task.target
    if target is None:
        raise UserError(
            f"{trained.source} was pre-trained and predicts nothing: attribution needs a fine-tuned model "
            "(python -m swift.train task=... init=RUN)"
        )
    if trained.config.task.courses and trained.config.model.maps_of == "scan":
        raise UserError(
            f"{trained.source} reads courses of maps that belong to each scan of its training (model.maps_of=scan): "
            "attribution takes models of model.maps_of=shared, or of task.courses=false"
        )
    if target.kind == "map":
        raise UserError(
            f"{trained.source} predicts maps (task={trained.config.task.name}): attribution takes a class or a number"
        )
    if target.kind == "regression":
        if wanted is not None:
            raise UserError(f"--target {wanted}: this model predicts a number (task={trained.config.task.name})")
        return None
    names = class_names(target)
    if wanted is None:
        if len(names) != 2:
            raise UserError(f"--target is missing: this model has the classes {', '.join(names)}")
        return 1
    if wanted not in names:
        raise UserError(f"--target {wanted}: this model has the classes {', '.join(names)}")
    return names.index(wanted)


def score_of(trained: Trained, place: int | None) -> Score:
    """The number to explain, from clips: log odds of a class, or a value in the label's own unit.

    Of a model that predicts every frame it is the prediction for the middle frame of the clip.
    """
    model, scale = trained.model, trained.target

    def score(bold: Tensor, brain: Tensor) -> Tensor:
        out: Tensor = model(bold, brain)
        if out.ndim == 3:
            out = out[:, out.shape[1] // 2]
        if place is None:
            return out[:, 0] * scale["std"] + scale["mean"]
        others = torch.cat([out[:, :place], out[:, place + 1 :]], 1)
        return out[:, place] - others.logsumexp(1)

    return score


def explains(trained: Trained, place: int | None) -> str:
    """What the number is, in words."""
    task = trained.config.task
    assert task.target is not None
    when = ", in the middle frame of each clip" if task.target.per == "frame" else ""
    if place is None:
        return f"{task.name}: the predicted {task.target.column}, in its own unit{when}"
    return f"{task.name}: log odds of {task.target.classes[place].split('|')[0]}{when}"


def some(starts: list[int], count: int) -> list[int]:
    """At most `count` of the clips, evenly spaced over the scan; 0: all."""
    if not count or count >= len(starts):
        return starts
    return [starts[place * len(starts) // count] for place in range(count)]


@dataclass(frozen=True)
class Maps:
    """Attributions of a scan, from some of its clips.

    Attributes:
        gradients: (X, Y, Z) integrated gradients, summed over the frames, mean of the clips; in units of the output.
        size: (X, Y, Z) their sizes in each clip (without signs), summed over the frames, mean of the clips. Noise of a
            clip does not cancel: follows the input more than the model.
        share: (X, Y, Z) `Share` of the integrated gradients, summed over the frames; sums to 1.
        occlusion: (X, Y, Z) `Share` of the loss of output with a voxel's cube at the baseline; None: not asked for.
        outputs, baselines: (clips,) output of each clip and of its baseline.
        gaps: (clips,) sum of a clip's integrated gradients minus the difference of its outputs: the error of the
            integral.
    """

    gradients: np.ndarray
    size: np.ndarray
    share: np.ndarray
    occlusion: np.ndarray | None
    outputs: np.ndarray
    baselines: np.ndarray
    gaps: np.ndarray


def baseline_of(bold: Tensor, brain: Tensor, kind: str) -> Tensor:
    """What a clip is compared with: a brain in which nothing changes; the background stays as it is.

    Args:
        bold: (B, 1, X, Y, Z, T).
        brain: bool (B, X, Y, Z).
        kind: zero: 0 after normalization (of z-scores: each voxel's mean) | mean: each voxel's mean over the clip.
    """
    inside = brain[:, None, ..., None]
    still = bold.mean(-1, keepdim=True) if kind == "mean" else torch.zeros_like(bold[..., :1])
    return torch.where(inside, still, bold)


def integrated_gradients(
    score: Score, bold: Tensor, brain: Tensor, baseline: Tensor, limit: int, batch: int
) -> tuple[Tensor, float]:
    """Integrated gradients of one clip.

    LayerNorm makes an output change most very near to the baseline, where the scale of the tokens passes the norm's
    epsilon: a rule for the whole way misses that. So the way is cut: a piece whose shares do not sum to what the output
    changes on it is halved (towards the baseline by a factor), until the axiom of completeness holds to TOLERANCE.

    Args:
        score: What is explained.
        bold, baseline: (1, 1, X, Y, Z, T).
        brain: bool (1, X, Y, Z).
        limit: After so many gradients no piece is cut any more.
        batch: Points at once.

    Returns:
        (1, 1, X, Y, Z, T), and their sum minus the difference of the outputs.
    """
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(score)
    known: dict[float, float] = {}

    def value(part: float) -> float:
        # pieces share their ends: each is put through the model once
        if part not in known:
            with torch.no_grad():
                known[part] = float(score(torch.lerp(baseline, bold, part), brain))
        return known[part]

    whole = abs(value(1.0) - value(0.0))
    shares, gap, spent = torch.zeros_like(bold), 0.0, 0
    pieces = [(0.0, 1e-3), (1e-3, 0.1), (0.1, 1.0)]
    while pieces:
        low, high = pieces.pop()
        ends = [torch.lerp(baseline, bold, part) for part in (high, low)]
        some = method.attribute(ends[0], ends[1], None, brain, POINTS, internal_batch_size=batch)
        off = float(some.sum(dtype=torch.float64)) - (value(high) - value(low))
        spent += POINTS
        if abs(off) > TOLERANCE / 8 * whole and spent < limit and high > 1e-9:
            middle = math.sqrt(low * high) if low else high / 16
            pieces += [(low, middle), (middle, high)]
            continue
        shares += some.detach()
        gap += off
    return shares, gap


def occlusion(score: Score, bold: Tensor, brain: Tensor, baseline: Tensor, window: int, batch: int) -> Tensor:
    """What one clip's output loses when a cube of voxels stands still.

    Args:
        score: What is explained.
        bold, baseline: (1, 1, X, Y, Z, T).
        brain: bool (1, X, Y, Z).
        window: Edge of the cubes, voxels; they begin at voxel 0 and do not overlap.
        batch: Cubes at once.

    Returns:
        (X, Y, Z), 0 outside the brain.
    """
    from captum.attr import FeatureAblation

    cubes = _cubes(brain[0], window)[None, None, ..., None].expand_as(bold)
    with torch.no_grad():
        lost = FeatureAblation(score).attribute(bold, baseline, None, brain, cubes, perturbations_per_eval=batch)
    return torch.where(brain[0], lost[0, 0, ..., 0], 0.0)


def _cubes(brain: Tensor, window: int) -> Tensor:
    """(X, Y, Z) int64: the number of each voxel's cube, 0 for all cubes without brain, which need not be tried."""
    axes = [torch.arange(n, device=brain.device) // window for n in brain.shape]
    counts = [int(axis[-1]) + 1 for axis in axes]
    number = (axes[0][:, None, None] * counts[1] + axes[1][:, None]) * counts[2] + axes[2]
    used = torch.unique(number[brain])
    return torch.where(torch.isin(number, used), torch.searchsorted(used, number) + 1, 0)


class Share:
    """The part of a model's answers that each voxel accounts for, over clips.

    The slope of a voxel's attributions on the change of the output (least squares through 0): sum(a c) / sum(c^2).
    A voxel that always gives a tenth of the change gets 0.1, whatever the signs of the changes; one whose attributions
    have nothing to do with them gets 0 on average. If the attributions of every clip sum to its change, the shares sum
    to 1.

    Args:
        shape: X, Y, Z.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._product, self._power = np.zeros(tuple(shape)), 0.0

    def add(self, values: np.ndarray, change: float) -> None:
        """A clip: its (X, Y, Z) attributions, and its output minus that of the baseline."""
        self._product += change * values
        self._power += change**2

    def value(self) -> np.ndarray:
        """(X, Y, Z); 0 if no output differs from its baseline's."""
        return self._product / (self._power or 1.0)


def attribute(
    score: Score,
    scan: FittedScan,
    starts: list[int],
    device: torch.device,
    *,
    limit: int = 600,
    window: int | None = None,
    baseline: str = "zero",
    batch: int = 4,
    progress: Callable[[], object] = lambda: None,
) -> Maps:
    """Both attributions, of all clips together.

    Args:
        score: What is explained.
        scan: Of `swift.inference.fit_scan.fit`.
        starts: First frames of the clips to use.
        device: Where the model is.
        limit: Gradients a clip, see `integrated_gradients`.
        window: Of occlusion, voxels; None: no occlusion.
        baseline: zero | mean, see `baseline_of`.
        batch: Clips through the model at once.
        progress: Called after each clip.
    """
    shape = scan.mask.shape
    mean, size, share, lost = np.zeros(shape), np.zeros(shape), Share(shape), Share(shape)
    outputs, stills, gaps = [], [], []
    for start in starts:
        clip = scan.clips([start], device)
        bold, brain = clip["bold"].contiguous(), clip["brain"]
        still = baseline_of(bold, brain, baseline)
        found, gap = integrated_gradients(score, bold, brain, still, limit, batch)
        with torch.no_grad():
            outputs.append(float(score(bold, brain)))
            stills.append(float(score(still, brain)))
        change = outputs[-1] - stills[-1]
        signed = found[0, 0].sum(-1).double().cpu().numpy()
        mean += signed
        share.add(signed, change)
        size += found[0, 0].abs().sum(-1).double().cpu().numpy()
        if window is not None:
            lost.add(occlusion(score, bold, brain, still, window, batch).double().cpu().numpy(), change)
        gaps.append(gap)
        progress()
    return Maps(
        mean / len(starts),
        size / len(starts),
        share.value(),
        lost.value() if window is not None else None,
        np.asarray(outputs),
        np.asarray(stills),
        np.asarray(gaps),
    )


def shuffle_weights(model: nn.Module, seed: int) -> None:
    """Take from a model what it learned: the elements of every parameter change places, so its distribution stays.

    The sanity check of Adebayo et al. (2018): a map that looks the same afterwards does not explain the model.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        with torch.no_grad():
            parameter.copy_(parameter.reshape(-1)[order].view_as(parameter))


def rank_correlation(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Spearman's correlation of the sizes (without signs) of two maps (X, Y, Z) inside a mask; 0 if one is constant."""
    from scipy.stats import spearmanr

    left, right = np.abs(a[mask]), np.abs(b[mask])
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(spearmanr(left, right).statistic)


def overlap(values: np.ndarray, region: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How well a map points at a known region.

    Args:
        values: (X, Y, Z).
        region, mask: bool (X, Y, Z); voxels outside the mask do not count.

    Returns:
        auroc: chance that a voxel of the region has a larger value (without its sign) than one outside. dice: of the
        region with as many of the largest voxels. chance: the Dice of as many voxels chosen at random, which is the
        region's part of the mask. inside: sum of the values in the region, as a part of that in the mask; 0 where the
        values sum to 0. It means little where large values of both signs cancel.
    """
    from sklearn.metrics import roc_auc_score

    sizes, wanted = np.abs(values[mask]), region[mask]
    count = int(wanted.sum())
    top = np.argsort(-sizes, kind="stable")[:count]
    total = float(values[mask].sum())
    return {
        "auroc": float(roc_auc_score(wanted, sizes)),
        "dice": float(wanted[top].mean()),
        "chance": count / wanted.size,
        "inside": float(values[region & mask].sum()) / total if total else 0.0,
    }


def on_own_grid(values: np.ndarray, scan: FittedScan) -> nib.Nifti1Image:
    """A map on the grid, voxel order and affine of the scan's own file; of a store's scan, on the store's grid.

    Args:
        values: (X, Y, Z) on the model's grid. It is interpolated (trilinear), so its sum is not kept where the voxels
            of the file have another size. 0 outside the model's grid.
        scan: Whose map it is.
    """
    from nibabel.processing import resample_from_to

    image = nib.Nifti1Image(values.astype(np.float32), scan.affine)
    origin = scan.origin
    if origin is None:
        return image
    image = resample_from_to(image, (origin.shape, origin.affine), order=1, mode="constant", cval=0.0)
    if not isinstance(origin, Volumes):
        return image
    stored, affine = as_stored(np.asarray(image.dataobj, dtype=np.float32), origin.affine, origin.ornt)
    return nib.Nifti1Image(stored, affine)

"""Predictions without a deep model: what any model must beat. Everything is fitted on training subjects only.

Shapes: T frames, P parcels, N units, F features, K classes. The regularisation is chosen by cross-validation inside the
training units, subjects kept together.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swift.utils.errors import UserError

log = logging.getLogger("swift.baselines")

MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
DISPLACEMENT = "framewise_displacement"
PARCELS = 40
"""Parcels at most; the networks that resting-state studies use are fewer."""
PARCEL_FRAMES = 2000
"""Frames of training scans that parcels are made from."""
COMMON = 0.9
"""A voxel is in the common mask if so large a part of the training scans has it."""
HIGH_PASS = 0.008
"""Hz: slower changes are the scanner's drift (128 s, as fMRIPrep)."""
PENALTIES = tuple(10.0**k for k in range(-5, 2))
"""C of logistic regression; ridge takes 1/C. Features are standardized."""
FOLDS = 5
COMPONENTS = 200
"""Principal components of volumes at most."""
CELLS = 150_000_000
"""Values of volumes held at once; beyond, every n-th voxel is taken."""
HIGH_MOTION = 0.5
"""mm of framewise displacement."""
KEPT_SKEWNESS = 0.9
"""Part of the squares of the co-skewness tensor that its subspace keeps."""


@dataclass(frozen=True)
class Units:
    """What is predicted for one part of a split.

    Attributes:
        scan: (N,) place of a scan in the store; a subject with several scans has a row for each.
        subject: (N,) names.
        frame: (N,) place in the scan; -1: a part of the scan as a whole.
        first: (N,) first frame of that part.
        length: (N,) frames of that part.
        target: (N,) class number or value.
    """

    scan: np.ndarray
    subject: np.ndarray
    frame: np.ndarray
    first: np.ndarray
    length: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.target)


# ----------------------------------------------------------------------------------------------------------- features
def movement(store: Any, scan: int) -> np.ndarray:
    """(T, 7) movement and framewise displacement; 0 where the store has none. Never other columns: a label may hide."""
    columns = store.confounds(scan)
    table = np.zeros((store.scans[scan].frames, len(MOTION) + 1), np.float64)
    for place, name in enumerate((*MOTION, DISPLACEMENT)):
        if name in columns:
            table[:, place] = np.nan_to_num(columns[name])
    return table


def nuisance_features(store: Any, units: Units, sites: Sequence[str]) -> np.ndarray:
    """(N, F): how much the head moved, TR, length and site; per frame: the movement then and in the 2 frames before."""
    rows = []
    known = {scan: movement(store, scan) for scan in set(units.scan.tolist())}
    for row, scan in enumerate(units.scan.tolist()):
        info, moved = store.scans[scan], known[scan]
        site = [float(info.site == name) for name in sites]
        if units.frame[row] >= 0:
            at = np.maximum(units.frame[row] - np.arange(3), 0)
            rows.append([*moved[at].ravel(), units.frame[row] / info.frames, *site])
            continue
        part = moved[units.first[row] : units.first[row] + units.length[row]]
        change, fd = np.abs(np.diff(part[:, :6], axis=0)), part[:, 6]
        size = [*change.mean(0), *part[:, :6].std(0), fd.mean(), fd.max(), (fd > HIGH_MOTION).mean()]
        rows.append([*size, info.tr, float(units.length[row]), *site])
    return np.array(rows, np.float64)


def courses(store: Any, scan: int, kind: str) -> np.ndarray:
    """(T, X*Y*Z) float32 normalized values; NaN outside the scan's brain."""
    info = store.scans[scan]
    a, b = store.normalizer(scan, kind)
    out = np.full((info.frames, int(np.prod(store.grid))), np.nan, np.float32)
    out[:, store.indices(scan)] = store.read(scan, 0, info.frames) * a + b
    return out


def common_mask(store: Any, scans: Sequence[int]) -> np.ndarray:
    """(X*Y*Z,) bool: voxels in the brain of nearly all (`COMMON`) of these scans."""
    count = np.zeros(int(np.prod(store.grid)), np.int64)
    for scan in scans:
        count[store.indices(scan)] += 1
    mask = count >= COMMON * len(scans)
    if not mask.any():
        raise UserError("the training scans have no brain voxel in common: they are not in one space")
    return np.asarray(mask)


class Parcels:
    """Connected regions of alike time courses, made from training scans: no atlas has to be there.

    Ward clustering of the voxels of the common mask, with neighbours only, on principal components of their courses.

    Args:
        store: Scans.
        scans: Places of the training scans.
        count: Parcels at most.

    Attributes:
        labels: (X*Y*Z,) int64; -1 outside.
        count: P.
    """

    def __init__(self, store: Any, scans: Sequence[int], count: int = PARCELS) -> None:
        from sklearn.cluster import AgglomerativeClustering
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.image import grid_to_graph

        mask = common_mask(store, scans)
        used = list(scans)[:: max(1, len(scans) // 20)]
        each = max(8, PARCEL_FRAMES // len(used))
        rows = []
        for scan in used:
            whole = courses(store, scan, "zscore_voxel")[:, mask]
            step = max(1, len(whole) // each)
            rows.append(np.nan_to_num(whole[::step]))
        table = np.concatenate(rows).T  # voxels, frames
        rank = min(30, *(n - 1 for n in table.shape))
        if rank >= 2:
            table = TruncatedSVD(rank, random_state=0).fit_transform(table)
        self.count = min(count, max(1, int(mask.sum()) // 4))
        graph = grid_to_graph(*store.grid, mask=mask.reshape(store.grid))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a mask of several pieces is joined, as we want
            found = AgglomerativeClustering(self.count, connectivity=graph, linkage="ward").fit_predict(table)
        self.labels = np.full(mask.shape, -1, np.int64)
        self.labels[mask] = found

    def signals(self, store: Any, scan: int, kind: str = "percent") -> np.ndarray:
        """(T, P) mean of each parcel; 0 for one without a voxel in this scan."""
        info = store.scans[scan]
        index = store.indices(scan)
        label = self.labels[index]
        inside = label >= 0
        a, b = store.normalizer(scan, kind)
        values = (store.read(scan, 0, info.frames) * a + b)[:, inside]
        member = np.zeros((int(inside.sum()), self.count), np.float32)
        member[np.arange(len(member)), label[inside]] = 1
        total = member.sum(0)
        return np.asarray(values @ (member / np.maximum(total, 1)), np.float64)

    def cleaned(self, store: Any, scan: int, kind: str = "percent") -> np.ndarray:
        """(T, P) signals, in percent change unless told, without drift and movement (nilearn)."""
        from nilearn.signal import clean

        moved = movement(store, scan)
        moved = moved[:, moved.std(0) > 0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(
                clean(
                    self.signals(store, scan, kind),
                    detrend=True,
                    standardize=None,
                    confounds=moved if moved.shape[1] else None,
                    high_pass=HIGH_PASS,
                    filter="cosine",
                    t_r=store.scans[scan].tr,
                )
            )


def unit_of_change(store: Any, scans: Sequence[int]) -> str:
    """Normalization of parcels' signals: percent, or zscore_voxel where a scan has no level to take a percentage of.

    One kind for all scans, or amplitudes of two subjects would not be in one unit. Denoised scans (XCP-D) have mean 0.
    """
    for scan in scans:
        try:
            store.normalizer(scan, "percent")
        except UserError as error:
            log.warning("signals of parcels are means of standardized voxels, not percent change: %s", error)
            return "zscore_voxel"
    return "percent"


def connectivity(signals: Sequence[np.ndarray], train: np.ndarray, kind: str) -> np.ndarray:
    """(N, F) connectomes by nilearn (Ledoit-Wolf covariance); the reference of `tangent` is that of the training scans.

    Args:
        signals: (T, P) of each scan.
        train: (N,) bool.
        kind: correlation, partial correlation (Fisher z; F = P (P - 1) / 2) | tangent (F = P (P + 1) / 2).
    """
    from nilearn.connectome import ConnectivityMeasure

    alive = np.min([s.std(0) for s in signals], axis=0) > 1e-8
    usable = [s[:, alive] for s in signals]
    if kind == "partial correlation":
        # nilearn shrinks the covariance of signals as they are towards equal variances: theirs must be equal before.
        usable = [(s - s.mean(0)) / s.std(0) for s in usable]
    correlation = kind != "tangent"
    measure = ConnectivityMeasure(
        kind=kind, vectorize=True, discard_diagonal=correlation, standardize="zscore_sample" if correlation else None
    )
    measure.fit([s for s, mine in zip(usable, train, strict=True) if mine])
    values = np.asarray(measure.transform(usable), np.float64)
    return np.arctanh(np.clip(values, -0.999999, 0.999999)) if correlation else values


def coskewness_subspace(signals: Sequence[np.ndarray]) -> np.ndarray:
    """(P, R) orthonormal directions that keep most of the co-skewness of standardized signals.

    The tensor E[z_i z_j z_k], a mean over scans, is unfolded to P rows; its leading left singular vectors (truncated
    higher-order SVD, De Lathauwer et al. 2000) that hold `KEPT_SKEWNESS` of its squares are kept. After "the subspace
    that best preserves its co-skewness" of Marraffini et al. 2026 (arXiv 2606.04010), whose abstract leaves open how it
    is found and how large it is.

    Args:
        signals: (T, P) of each training scan.
    """
    parcels = signals[0].shape[1]
    total = np.zeros((parcels, parcels**2))
    for one in signals:
        unit = (one - one.mean(0)) / np.maximum(one.std(0), 1e-8)
        total += unit.T @ (unit[:, :, None] * unit[:, None, :]).reshape(len(unit), -1) / (len(unit) * len(signals))
    directions, sizes, _ = np.linalg.svd(total, full_matrices=False)
    kept = np.cumsum(sizes**2) / max(float((sizes**2).sum()), 1e-300)
    return np.asarray(directions[:, : int(np.searchsorted(kept, KEPT_SKEWNESS)) + 1])


def coskewness_connectivity(signals: Sequence[np.ndarray], train: np.ndarray) -> np.ndarray:
    """(N, F) correlations (Fisher z) of signals in the co-skewness subspace of the training scans; F = R (R - 1) / 2.

    Args:
        signals: (T, P) of each scan.
        train: (N,) bool.
    """
    basis = coskewness_subspace([s for s, mine in zip(signals, train, strict=True) if mine])
    projected = [(one - one.mean(0)) / np.maximum(one.std(0), 1e-8) @ basis for one in signals]
    return connectivity(projected, train, "correlation")


def volumes(store: Any, units: Units, mask: np.ndarray) -> np.ndarray:
    """(N, V) float32 frames as volumes, each voxel standardized over its scan (labels play no part in that)."""
    voxels = np.flatnonzero(mask)[:: max(1, int(mask.sum()) * len(units) // CELLS)]
    out = np.empty((len(units), len(voxels)), np.float32)
    for scan in np.unique(units.scan).tolist():
        rows = np.flatnonzero(units.scan == scan)
        out[rows] = np.nan_to_num(courses(store, scan, "zscore_voxel")[units.frame[rows]][:, voxels])
    return out


def components(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Principal components (`COMPONENTS` at most) of the training rows, of these and of other rows.

    With as many components as there are rows a penalised linear model on them is the one on all voxels.
    """
    from sklearn.decomposition import PCA

    most = min(COMPONENTS, *train.shape)
    reduce = PCA(most, svd_solver="full" if max(train.shape) <= 500 else "randomized", random_state=0).fit(train)
    scale = 1 / np.sqrt(reduce.explained_variance_.sum())
    return [np.asarray(reduce.transform(x) * scale, np.float64) for x in (train, *others)]


# ------------------------------------------------------------------------------------------------------------- models
def constant(train: np.ndarray, count: int, kind: str, classes: int) -> np.ndarray:
    """(count, K) the classes' parts of the training units, or (count, 1) their mean, for everyone."""
    if kind == "regression":
        return np.full((count, 1), train.mean())
    parts = np.bincount(train.astype(np.int64), minlength=classes) / len(train)
    return np.tile(parts, (count, 1))


def _folds(train: Units) -> Any:
    """Folds inside the training units: subjects together; contiguous blocks of time where there are too few."""
    from sklearn.model_selection import GroupKFold, KFold

    subjects = len(np.unique(train.subject))
    if subjects >= FOLDS:
        return GroupKFold(FOLDS)
    if (train.frame >= 0).any():
        return KFold(FOLDS)
    if subjects < 3:  # of two subjects a fold would leave one, and one value has no variance
        few = "1 training subject" if subjects == 1 else f"{subjects} training subjects"
        raise UserError(f"{few}: a baseline's penalty cannot be chosen; at least 3 are needed")
    return GroupKFold(subjects)


def fitted(features: np.ndarray, train: Units, kind: str, balance: bool = False, standardize: bool = True) -> Any:
    """Logistic or ridge regression, its penalty chosen by cross-validation in `train`.

    Args:
        features: (N, F) of the training units.
        train: The units.
        kind: binary | multiclass | regression.
        balance: Weigh classes by the inverse of their number.
        standardize: Bring every feature to unit variance.

    Returns:
        A fitted scikit-learn estimator.

    Raises:
        UserError: Fewer than 3 training subjects (unless units are frames), or no fold with all that a fit needs.
    """
    from sklearn.feature_selection import VarianceThreshold
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    steps: list[tuple[str, Any]] = [("vary", VarianceThreshold(1e-12))]
    steps += [("scale", StandardScaler())] if standardize else []
    target = train.target
    if kind == "regression":
        steps.append(("model", Ridge()))
        grid, scoring = {"model__alpha": [1 / c for c in PENALTIES]}, "neg_mean_squared_error"
        target = (target - target.mean()) / (target.std() or 1.0)
    else:
        steps.append(("model", LogisticRegression(max_iter=1000, class_weight="balanced" if balance else None)))
        grid, scoring = {"model__C": list(PENALTIES)}, "neg_log_loss"
    search = GridSearchCV(Pipeline(steps), grid, cv=_folds(train), scoring=scoring, error_score=np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold without a class, a penalty that does not converge: never chosen
        try:
            search.fit(features, target, groups=train.subject)
        except ValueError as error:
            why = str(error).strip().splitlines()[-1]
            raise UserError(f"{len(train)} training units do not do for a baseline's folds: {why}") from error
    return search.best_estimator_


def predicted(model: Any, features: np.ndarray, train: Units, kind: str, classes: int) -> np.ndarray:
    """(N, K) probabilities (0 for a class that training has not seen) or (N, 1) values in the label's unit."""
    if kind == "regression":
        spread = train.target.std() or 1.0
        return np.asarray(model.predict(features), np.float64).reshape(-1, 1) * spread + train.target.mean()
    out = np.zeros((len(features), classes))
    out[:, np.asarray(model.classes_, np.int64)] = model.predict_proba(features)
    return out

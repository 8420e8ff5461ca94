"""Maps predicted without a network: what a dense head must beat. Everything is fitted on training subjects only.

Shapes: S subjects (n of training), K contrasts, V voxels of the brain, P parcels, T frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from swift.data.task_maps.module import MapDataModule
from swift.evaluate.classical import Parcels, Units, connectivity, courses
from swift.utils.errors import UserError

ALPHAS = tuple(10.0**k for k in range(-1, 7))
"""Penalties of ridge regression on standardized features, of which leave-one-out error chooses."""
COMPONENTS = 20
"""Principal components of the training maps at most."""
SHRINK = (0.01, 0.1, 1.0)
"""Ridge penalty of the regression on connectivity maps, as a part of their mean square."""
HELD = 5
"""Every fifth training subject chooses `SHRINK`."""


class MapBaselines:
    """The baselines of one task of maps; what they share is made once, and only when one asks for it.

    Args:
        data: With the maps.
        units: Of train, val and test.
        cleaned: Makes parcels of the training scans, and signals (T, P) of every unit: train, then val, then test.

    Raises:
        UserError: fewer than 3 training subjects.
    """

    def __init__(
        self,
        data: MapDataModule,
        units: dict[str, Units],
        cleaned: Callable[[], tuple[Parcels, list[np.ndarray]]],
    ) -> None:
        self.data, self._cleaned = data, cleaned
        self.train = data.subjects_of("train")
        if len(self.train) < 3:
            raise UserError(f"{len(self.train)} training subjects: a baseline's penalty needs at least 3")
        self._scan, self._subject, first, length = (
            np.concatenate([getattr(one, name) for one in units.values()])
            for name in ("scan", "subject", "first", "length")
        )
        self._mine = np.arange(len(self._scan)) < len(units["train"])
        self._scans = {name: self._scan[self._subject == name].tolist() for name in set(self._subject.tolist())}
        # A budget of frames (data.max_frames) leaves a part of a training scan.
        ends = zip(first.tolist(), (first + length).tolist(), strict=True)
        self._part = {scan: slice(*pair) for scan, pair in zip(self._scan.tolist(), ends, strict=True)}
        deviations = [data.map_of(name) - data.mean for name in self.train]
        self._rest = np.nan_to_num(np.stack(deviations))  # (n, K, V); the mean where a subject has no value

    @cached_property
    def parcels(self) -> Parcels:
        """Of the training scans."""
        return self._cleaned()[0]

    @cached_property
    def _signals(self) -> dict[int, np.ndarray]:
        """Scan -> (T, P) of the part that is used."""
        return dict(zip(self._scan.tolist(), self._cleaned()[1], strict=True))

    @cached_property
    def _connectome(self) -> dict[str, np.ndarray]:
        """Subject -> (F,) mean over scans."""
        vectors = connectivity([self._signals[scan] for scan in self._scan.tolist()], self._mine, "correlation")
        return {name: vectors[self._subject == name].mean(0) for name in self._scans}

    @cached_property
    def _amplitude(self) -> dict[str, np.ndarray]:
        """Subject -> (P,) mean over scans of the logarithm of the standard deviation."""
        spread = np.log(np.stack([self._signals[scan].std(0) for scan in self._scan.tolist()]) + 1e-6)
        return {name: spread[self._subject == name].mean(0) for name in self._scans}

    def predict(self, name: str, subjects: list[str]) -> np.ndarray:
        """(S, K, V) maps of subjects by a baseline of `swift.evaluate.baselines.MAP_BASELINES`."""
        made: np.ndarray = getattr(self, f"_{name}")(subjects)
        return np.asarray(made, np.float32)

    def _mean_map(self, subjects: list[str]) -> np.ndarray:
        return np.broadcast_to(self.data.mean, (len(subjects), *self.data.mean.shape))

    def _mean_amplitude(self, subjects: list[str]) -> np.ndarray:
        """The mean map times a number for each subject and contrast, by ridge on how strongly parcels fluctuate."""
        mean = self.data.mean.astype(np.float64)
        size = 1 + np.einsum("nkv,kv->nk", self._rest, mean) / np.einsum("kv,kv->k", mean, mean)
        said = self._ridge(self._amplitude, size, subjects)
        return said[:, :, None] * mean

    def _fc_components(self, subjects: list[str]) -> np.ndarray:
        """Ridge from the connectome to principal components of the training maps, all contrasts together."""
        flat = self._rest.reshape(len(self.train), -1) / np.repeat(self.data.std, self.data.mean.shape[1])
        _, _, rows = np.linalg.svd(flat, full_matrices=False)
        rows = rows[: min(COMPONENTS, len(self.train) - 1)]
        said = self._ridge(self._connectome, flat @ rows.T, subjects) @ rows
        return self.data.mean + said.reshape(len(subjects), *self.data.mean.shape) * self.data.std[:, None]

    def _nearest(self, subjects: list[str]) -> np.ndarray:
        """The map of the training subject whose connectome correlates most."""
        table = np.stack([self._connectome[name] for name in self.train])
        found = [int(np.corrcoef(table, self._connectome[name])[-1, :-1].argmax()) for name in subjects]
        return self.data.mean + self._rest[found]

    def _connectivity(self, subjects: list[str]) -> np.ndarray:
        """In each parcel a regression over voxels of the map on the connectivity maps of all parcels, its coefficients
        averaged over training subjects (Tavor et al. 2016, Science 352:216).
        """
        label = self.parcels.labels[self.data.space.voxels]
        held = np.arange(len(self.train)) % HELD == HELD - 1
        each = [self._coefficients(name, rest, label) for name, rest in zip(self.train, self._rest, strict=True)]
        fitted = np.stack(each)  # (n, SHRINK, P, P + 1, K)
        mean_of = fitted[~held].mean(0)
        errors = np.zeros(len(SHRINK))
        for place in np.flatnonzero(held):
            said = self._applied(self.train[place], mean_of, label)
            errors += ((said - self._rest[place]) ** 2).mean((1, 2))
        best = fitted.mean(0)[[int(errors.argmin())]]
        return np.stack([self.data.mean + self._applied(name, best, label)[0] for name in subjects])

    def _seeds(self, subject: str) -> np.ndarray:
        """(V, P + 1) Fisher z of each voxel's course with each parcel's, mean over scans, and ones; 0 outside."""
        total = np.zeros((len(self.data.space.voxels), self.parcels.count + 1))
        for scan in self._scans[subject]:
            whole = courses(self.data.store, scan, "zscore_voxel")[self._part[scan]]
            signal = self._signals[scan]
            unit = signal / np.maximum(np.linalg.norm(signal, axis=0), 1e-9)
            voxels = np.nan_to_num(whole[:, self.data.space.voxels])
            size = np.maximum(np.linalg.norm(voxels, axis=0), 1e-9)
            total[:, :-1] += np.arctanh(np.clip((voxels / size).T @ unit, -0.999, 0.999))
        total[:, :-1] /= len(self._scans[subject])
        total[:, -1] = 1
        return total

    def _coefficients(self, subject: str, rest: np.ndarray, label: np.ndarray) -> np.ndarray:
        """(SHRINK, P, P + 1, K) of one training subject."""
        seeds = self._seeds(subject)
        out = np.zeros((len(SHRINK), self.parcels.count, seeds.shape[1], len(rest)))
        for parcel in range(self.parcels.count):
            inside = label == parcel
            x, y = seeds[inside], rest[:, inside].T
            square = x.T @ x
            for place, shrink in enumerate(SHRINK):
                penalty = shrink * np.trace(square) / len(square) * np.eye(len(square))
                out[place, parcel] = np.linalg.solve(square + penalty + 1e-9 * np.eye(len(square)), x.T @ y)
        return out

    def _applied(self, subject: str, coefficients: np.ndarray, label: np.ndarray) -> np.ndarray:
        """(n, K, V) for (n, P, P + 1, K) coefficients; 0 outside the parcels."""
        seeds = self._seeds(subject)
        out = np.zeros((len(coefficients), coefficients.shape[-1], len(label)))
        for parcel in range(self.parcels.count):
            inside = label == parcel
            out[:, :, inside] = np.einsum("vp,npk->nkv", seeds[inside], coefficients[:, parcel])
        return out

    def _ridge(self, features: dict[str, np.ndarray], wanted: np.ndarray, subjects: list[str]) -> np.ndarray:
        """(S, M) predicted from standardized features; wanted (n, M) of the training subjects."""
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model: Any = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(np.stack([features[name] for name in self.train]), wanted)
        return np.asarray(model.predict(np.stack([features[name] for name in subjects]))).reshape(len(subjects), -1)

"""Space: the head, its mask and mean image, the networks' maps and the planted regions.

Everything is defined in head coordinates (-1 to 1 from surface to surface along each axis), so that one seed gives the
same cohort on any grid. Smooth random fields are white noise on a coarse lattice times separable Gaussian kernels:
three small matrix products instead of a filter over the volume, and a variance that is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from swift.data.store.spaces import box_affine, placement_of
from swift.data.synthetic.spec import BASELINE, CohortSpec, stream

SPACE = "MNI152NLin2009cAsym"
"""What the scans say that they are in."""
SEMI_AXES = (70.0, 86.0, 68.0)
"""Half the brain's size along x, y, z, mm: about the 1.8 litres of the MNI brain mask."""

PAIR_BINARY = (0, 1)
"""Networks whose coupling follows the latent of label_binary."""
AMPLITUDE_BINARY = 2
"""Network whose left part's amplitude follows the latent of label_binary."""
PAIR_CONTINUOUS = (3, 4)
AMPLITUDE_CONTINUOUS = 5
"""Network whose right part's amplitude follows the latent of label_continuous."""
DRIVEN = 6
"""Network that the valence course drives."""

CORE = 0.5
"""A voxel is in the core of a network where the group's map is above this; cores never overlap."""

MAP_FLOOR, MAP_RANGE = 0.1, 0.8
"""map = clip((margin over the best other field + floor) / range): at margin 0, where cores could touch, it is 0.125."""

Bases = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Geometry:
    """What all subjects of a cohort share in space. X, Y, Z is the grid; K networks."""

    affine: np.ndarray
    """(4, 4) voxel to mm, RAS+: the box in which ingestion would place scans of SPACE."""
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Head coordinates of the voxels along x, y and z."""
    radius: np.ndarray
    """(X, Y, Z) float32: 1 on the surface of the group's brain."""
    mask: np.ndarray
    """(X, Y, Z) bool: brain of the group."""
    fields: np.ndarray
    """(K, X, Y, Z) float32 of about unit variance: each voxel belongs to the network whose field is highest."""
    maps: np.ndarray
    """(K, X, Y, Z) float32 in [0, 1], 0 outside the brain: the group's network maps."""
    left: np.ndarray
    """(X,) bool: left of the midline."""

    def core(self, network: int) -> np.ndarray:
        """(X, Y, Z) bool: where the group's map of this network is above CORE."""
        return self.maps[network] > CORE

    def regions(self) -> dict[str, np.ndarray]:
        """Where each label's effect is planted, (X, Y, Z) bool each, and `control`, where no effect is.

        `*_coupling`: cores of the two networks of the pair; `*_amplitude`: the core of one network in one hemisphere
        (left for binary, right for continuous); `frame`: core of the driven network; `control`: cores of the others.
        """
        left = self.left[:, None, None]
        first, second = PAIR_BINARY, PAIR_CONTINUOUS
        return {
            "binary_coupling": self.core(first[0]) | self.core(first[1]),
            "binary_amplitude": self.core(AMPLITUDE_BINARY) & left,
            "continuous_coupling": self.core(second[0]) | self.core(second[1]),
            "continuous_amplitude": self.core(AMPLITUDE_CONTINUOUS) & ~left,
            "frame": self.core(DRIVEN),
            "control": (self.maps[DRIVEN + 1 :] > CORE).any(0),
        }


def kernels(axis: np.ndarray, width: float, step: float, reach: float) -> np.ndarray:
    """Gaussian kernels of `width` from a lattice of `step` over -reach..reach to the points of an axis.

    Returns:
        (points, lattice) float32 with rows of unit length, so that white noise on the lattice gives unit variance.

    """
    count = max(2, int(np.ceil(2 * reach / step)) + 1)
    lattice = np.linspace(-reach, reach, count)
    inside = np.clip(axis, -reach, reach)  # a field of view beyond the lattice (no brain there) repeats its border
    basis = np.exp(-0.5 * ((inside[:, None] - lattice) / width) ** 2)
    basis[basis < 1e-8] = 0  # float32 would keep subnormal numbers, which make the products ten times slower
    return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32)


def spread(noise: np.ndarray, bases: Bases) -> np.ndarray:
    """(n, a, b, c) values on the lattice -> (n, X, Y, Z) smooth fields."""
    # Each step contracts the first lattice axis and puts its grid axis last. One large product an axis: stacks of small
    # ones take five times as long with several BLAS threads on a busy machine.
    out = noise
    for basis in bases:
        lines = np.moveaxis(out, 1, -1)
        out = (lines.reshape(-1, basis.shape[1]) @ basis.T).reshape(*lines.shape[:-1], len(basis))
    return out


def smooth_fields(
    rng: np.random.Generator,
    count: int,
    axes: tuple[np.ndarray, np.ndarray, np.ndarray],
    width: float,
) -> np.ndarray:
    """(count, X, Y, Z) float32 independent Gaussian fields of unit variance; `width` in head coordinates.

    The lattice does not depend on the grid: the same draws give the same field on any grid. The field's correlation at
    a distance d is about exp(-d^2 / (4 width^2)).
    """
    bx, by, bz = (kernels(axis, width, width, 1.0 + 3 * width) for axis in axes)
    noise = rng.standard_normal((count, bx.shape[1], by.shape[1], bz.shape[1]), dtype=np.float32)
    return spread(noise, (bx, by, bz))


def maps_of(fields: np.ndarray) -> np.ndarray:
    """(K, ...) fields -> (K, ...) maps in [0, 1]: the margin of a field over the best of the others."""
    top = np.partition(fields, -2, axis=0)[-2:]
    rival = np.where(fields == top[1], top[0], top[1])
    return np.clip((fields - rival + MAP_FLOOR) / MAP_RANGE, 0, 1)


def _network_fields(
    seed: int,
    networks: int,
    symmetry: float,
    axes: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """(K, X, Y, Z) fields of the group: a part that is mirrored across the midline and one that is not."""
    rng = stream(seed, "maps")
    width = 0.2
    mirrored = smooth_fields(rng, networks, (np.abs(axes[0]), axes[1], axes[2]), width)
    own = smooth_fields(rng, networks, axes, width)
    return np.sqrt(symmetry).astype(np.float32) * mirrored + np.sqrt(1 - symmetry).astype(np.float32) * own


def _balance(seed: int, networks: int, symmetry: float) -> tuple[np.ndarray, np.ndarray]:
    """Offsets that give the networks about equal volumes, and their order by the smaller hemisphere's core.

    Found on a fixed grid, so that they are the same for every grid; without them the largest network is fifty times
    the smallest and the planted ones may be tiny.
    """
    line = np.linspace(-1, 1, 24)
    inside = (line[:, None, None] ** 2 + line[:, None] ** 2 + line**2) < 1
    fields = _network_fields(seed, networks, symmetry, (line, line, line))
    offsets = -fields[:, inside].mean(1)
    for _ in range(30):
        winner = (fields[:, inside] + offsets[:, None]).argmax(0)
        share = np.bincount(winner, minlength=networks) / len(winner)
        offsets += np.float32(0.5) * (1 / networks - share).astype(np.float32) * np.sqrt(networks, dtype=np.float32)
    core = (maps_of(fields + offsets[:, None, None, None]) > CORE) & inside
    left, right = core[:, :12].sum((1, 2, 3)), core[:, 12:].sum((1, 2, 3))
    return offsets, np.argsort(-np.minimum(left, right), kind="stable")


def geometry(spec: CohortSpec) -> Geometry:
    """The space of a cohort; kept for the last few cohorts."""
    return _geometry(spec.seed, spec.grid, spec.spacing, spec.networks, spec.symmetry)


@lru_cache(maxsize=3)
def _geometry(
    seed: int,
    grid: tuple[int, int, int],
    spacing: float,
    networks: int,
    symmetry: float,
) -> Geometry:
    semi = [min(s, 0.46 * n * spacing) for s, n in zip(SEMI_AXES, grid)]
    positions = [(np.arange(n) - (n - 1) / 2) * spacing for n in grid]
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = box_affine(placement_of(SPACE), grid, spacing)[:3, 3]
    ax, ay, az = (p / s for p, s in zip(positions, semi))
    axes = (ax, ay, az)

    # An ellipsoid that is flatter below, narrower in front and uneven by a few percent.
    x2 = (ax[:, None, None] * (1 + 0.12 * np.clip(ay, 0, None)[None, :, None])) ** 2
    z2 = np.where(az < 0, az * 1.15, az)[None, None, :] ** 2
    bumps = smooth_fields(stream(seed, "anatomy"), 1, axes, 0.3)[0]
    radius = (np.sqrt(x2 + ay[None, :, None] ** 2 + z2) * (1 + 0.03 * bumps)).astype(np.float32)
    mask = radius < 1

    offsets, order = _balance(seed, networks, symmetry)
    fields = (_network_fields(seed, networks, symmetry, axes) + offsets[:, None, None, None])[order]
    maps = maps_of(fields) * mask
    shared = Geometry(affine, axes, radius, mask, fields, maps, positions[0] < 0)
    for array in (affine, radius, mask, fields, maps):
        array.setflags(write=False)  # one copy serves all subjects
    return shared


def subject_anatomy(spec: CohortSpec, subject: int) -> tuple[np.ndarray, np.ndarray]:
    """A subject's brain mask and mean image.

    Returns:
        mask (X, Y, Z) bool; mean (X, Y, Z) float32: bright ventricles, white matter, a folded grey ribbon, and a scalp
        side that falls off outside the brain (so that a moving head changes its rim).

    """
    shared = geometry(spec)
    rng = stream(spec.seed, "subject_anatomy", subject)
    shape, *texture = smooth_fields(rng, 3, shared.axes, 0.25)
    radius = shared.radius * (1 + 0.015 * shape)
    folds = radius + 0.06 * np.sin(6 * texture[0])

    def step(edge: float, width: float) -> np.ndarray:
        return 1 / (1 + np.exp(np.clip((edge - folds) / width, -30, 30)))

    ventricles = np.exp(-((radius / 0.22) ** 2) * (1 + 0.3 * texture[1] ** 2))
    grey = step(0.72, 0.05)
    mean = BASELINE * (0.82 + 0.18 * grey + 0.4 * ventricles + 0.03 * texture[1])
    mean *= 1 / (1 + np.exp(np.clip((radius - 1.08) / 0.05, -30, 30)))
    return radius < 1, mean.astype(np.float32)


def subject_maps(spec: CohortSpec, subject: int) -> np.ndarray:
    """(K, X, Y, Z) float32 in [0, 1]: the group's fields with the subject's own part added."""
    shared = geometry(spec)
    if spec.map_variability == 0:
        return maps_of(shared.fields)
    own = smooth_fields(stream(spec.seed, "subject_maps", subject), spec.networks, shared.axes, 0.2)
    own *= spec.map_variability
    own += shared.fields
    return maps_of(own)

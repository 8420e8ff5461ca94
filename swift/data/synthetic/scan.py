"""One synthetic scan: maps times courses, plus drift, motion, noise and the site's scanner.

In percent of the mean image everything but noise is low rank, so the signal is one matrix product over brain voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.signal
from numpy.polynomial import legendre

from swift.data.synthetic import maps as space
from swift.data.synthetic.courses import TaskCourse, mixing, network_courses
from swift.data.synthetic.labels import Person, person
from swift.data.synthetic.spec import BASELINE, CohortSpec, stream
from swift.utils.errors import UserError

RESIDUAL_MOTION = 0.1
"""Part of a movement that is left after realignment."""
SPIN_LOSS = 2.0
"""Signal lost by 1 mm of movement through the slice, %."""
T1 = 1.2
"""Recovery time of the spin history, s."""
MOTION_COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
DRIFT_WEIGHTS = (0.8, 0.5, 0.33)
"""Of the first three Legendre polynomials; scaled to a sum of squares of 1."""


@dataclass(frozen=True)
class SyntheticScan:
    """One run of one subject with its truth. T frames, V brain voxels in C order of the grid, K networks."""

    person: Person
    run: int
    """From 0."""
    tr: float
    """s."""
    affine: np.ndarray
    """(4, 4) voxel to mm, RAS+."""
    mask: np.ndarray
    """(X, Y, Z) bool."""
    bold: np.ndarray
    """(T, V) float32."""
    motion: np.ndarray
    """(T, 6) movement in the order of MOTION_COLUMNS; mm and radians."""
    framewise_displacement: np.ndarray
    """(T,) mm (Power et al. 2012, 50 mm sphere); 0 in the first frame."""
    task: TaskCourse
    courses: np.ndarray
    """(T, K) true BOLD courses of the networks."""
    coupling: np.ndarray
    """(K, K) the subject's true correlation of the courses."""
    maps: np.ndarray
    """(K, V) float32: the subject's network maps, planted amplitudes included."""

    def dense(self) -> np.ndarray:
        """(X, Y, Z, T) float32 view with 0 outside the brain."""
        volume = np.zeros((len(self.bold), self.mask.size), dtype=np.float32)
        volume[:, np.flatnonzero(self.mask)] = self.bold
        return np.moveaxis(volume.reshape(-1, *self.mask.shape), 0, -1)


@dataclass(frozen=True)
class Site:
    """A scanner. All 1 (no field) where the site effect is 0."""

    gain: float
    noise: float
    bias: np.ndarray
    """(X, Y, Z) float32 factor on the intensity."""


def site_of(spec: CohortSpec, index: int) -> Site:
    """What is particular about a site's scanner."""
    rng = stream(spec.seed, "site", index)
    gain, noise = rng.standard_normal(2)
    field = space.smooth_fields(rng, 1, space.geometry(spec).axes, 0.6)[0]
    size = spec.site_effect
    return Site(
        float(np.exp(0.1 * size * gain)),
        float(np.exp(0.2 * size * noise)),
        np.exp(0.15 * size * field),
    )


def movement(spec: CohortSpec, subject: int, run: int) -> np.ndarray:
    """(T, 6) movement, mm and radians: a slow wander, steps that stay and jerks that return in the next frame."""
    rng = stream(spec.seed, "motion", subject, run)
    size = spec.motion * rng.lognormal(0, 0.4)
    wander = rng.normal(0, 0.01, (spec.frames, 6))
    jumps = rng.random(spec.frames) < 0.02
    returns = rng.random(spec.frames) < 0.5
    direction = rng.standard_normal((spec.frames, 6))
    direction *= (rng.uniform(0.5, 2, spec.frames) / np.linalg.norm(direction, axis=1))[:, None]
    change = wander + jumps[:, None] * direction
    change[1:] -= ((jumps & returns)[:, None] * direction)[:-1]
    change[0] = 0
    path = np.cumsum(change, 0) * size
    path[:, 3:] /= 50  # as much at the surface of a 50 mm sphere
    return path


def framewise_displacement(motion: np.ndarray) -> np.ndarray:
    """(T, 6) movement -> (T,) mm, 0 in the first frame."""
    change = np.abs(np.diff(motion, axis=0))
    return np.concatenate([[0.0], change[:, :3].sum(1) + 50 * change[:, 3:].sum(1)])


def _motion_parts(
    motion: np.ndarray, mean: np.ndarray, mask: np.ndarray, spacing: float, tr: float
) -> tuple[np.ndarray, np.ndarray]:
    """(T, 7) courses and (7, V) maps, %: the rigid movement to first order (exact for small ones) and spin history."""
    slope = [g[mask] for g in np.gradient(mean, spacing)]
    place = [(index - (n - 1) / 2) * spacing for index, n in zip(np.nonzero(mask), mask.shape)]
    shift = [-100 * s / mean[mask] for s in slope]
    turn = [
        shift[2] * place[1] - shift[1] * place[2],
        shift[0] * place[2] - shift[2] * place[0],
        shift[1] * place[0] - shift[0] * place[1],
    ]
    jump = np.abs(np.diff(motion[:, 2], prepend=motion[0, 2]))
    spin = -SPIN_LOSS * scipy.signal.lfilter([1.0], [1.0, -np.exp(-tr / T1)], jump)
    interleaved = np.where(np.nonzero(mask)[2] % 2, 0.5, 1.0)  # odd slices come later, half recovered
    courses = np.column_stack([RESIDUAL_MOTION * motion, spin])
    return courses, np.stack([*shift, *turn, interleaved])


def _drift_parts(spec: CohortSpec, subject: int, run: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, 3) polynomials of unit variance and (3, V) smooth weights, %, of variance drift^2 together."""
    rng = stream(spec.seed, "drift", subject, run)
    fields = space.smooth_fields(rng, 3, space.geometry(spec).axes, 0.5)[:, mask]
    weights = np.array(DRIFT_WEIGHTS) / np.linalg.norm(DRIFT_WEIGHTS)
    whole = rng.standard_normal(3)[:, None]  # half of the variance is common to the whole brain
    line = np.linspace(-1, 1, spec.frames)
    polynomials = np.column_stack([np.sqrt(2 * o + 1) * legendre.Legendre.basis(o)(line) for o in (1, 2, 3)])
    return polynomials, spec.drift * weights[:, None] * np.sqrt(0.5) * (fields + whole)


def noise_autocorrelation(tr: float) -> float:
    """Of the smooth noise, from a frame to the next; `tr` in s."""
    return float(0.3 ** (tr / 2))


def smooth_bases(spec: CohortSpec, low: Sequence[int], high: Sequence[int]) -> space.Bases:
    """Kernels of the smooth noise on the voxels low to high - 1 of each axis, (voxels, lattice) each.

    The noise of a frame is white noise on the lattice times these; B B' of each axis is its correlation.
    """
    width = max(spec.smoothness / np.sqrt(8 * np.log(2)), 0.6 * spec.spacing)
    bases = []
    for start, stop in zip(low, high):
        line = (np.arange(start, stop) - (start + stop - 1) / 2) * spec.spacing
        bases.append(space.kernels(line, width, max(1.4 * width, spec.spacing), line[-1] + 2 * width))
    bx, by, bz = bases
    return bx, by, bz


def _add_smooth_noise(
    out: np.ndarray,
    spec: CohortSpec,
    key: tuple[int, int],
    mask: np.ndarray,
    tr: float,
    scale: float,
) -> None:
    """Adds noise that is smooth in space and AR(1) in time to (T, V), in place, a few frames at a time."""
    rng = stream(spec.seed, "smooth", *key)
    inside = np.nonzero(mask)
    low, high = [i.min() for i in inside], [i.max() + 1 for i in inside]
    bx, by, bz = smooth_bases(spec, low, high)
    box = [stop - start for start, stop in zip(low, high)]
    flat = np.ravel_multi_index(tuple(i - start for i, start in zip(inside, low)), box)
    phi = np.float32(noise_autocorrelation(tr))
    innovation = np.sqrt(1 - phi**2, dtype=np.float32)
    lattice = (bx.shape[1], by.shape[1], bz.shape[1])
    state = rng.standard_normal(lattice, dtype=np.float32)
    for first in range(0, len(out), 8):
        noise = rng.standard_normal((min(8, len(out) - first), *lattice), dtype=np.float32)
        for frame in noise:
            state *= phi
            state += innovation * frame
            frame[:] = state
        fields = space.spread(noise, (bx, by, bz)).reshape(len(noise), -1)
        out[first : first + len(noise)] += np.float32(scale) * fields.take(flat, axis=1)


def _planted_maps(spec: CohortSpec, who: Person, mask: np.ndarray) -> np.ndarray:
    """(K, V) float32 maps of a subject with the amplitudes of the planted regions."""
    shared = space.geometry(spec)
    dense = space.subject_maps(spec, who.index)
    left = shared.left
    dense[space.AMPLITUDE_BINARY][left] *= np.float32(np.exp(spec.amplitude_gain * who.latent_binary))
    dense[space.AMPLITUDE_CONTINUOUS][~left] *= np.float32(np.exp(spec.amplitude_gain * who.latent_continuous))
    return dense.reshape(len(dense), -1)[:, np.flatnonzero(mask)]


def make_subject(spec: CohortSpec, i: int, run: int = 0) -> SyntheticScan:
    """Makes one run of subject i; nothing else of the cohort is made, and nothing else matters to it.

    Args:
        spec: the cohort.
        i: subject, from 0 (may lie beyond `n_subjects`).
        run: run, from 0.

    Raises:
        UserError: a negative subject, or a run the cohort does not have.

    """
    if i < 0 or not 0 <= run < spec.runs:
        raise UserError(f"synthetic cohort: no subject {i}, run {run}; subjects from 0, runs 0 to {spec.runs - 1}")
    who = person(spec, i)
    tr = spec.tr_of(who.site_index)
    mask, mean = space.subject_anatomy(spec, i)
    planted = _planted_maps(spec, who, mask)
    matrix = mixing(spec, who.latent_binary, who.latent_continuous)
    courses, task = network_courses(spec, i, run, tr, matrix)
    motion = movement(spec, i, run)

    parts = [(spec.signal * courses, planted)]
    if spec.motion:
        parts.append(_motion_parts(motion, mean, mask, spec.spacing, tr))
    if spec.drift:
        parts.append(_drift_parts(spec, i, run, mask))
    times = np.concatenate([p[0] for p in parts], axis=1).astype(np.float32)
    bold = times @ np.concatenate([p[1] for p in parts], axis=0).astype(np.float32)  # percent

    site = site_of(spec, who.site_index)
    base = mean[mask]
    if spec.noise_smooth:
        _add_smooth_noise(bold, spec, (i, run), mask, tr, spec.noise_smooth * site.noise)
    if spec.noise_white:
        white = stream(spec.seed, "white", i, run).standard_normal(bold.shape, dtype=np.float32)
        white *= spec.noise_white * site.noise * BASELINE / base  # thermal noise does not follow the mean
        bold += white
    bold *= np.float32(0.01)
    bold += 1
    bold *= base * (site.gain * site.bias[mask])
    coupling = matrix @ matrix.T
    coupling[space.DRIVEN, space.DRIVEN] += spec.frame_r**2
    affine = space.geometry(spec).affine.copy()
    displacement = framewise_displacement(motion)
    return SyntheticScan(
        who,
        run,
        tr,
        affine,
        mask,
        bold,
        motion,
        displacement,
        task,
        courses,
        coupling,
        planted,
    )

"""Time: network courses, their coupling, and the valence course that drives one network.

A network's neural activity has a spectrum of 1/f above a knee; convolved with the canonical haemodynamic response it
gives the BOLD course. Its autocorrelation is known in closed form (`course_autocorrelation`): at one frame 0.98 for a
TR of 0.72 s, 0.84 for 2 s, 0.68 for 3 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
import scipy.signal

from swift.data.synthetic.maps import DRIVEN, PAIR_BINARY, PAIR_CONTINUOUS
from swift.data.synthetic.spec import CohortSpec, stream

KNEE = 0.01
"""Hz; below it the neural spectrum is flat."""
NEURAL_STEP = 0.25
"""Longest step of the neural time axis, s."""
PADDING = 64.0
"""Seconds made and thrown away, so that the end of a run does not wrap into its start."""


@dataclass(frozen=True)
class TaskCourse:
    """The per-frame label of a run. T frames, N blocks."""

    onset: np.ndarray
    """(N,) s from the first frame."""
    duration: np.ndarray
    """(N,) s."""
    value: np.ndarray
    """(N,) valence in [-1, 1]."""
    valence: np.ndarray
    """(T,) valence at the time of each frame."""
    valence_bold: np.ndarray
    """(T,) convolved with the haemodynamic response; mean 0 and standard deviation 1 over the run."""


def _steps(tr: float) -> int:
    """Neural samples a frame."""
    return int(np.ceil(tr / NEURAL_STEP))


@lru_cache(maxsize=16)
def hrf(tr: float) -> np.ndarray:
    """Glover's haemodynamic response at the neural step of this TR, 32 s, unit sum."""
    from nilearn.glm.first_level import glover_hrf  # imported late: takes two seconds

    return np.asarray(glover_hrf(tr / _steps(tr), 1), dtype=np.float64)


@lru_cache(maxsize=16)
def _filter(tr: float, frames: int) -> tuple[np.ndarray, int]:
    """Frequency response (for rfft) that turns unit white noise into unit-variance BOLD, and its number of samples."""
    step = tr / _steps(tr)
    count = scipy.fft.next_fast_len(frames * _steps(tr) + int(np.ceil(PADDING / step)), real=True)
    frequency = scipy.fft.rfftfreq(count, step)
    response = scipy.fft.rfft(hrf(tr), count) * (KNEE**2 + frequency**2) ** -0.25  # power falls as 1/f
    response[0] = 0
    power = np.abs(scipy.fft.irfft(np.abs(response) ** 2, count)[0])
    return response / np.sqrt(power), count


def course_autocorrelation(tr: float, lag: int = 1, frames: int = 1000) -> float:
    """Autocorrelation of a network course (population value) at `lag` frames of `tr` seconds."""
    response, count = _filter(tr, frames)
    return float(scipy.fft.irfft(np.abs(response) ** 2, count)[lag * _steps(tr)])


def sources(rng: np.random.Generator, count: int, frames: int, tr: float) -> np.ndarray:
    """(T, count) float64 independent BOLD courses of unit (population) variance."""
    response, samples = _filter(tr, frames)
    white = rng.standard_normal((count, samples))
    bold = scipy.fft.irfft(scipy.fft.rfft(white) * response, samples)
    return np.ascontiguousarray(bold[:, : frames * _steps(tr) : _steps(tr)].T)


def group_covariance(spec: CohortSpec) -> np.ndarray:
    """(K, K) correlation of the networks in the group: two factors (integration, segregation) plus own variance."""
    loadings = stream(spec.seed, "covariance").normal(0, 0.5, (spec.networks, 2))
    covariance = loadings @ loadings.T + np.eye(spec.networks)
    scale = np.sqrt(np.diag(covariance))
    return covariance / np.outer(scale, scale)


def mixing(spec: CohortSpec, binary: float, continuous: float) -> np.ndarray:
    """(K, K) matrix M of a subject: courses = sources @ M.T have unit variance and the planted couplings.

    The second network of a planted pair is rebuilt as rho * first + sqrt(1 - rho^2) * (its part that is independent of
    the first): the pair's correlation is rho exactly and the whole stays a correlation matrix for any latent.
    Fisher z of rho is 0.3 + coupling_gain * latent.
    """
    group = group_covariance(spec)
    rows = np.linalg.cholesky(group)
    for (first, second), latent in (
        (PAIR_BINARY, binary),
        (PAIR_CONTINUOUS, continuous),
    ):
        rho = np.tanh(0.3 + spec.coupling_gain * latent)
        r0 = group[first, second]
        own = (rows[second] - r0 * rows[first]) / np.sqrt(1 - r0**2)
        rows[second] = rho * rows[first] + np.sqrt(1 - rho**2) * own
    rows[DRIVEN] *= np.sqrt(1 - spec.frame_r**2)  # the rest of its variance is the valence course
    return rows


def task_course(rng: np.random.Generator, frames: int, tr: float) -> TaskCourse:
    """Valence in blocks of 6 to 16 s without gaps, as a film's scenes, and its BOLD prediction."""
    durations = rng.uniform(6, 16, int(frames * tr / 6) + 2).round(2)
    values = rng.uniform(-1, 1, len(durations)).round(3)
    onset = np.concatenate([[0.0], np.cumsum(durations)[:-1]]).round(2)
    used = onset < frames * tr
    onset, durations, values = onset[used], durations[used], values[used]
    steps = _steps(tr)
    times = np.arange(frames * steps) * (tr / steps)
    neural = values[np.searchsorted(onset, times, side="right") - 1]
    bold = scipy.signal.fftconvolve(neural, hrf(tr))[: len(times)][::steps]
    bold = (bold - bold.mean()) / bold.std()
    return TaskCourse(onset, durations, values, neural[::steps], bold)


def network_courses(
    spec: CohortSpec, subject: int, run: int, tr: float, matrix: np.ndarray
) -> tuple[np.ndarray, TaskCourse]:
    """(T, K) float64 BOLD courses of the networks in one run, and the task that drives one of them."""
    task = task_course(stream(spec.seed, "task", subject, run), spec.frames, tr)
    courses = sources(stream(spec.seed, "courses", subject, run), spec.networks, spec.frames, tr) @ matrix.T
    courses[:, DRIVEN] += spec.frame_r * task.valence_bold
    return courses, task

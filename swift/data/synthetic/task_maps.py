"""Planted maps of a synthetic cohort: as a task's activation would be, with a known part that rest can tell.

Map of a subject = group map + planted part + own measurement noise. The planted part of
  coupling   follows the couplings (Fisher z) of the two planted pairs of networks: two patterns times two numbers,
             which the connectome holds, so that a linear model on connectomes is the best there can be;
  amplitude  follows the logarithm of the two planted amplitudes in the same way;
  unrelated, unrelated2, ...  has the same form with numbers that nothing in the scans knows: identification must stay
             at chance. Several draws, as the numbers of few subjects go with the planted ones by accident.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np

from swift.data.synthetic import maps as space
from swift.data.synthetic.labels import Person, person
from swift.data.synthetic.spec import CohortSpec, stream
from swift.utils.errors import UserError

UNRELATED = ("unrelated", "unrelated2", "unrelated3", "unrelated4")
CONTRASTS = ("coupling", "amplitude", *UNRELATED)
PLANTED = 0.7
"""Standard deviation of each planted pattern over subjects, that of the group map being 1."""
NOISE = 0.5
"""Standard deviation of the measurement noise, smooth in space; another one in the retest."""
SMOOTH = 0.15
"""Width of the noise, head coordinates."""


def numbers(spec: CohortSpec, who: Person, contrast: str) -> np.ndarray:
    """(2,) standardized numbers that a subject's map follows."""
    if contrast in UNRELATED:
        draw = UNRELATED.index(contrast)
        key = (who.index, draw) if draw else (who.index,)
        return stream(spec.seed, "task_map_null", *key).standard_normal(2)
    return np.array([who.latent_binary, who.latent_continuous])


@lru_cache(maxsize=6)
def patterns(spec: CohortSpec, contrast: str) -> np.ndarray:
    """(3, X, Y, Z) float32: the group map, and the two patterns of the planted part; unit variance in the brain.

    Coupling and unrelated: the networks of each planted pair; amplitude: the planted region and its network.
    """
    shared = space.geometry(spec)
    pairs = (space.PAIR_BINARY, space.PAIR_CONTINUOUS)
    if contrast == "amplitude":
        pairs = ((space.AMPLITUDE_BINARY, space.DRIVEN), (space.AMPLITUDE_CONTINUOUS, space.DRIVEN))
    own = [shared.maps[a] - shared.maps[b] for a, b in pairs]
    group = space.smooth_fields(stream(spec.seed, "task_map", CONTRASTS.index(contrast)), 1, shared.axes, 0.3)
    found = np.stack([group[0], *own])
    inside = found[:, shared.mask]
    return (found - inside.mean(1)[:, None, None, None]) / inside.std(1)[:, None, None, None]


def subject_map(spec: CohortSpec, subject: int, contrast: str, repeat: int = 0) -> np.ndarray:
    """(X, Y, Z) float32 map of a subject; NaN outside its brain.

    Args:
        spec: Cohort.
        subject: From 0.
        contrast: Of CONTRASTS.
        repeat: 0, or 1 for the retest: other noise.
    """
    group, *own = patterns(spec, contrast)
    weights = PLANTED * numbers(spec, person(spec, subject), contrast)
    key = (CONTRASTS.index(contrast), subject, repeat)
    noise = space.smooth_fields(stream(spec.seed, "task_map_noise", *key), 1, space.geometry(spec).axes, SMOOTH)[0]
    values = group + weights[0] * own[0] + weights[1] * own[1] + NOISE * noise
    brain, _ = space.subject_anatomy(spec, subject)
    return np.asarray(np.where(brain, values, np.nan), np.float32)


def write_task_maps(spec: CohortSpec, folder: Path | str) -> Path:
    """Write maps/SUBJECT_space-S_contrast-C_map.nii.gz of all subjects into a folder, and retest/ likewise.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    affine = space.geometry(spec).affine
    try:
        for repeat, name in enumerate(("maps", "retest")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for subject in range(spec.n_subjects):
                who = person(spec, subject)
                for contrast in CONTRASTS:
                    image = nib.Nifti1Image(subject_map(spec, subject, contrast, repeat), affine)
                    image.set_sform(affine, code=4)
                    image.set_qform(affine, code=4)
                    file = f"sub-{who.subject}_space-{space.SPACE}_contrast-{contrast}_map.nii.gz"
                    nib.save(image, folder / name / file)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder

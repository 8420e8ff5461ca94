"""What a synthetic cohort is made of: its size, its acquisition and the chosen sizes of its planted effects."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from swift.utils.errors import UserError

MIN_NETWORKS = 8
"""Networks 0 to 6 carry planted effects; at least one carries none, as a control."""

BASELINE = 10000.0
"""Intensity of grey matter, before gain and bias field; int16 then resolves 0.01 %."""

RECIPE = 1
"""Raised when the generator changes: a cohort of an older recipe is another cohort, whatever its spec."""

# One number a random stream.
# Each part of a scan draws from its own, so that switching one part leaves the others as they are.
STREAMS = {
    name: number
    for number, name in enumerate(
        [
            "maps",
            "anatomy",
            "covariance",
            "site",
            "labels",
            "null",
            "demographics",
            "latents",
            "subject_maps",
            "subject_anatomy",
            "courses",
            "task",
            "white",
            "smooth",
            "drift",
            "motion",
            "sites_order",
            "task_map",
            "task_map_null",
            "task_map_noise",
        ]
    )
}


@dataclass(frozen=True)
class CohortSpec:
    """A cohort. Equal specs give equal data, bit for bit on one machine; subject i never depends on `n_subjects`.

    Sizes of noise, drift and network signal are in percent of the voxel's mean.
    """

    n_subjects: int = 20
    runs: int = 1
    frames: int = 120
    tr: float = 2.0
    """Seconds."""
    grid: tuple[int, int, int] = (48, 48, 48)
    spacing: float = 4.0
    """Isotropic voxel size, mm. A field of view that is smaller than a head shrinks the head."""
    seed: int = 0
    task: str = "rest"

    networks: int = 12
    binary_auroc: float = 0.9
    """AUROC of the true latent for label_binary, in [0.5, 1)."""
    continuous_r: float = 0.6
    """Pearson r of the true latent with label_continuous, in [0, 1]."""
    frame_r: float = 0.5
    """Pearson r over frames of the driven network's true time course with the convolved valence, in [0, 1]."""
    coupling_gain: float = 0.35
    """Change of the planted pair's coupling (Fisher z) by one unit of the latent."""
    amplitude_gain: float = 0.35
    """Change of the planted region's log amplitude by one unit of the latent."""

    signal: float = 1.0
    """Standard deviation of a network at the peak of its map, %."""
    noise_white: float = 1.0
    noise_smooth: float = 0.8
    """Spatially smooth, AR(1) in time (0.3 a frame at a TR of 2 s)."""
    smoothness: float = 6.0
    """FWHM of the Gaussian kernel behind the smooth noise, mm (never below 1.4 voxels)."""
    drift: float = 1.0
    """Standard deviation of the scanner drift, %; 0: none."""
    motion: float = 1.0
    """Size of movements relative to a usual cohort (steps of 0.5-2 mm in 2 % of the frames); 0: none."""
    sites: int = 3
    site_effect: float = 1.0
    """Size of the sites' differences in gain, noise and bias field; 0: none."""
    site_tr: tuple[float, ...] | None = None
    """TR of each site, s; None: `tr` everywhere."""
    symmetry: float = 0.7
    """Weight of the left/right symmetric part of the network maps, in [0, 1]."""
    map_variability: float = 0.4
    """Size of a subject's own part of the network maps relative to the group's."""

    def __post_init__(self) -> None:
        """Normalizes sequences and refuses values without a meaning.

        Raises:
            UserError: a value outside its legal range, named.

        """
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        if self.site_tr is not None:
            object.__setattr__(self, "site_tr", tuple(float(t) for t in self.site_tr))
        _check(self)

    def tr_of(self, site: int) -> float:
        """Repetition time of a site, s."""
        return self.tr if self.site_tr is None else self.site_tr[site]

    def with_(self, **changes: Any) -> CohortSpec:
        """The same spec with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """All fields and the recipe as JSON; `from_json` reads it back."""
        return json.dumps({"recipe": RECIPE, **asdict(self)}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CohortSpec:
        """Reads what `to_json` wrote.

        Raises:
            UserError: another recipe, or unknown fields (written by another version).

        """
        values = json.loads(text)
        recipe = values.pop("recipe", None)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown or recipe != RECIPE:
            raise UserError(
                f"synthetic cohort: recipe {recipe}, unknown fields {unknown}; this version makes recipe {RECIPE}"
            )
        return cls(**values)


def _check(spec: CohortSpec) -> None:
    """Raises UserError for the first value outside its range."""

    def need(name: str, good: bool, legal: str) -> None:
        if not good:
            raise UserError(f"synthetic cohort: {name}={getattr(spec, name)!r}, must be {legal}")

    for f in fields(spec):
        value = getattr(spec, f.name)
        if isinstance(value, float):
            need(f.name, math.isfinite(value), "finite")
    need("n_subjects", spec.n_subjects >= 1, "at least 1")
    need("runs", spec.runs >= 1, "at least 1")
    need("frames", spec.frames >= 8, "at least 8")
    need("tr", 0.1 <= spec.tr <= 20, "0.1 to 20 seconds")
    need(
        "grid",
        len(spec.grid) == 3 and min(spec.grid) >= 8,
        "three sizes of at least 8 voxels",
    )
    need("spacing", spec.spacing > 0, "above 0 mm")
    need("seed", spec.seed >= 0, "0 or more")
    need("task", spec.task.isalnum(), "letters and digits only (BIDS)")
    need("networks", spec.networks >= MIN_NETWORKS, f"at least {MIN_NETWORKS}")
    need("binary_auroc", 0.5 <= spec.binary_auroc < 1, "in [0.5, 1)")
    need("sites", spec.sites >= 1, "at least 1")
    for name in ("continuous_r", "frame_r", "symmetry"):
        need(name, 0 <= getattr(spec, name) <= 1, "in [0, 1]")
    for name in (
        "signal",
        "noise_white",
        "noise_smooth",
        "smoothness",
        "drift",
        "motion",
        "site_effect",
    ):
        need(name, getattr(spec, name) >= 0, "0 or more")
    need("map_variability", spec.map_variability >= 0, "0 or more")
    if spec.site_tr is not None:
        need(
            "site_tr",
            len(spec.site_tr) == spec.sites,
            f"one TR for each of the {spec.sites} sites",
        )
        need("site_tr", all(0.1 <= t <= 20 for t in spec.site_tr), "0.1 to 20 seconds")


def stream(seed: int, name: str, *key: int) -> np.random.Generator:
    """The random generator of one part of one cohort, site, subject or run.

    Args:
        seed: seed of the cohort.
        name: a key of STREAMS.
        key: site, subject or (subject, run); nothing for a part the whole cohort shares.

    """
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[name], *key))
    return np.random.Generator(np.random.PCG64(sequence))

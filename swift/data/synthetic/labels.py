"""People: who is in the cohort, their labels, and the latents that carry the effects into the scans."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import norm

from swift.data.synthetic.spec import CohortSpec, stream

LABELS = ("label_binary", "label_continuous", "label_null")


@dataclass(frozen=True)
class Person:
    """One subject as the demographics table and the truth know them."""

    subject: str
    """BIDS label without `sub-`."""
    index: int
    age: float
    """Years, 18 to 85. Age, sex and site are drawn independently of every label."""
    sex: str
    """F or M."""
    site: str
    site_index: int
    label_binary: int
    """0 or 1, equally many."""
    label_continuous: float
    """Mean 100, standard deviation 15."""
    label_null: int
    """0 or 1, equally many; without any effect on the scan."""
    latent_binary: float
    """What the scan carries of label_binary: normal with unit variance, means d' apart."""
    latent_continuous: float
    """What the scan carries of label_continuous: standard normal."""


def dprime(auroc: float) -> float:
    """Distance of two unit normals whose AUROC is `auroc`: sqrt(2) * Phi^-1(auroc)."""
    return float(np.sqrt(2) * norm.ppf(auroc))


def _shuffled(seed: int, name: str, subject: int, size: int, *key: int) -> int:
    """A number below `size`, each once in every `size` subjects in a row: balanced, yet independent of n_subjects."""
    block, place = divmod(subject, size)
    return int(stream(seed, name, *key, block).permutation(size)[place])


def person(spec: CohortSpec, subject: int) -> Person:
    """Subject `subject` (from 0) of a cohort; the same whatever the cohort's size."""
    site = _shuffled(spec.seed, "sites_order", subject, spec.sites)
    binary = _shuffled(spec.seed, "labels", subject, 2)
    null = _shuffled(spec.seed, "null", subject, 2)
    who = stream(spec.seed, "demographics", subject)
    age, sex = round(float(who.uniform(18, 85)), 1), "FM"[int(who.integers(2))]
    own, latent_continuous, rest = stream(spec.seed, "latents", subject).standard_normal(3)
    score = spec.continuous_r * latent_continuous + np.sqrt(1 - spec.continuous_r**2) * rest
    return Person(
        subject=f"{subject + 1:04d}",
        index=subject,
        age=age,
        sex=sex,
        site=f"site{site + 1}",
        site_index=site,
        label_binary=binary,
        label_continuous=float(round(100 + 15 * score, 4)),
        label_null=null,
        latent_binary=float(own + (binary - 0.5) * dprime(spec.binary_auroc)),
        latent_continuous=float(latent_continuous),
    )


def cohort_table(spec: CohortSpec) -> list[dict[str, object]]:
    """One row a subject with demographics, labels and latents, without making any scan."""
    return [asdict(person(spec, i)) for i in range(spec.n_subjects)]


def phenotypes(who: Person) -> dict[str, object]:
    """What a study would know of a subject: demographics and labels, never latents."""
    row = asdict(who)
    return {key: row[key] for key in ("age", "sex", "site", *LABELS)}

"""Whether embeddings know a person again: identification of scans, and the reliability of every feature.

Legend: N scans, E features, n subjects with at least two scans, k scans of a subject.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swift.evaluate.predictions import finite
from swift.evaluate.resampling import wilson
from swift.utils.errors import UserError


def repeated(subjects: np.ndarray) -> np.ndarray:
    """(N,) bool: scans of subjects that have at least two.

    Raises:
        UserError: fewer than two subjects have.
    """
    names, place, count = np.unique(subjects, return_inverse=True, return_counts=True)
    several = int((count > 1).sum())
    if several < 2:
        raise UserError(
            f"--fingerprint: {several} of {len(names)} subjects have two scans or more; it needs at least 2"
        )
    return np.asarray(count[place] > 1)


def identified(features: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """(N,) bool: the most similar other scan is of the same subject.

    Similarity is Pearson's correlation of the features, as for connectomes (Finn et al. 2015, doi 10.1038/nn.4135).

    Args:
        features: (N, E), each standardized over the scans first: else features of large size decide alone.
        subjects: (N,).
    """
    spread = features.std(axis=0)
    z = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    z = z - z.mean(axis=1, keepdims=True)
    size = np.linalg.norm(z, axis=1, keepdims=True)
    z = z / np.where(size > 0, size, 1)
    similar = z @ z.T
    np.fill_diagonal(similar, -np.inf)
    return np.asarray(subjects[similar.argmax(axis=1)] == subjects)


def icc(features: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """(E,) ICC(1), one-way random, of single scans (Shrout and Fleiss 1979, doi 10.1037/0033-2909.86.2.420).

    (MSB - MSW) / (MSB + (k0 - 1) MSW); subjects may have different numbers of scans, k0 is then their effective number.
    NaN for a feature without any spread.
    """
    _, place, count = np.unique(subjects, return_inverse=True, return_counts=True)
    total, people = len(subjects), len(count)
    sums = np.zeros((people, features.shape[1]))
    np.add.at(sums, place, features)
    means = sums / count[:, None]
    between = (count[:, None] * (means - features.mean(axis=0)) ** 2).sum(axis=0) / (people - 1)
    within = ((features - means[place]) ** 2).sum(axis=0) / (total - people)
    effective = (total - (count**2).sum() / total) / (people - 1)
    below = between + (effective - 1) * within
    return np.divide(between - within, below, out=np.full(len(below), np.nan), where=below > 0)


def fingerprint(features: np.ndarray, subjects: np.ndarray) -> dict[str, Any]:
    """Re-identification and test-retest reliability, JSON-ready.

    Args:
        features: (N, E), a row a scan.
        subjects: (N,) names.

    Returns:
        scans, subjects (of those with two scans or more), left_out (scans of the others), identified (share of scans),
        chance, subjects_identified (share of subjects all of whose scans are) with its interval (Wilson), icc {median,
        quartiles}.

    Raises:
        UserError: fewer than two subjects have two scans.
    """
    kept = repeated(subjects)
    values, names = np.asarray(features[kept], np.float64), subjects[kept]
    hit = identified(values, names)
    people, place = np.unique(names, return_inverse=True)
    whole = np.array([hit[place == number].all() for number in range(len(people))])
    same = np.array([(place == number).sum() - 1 for number in place])
    first, middle, third = np.nanquantile(icc(values, names), [0.25, 0.5, 0.75])
    low, high = wilson(int(whole.sum()), len(people))
    return {
        "scans": len(names),
        "subjects": len(people),
        "left_out": int((~kept).sum()),
        "identified": float(hit.mean()),
        "chance": float((same / (len(names) - 1)).mean()),
        "subjects_identified": float(whole.mean()),
        "interval": [low, high],
        "icc": {"median": finite(float(middle)), "quartiles": [finite(float(first)), finite(float(third))]},
    }


def text(found: dict[str, Any], layer: str) -> str:
    """One line for people."""
    low, high = found["interval"]
    first, third = found["icc"]["quartiles"]
    return (
        f"{layer}: {100 * found['identified']:.0f} % of {found['scans']} scans identified (chance "
        f"{100 * found['chance']:.1f} %), all of {100 * found['subjects_identified']:.0f} % of {found['subjects']} "
        f"subjects (95 % {100 * low:.0f} to {100 * high:.0f}); test-retest ICC median {found['icc']['median']:.2f}, "
        f"quartiles {first:.2f} to {third:.2f}"
    )

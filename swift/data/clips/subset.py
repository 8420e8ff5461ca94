"""A part of the training data, for studies of subjects against frames: so many subjects, so many frames.

Subjects have one fixed order that only their names and a seed decide, so the first 20 are among the first 50, also when
the store grows. Frames are dealt evenly: every subject gives its first L frames, L as large as the budget allows, so of
the same subjects a smaller budget takes a part of what a larger one takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from swift.data.clips.index import ClipIndex
from swift.utils.errors import UserError


def ranking(subjects: Iterable[str], seed: int) -> list[str]:
    """Subjects in the order in which a budget takes them."""
    return sorted(set(subjects), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())


def level(frames: Sequence[int], total: int) -> int:
    """The largest L with sum of min(frames_i, L) at most `total`."""
    left = total
    ordered = sorted(frames)
    for place, own in enumerate(ordered):
        share = left // (len(ordered) - place)
        if share < own:
            return share
        left -= own
    return ordered[-1]


def spend(
    index: ClipIndex, subjects: Sequence[str], max_subjects: int | None, max_frames: int | None, seed: int
) -> ClipIndex:
    """The clips that a budget leaves of the training clips.

    Args:
        index: Training clips.
        subjects: Subject of every scan (`index.scan` are places in it). One name is one subject, in all cohorts.
        max_subjects: Subjects to keep; None: all.
        max_frames: Frames to keep in all; None: all.
        seed: Of the order of subjects.

    Raises:
        UserError: more asked for than there is, or so few frames that no subject has a clip.
    """
    if max_subjects is None and max_frames is None:
        return index
    owner = [subjects[scan] for scan in index.scan.tolist()]
    names = ranking(owner, seed)
    if max_subjects is not None:
        if not 1 <= max_subjects <= len(names):
            raise UserError(f"data.max_subjects={max_subjects}: there are 1 to {len(names)} subjects to train on")
        names = names[:max_subjects]
    have = dict.fromkeys(names, 0)
    for name, length in zip(owner, index.length.tolist(), strict=True):
        if name in have:
            have[name] += length
    left = have
    if max_frames is not None:
        whole = sum(have.values())
        if not 1 <= max_frames <= whole:
            raise UserError(f"data.max_frames={max_frames}: these {len(names)} subjects have 1 to {whole} frames")
        most = level(list(have.values()), max_frames)
        if most < index.span:
            raise UserError(
                f"data.max_frames={max_frames} are {most} for each of {len(names)} subjects, and a clip spans "
                f"{index.span}: raise it, or lower data.max_subjects"
            )
        left = {name: min(frames, most) for name, frames in have.items()}
    return _take(index, owner, dict(left))


def _take(index: ClipIndex, owner: list[str], left: dict[str, int]) -> ClipIndex:
    """The first frames of every subject, scan by scan; an end that is too short for a clip is dropped."""
    length = np.zeros(len(owner), np.int64)
    for place, name in enumerate(owner):
        length[place] = min(int(index.length[place]), left.get(name, 0))
        if name in left:
            left[name] -= int(length[place])
    keep = length >= index.span
    return ClipIndex(
        index.scan[keep].tolist(), index.first[keep].tolist(), length[keep].tolist(), index.span, index.stride
    )

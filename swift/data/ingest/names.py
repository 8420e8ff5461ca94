"""File names as BIDS writes them: `sub-01_task-rest_desc-preproc_bold` is entities (key-label) and a suffix.

https://bids-specification.readthedocs.io (file names, entities, derivatives). Read here by hand: bids2table 2.3, the
kept library for this, was measured on 10,000 subjects: names alone take it 15 s of CPU time, the whole search here
takes 6 s. It does not see subjects with a hyphen, JSON files or anything above the subjects' folders, and turns run-01
into 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from swift.data.ingest.nifti import SUFFIXES, strip_suffix

RUN = ("sub", "ses", "sample", "task", "tracksys", "acq", "ce", "trc", "rec", "dir", "run", "mod", "echo", "flip",
       "inv", "mt", "part", "proc", "split", "recording", "chunk")  # fmt: skip
"""Entities that tell runs apart. All others (space, res, den, cohort, desc, reg, ...) say how one was processed."""
INDEX = ("run", "echo", "flip", "inv", "split", "res", "den")
"""Entities whose label is a number, or may be: 01 and 1 are one."""
_OLD = {"preproc": ("bold", "preproc"), "brainmask": ("mask", "brain"), "confounds": ("timeseries", "confounds")}
"""fMRIPrep before 1.2 wrote *_bold_space-X_preproc, *_bold_space-X_brainmask and *_bold_confounds."""


@dataclass(frozen=True)
class Name:
    """A BIDS file name taken apart."""

    entities: dict[str, str]
    suffix: str
    """`bold`, `mask`, `T1w`, ...; what follows the last underscore."""
    words: tuple[str, ...] = ()
    """Parts that are neither a pair nor the suffix: a name that has some is none of BIDS."""

    @cached_property
    def run_entities(self) -> dict[str, str]:
        """Entities that tell runs apart, in the order of the name."""
        return {key: value for key, value in self.entities.items() if key in RUN}

    @cached_property
    def parts(self) -> frozenset[tuple[str, str]]:
        """Entities as a set of (key, label), numbers without leading zeros."""
        return frozenset((key, plain(key, value)) for key, value in self.entities.items())


def plain(key: str, label: str) -> str:
    """A label as it is compared: run-01 and run-1 are one run."""
    return label.lstrip("0") or "0" if key in INDEX and label.isdigit() else label


def parse_name(path: Path | str) -> Name:
    """sub-01_task-rest_space-MNI_desc-preproc_bold.nii.gz -> its entities and its suffix (bold).

    A label may hold hyphens (sub-MGH-001), though BIDS forbids it: cohorts have them.
    """
    text = strip_suffix(path) if isinstance(path, Path) else path
    text = text.removesuffix(".json").removesuffix(".tsv").removesuffix(".dtseries").removesuffix(".ptseries")
    *parts, suffix = text.split("_")
    entities: dict[str, str] = {}
    words = []
    for part in parts:
        key, mark, label = part.partition("-")
        if mark and label and key.isalnum():
            entities[key] = label
        else:
            words.append(part)
    if "bold" in words and suffix in _OLD:
        suffix, entities["desc"] = _OLD[suffix]
        words.remove("bold")
    return Name(entities, suffix, tuple(words))


def is_nifti(path: Path) -> bool:
    """By its name."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def is_surface(path: Path) -> bool:
    """CIFTI or GIFTI by its name: values on a surface or on grayordinates, no volume."""
    return path.name.endswith((".dtseries.nii", ".ptseries.nii", ".dscalar.nii", ".dlabel.nii", ".pscalar.nii", ".gii"))


def legal_name(text: str) -> str:
    """A scan_id from any text: letters, digits and _ . + - stay, the rest becomes a dash; "" where nothing is left."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip(".+-")[:200]


FRAME = re.compile(r"frame_(\d+)\.pt")
"""A frame of a SwiFT v1 folder."""

"""One scan that is to be read, what was found and what was not taken, and which scans a user chose.

`swift.data.ingest.bids` finds them. Nothing here opens a scan.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from swift.data.ingest.names import legal_name, plain
from swift.utils.errors import UserError

FIELDS = ("scan_id", "subject", "session", "task", "run", "site")
RESERVED = ("shard", "frames", "voxels", "tr")
LAYOUTS = ("auto", "bids", "folder", "table", "frames")


@dataclass(frozen=True)
class Source:
    """One scan to be read. Paths are as found; empty texts mean "not known"."""

    scan_id: str
    path: Path
    """A NIfTI file, or a SwiFT v1 folder of frame_*.pt."""
    subject: str
    session: str = ""
    task: str = ""
    run: str = ""
    site: str = ""
    mask: Path | None = None
    sidecars: tuple[Path, ...] = ()
    """JSON files with RepetitionTime and the like; each key counts from the last one that has it."""
    confounds: Path | None = None
    events: Path | None = None
    """Tab-separated, with onset and duration in seconds (BIDS)."""
    tr: float | None = None
    """Seconds; of the table, wins over header and sidecar."""
    space: str | None = None
    """Template or space that the scan lies in (BIDS entity space-, such as MNI152NLin2009cAsym); None: not known."""
    tool: str | None = None
    """Name of the program that made the files, where it is known."""
    start_time: float | None = None
    """Seconds from the start of the run to the time that frame 0 stands for, of the table; None: the sidecars say."""
    phenotypes: dict[str, str] = field(default_factory=dict)
    entities: dict[str, str] = field(default_factory=dict)
    """BIDS entities, by which scans are chosen."""
    dataset: Path | None = None
    """The data set or folder that it was found in: a subject's label counts within one."""
    notes: tuple[str, ...] = ()
    """What was assumed in finding it."""
    problem: str = ""
    """Why it cannot be read, where that is known already; "": it can."""

    @property
    def is_frames(self) -> bool:
        """A SwiFT v1 folder."""
        return self.path.is_dir()


@dataclass(frozen=True)
class Choice:
    """Which scans are meant, as options say it."""

    layout: str = "auto"
    """auto | bids | folder | table | frames."""
    entities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """BIDS entity -> labels that are taken; the label "" means that the entity is not named."""
    participants: Path | None = None
    """participants.tsv, when it does not lie in the data set."""
    prefix: str = ""
    """Put before every subject and scan, so that sub-01 of two data sets are two."""

    def labels(self, key: str) -> tuple[str, ...]:
        """Labels chosen for one entity; none: any."""
        return tuple(self.entities.get(key, ()))


@dataclass
class Found:
    """What there is in the named places."""

    sources: list[Source] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    """One line a place: what it was taken for."""
    passed: dict[str, list[Path]] = field(default_factory=dict)
    """Files that are no scan of their own, by reason."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, and what should be known: one sentence each."""

    def pass_over(self, reason: str, path: Path) -> None:
        """Keep a file that is not taken, with why."""
        self.passed.setdefault(reason, []).append(path)

    def told(self) -> list[str]:
        """`passed` as sentences."""
        return [
            f"{len(paths)} not taken: {reason} ({', '.join(path.name for path in paths[:2])}"
            + (", ...)" if len(paths) > 2 else ")")
            for reason, paths in sorted(self.passed.items())
        ]


def scan_name(text: str) -> str:
    """A scan_id from any text.

    Raises:
        UserError: nothing legal is left of it.
    """
    name = legal_name(text)
    if not name:
        raise UserError(f"no scan name can be made from {text!r}; use letters or digits")
    return name


def phenotypes(columns: dict[str, str]) -> dict[str, str]:
    """Columns kept as they are; one named like a column of the manifest gets the prefix `given_`."""
    taken = (*FIELDS, *RESERVED)
    return {f"given_{name}" if name in taken else name: value for name, value in columns.items() if name}


def duplicates(sources: Iterable[Source]) -> dict[str, list[Source]]:
    """Names that more than one source has, with those sources."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.scan_id, []).append(source)
    return {name: group for name, group in groups.items() if len(group) > 1}


def why_twice(same: list[Source]) -> str:
    """One sentence on sources of one name: which files, and the option that tells them apart."""
    files = " and ".join(str(one.path) for one in same)
    keys = dict.fromkeys(key for one in same for key in one.entities)
    hints = []
    for key in keys:
        labels = sorted({one.entities.get(key, "") for one in same})
        if len(labels) > 1:
            option = f"--{key}" if key in OPTIONS else f"--entity {key}="
            hints.append(f"{option} ({', '.join(label or 'none' for label in labels)})")
    if hints:
        hint = f"; choose one with {' or '.join(hints)}"
    elif len({one.dataset for one in same}) > 1:
        hint = "; if these are two people, ingest one data set with --prefix"
    else:
        hint = ""
    return f"{len(same)} runs have the name {same[0].scan_id}: {files}{hint}"


OPTIONS = ("space", "task", "res", "desc", "ses", "acq", "ce", "rec", "dir", "run", "echo", "den", "cohort")
"""Entities with an option of their own; `--entity KEY=LABEL` takes any."""


def parse_choice(pairs: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Entities as typed -> as they are compared; `--space X:res-2` is space X and res 2, as fMRIPrep writes it."""
    found: dict[str, list[str]] = {}
    for key, labels in pairs.items():
        for label in labels:
            first, *more = label.split(":") if key == "space" else [label]
            found.setdefault(key, []).append(first.removeprefix(f"{key}-"))
            for part in more:
                name, mark, value = part.partition("-")
                if not mark or not value:
                    raise UserError(f"--{key} {label!r}: write it as SPACE:res-2 or SPACE:cohort-1")
                found.setdefault(name, []).append(value)
    return {key: tuple(dict.fromkeys(labels)) for key, labels in found.items()}


def choose(sources: list[Source], choice: Choice, where: str) -> list[Source]:
    """The sources that an entity filter lets through; desc is left to the finder of BIDS.

    Raises:
        UserError: nothing is left, or no scan names the entity at all, so that the option would do nothing.
    """
    # A folder that cannot be read names no entity: it is never chosen away.
    unread = [source for source in sources if source.problem and not source.entities]
    sources = [source for source in sources if not (source.problem and not source.entities)]
    for key, labels in choice.entities.items():
        option = f"--{key}" if key in OPTIONS else f"--entity {key}="
        there = sorted({source.entities.get(key, "") for source in sources})
        if sources and there == [""] and "" not in labels:
            raise UserError(f"{option} {' '.join(labels)}: no scan of {where} names its {key}, so there is no choice")
        wanted = {plain(key, label) for label in labels}
        kept = [source for source in sources if plain(key, source.entities.get(key, "")) in wanted]
        if sources and not kept:
            listed = ", ".join(label or f"(no {key})" for label in there)
            raise UserError(f"{option} {' '.join(labels)}: no scan of {where}; there are {listed}")
        sources = kept
    return [*sources, *unread]


# ----------------------------------------------------------------------------------------------- whose scan is it
def subject_label(path: Path) -> tuple[str, str]:
    """The label of `sub-LABEL` in a file's name, and of the nearest folder of that name; "" where there is none."""
    match = re.match(r"(?:.*_)?(sub-[A-Za-z0-9][A-Za-z0-9+.-]*?)(?:_|\.nii|$)", path.name)
    return match.group(1) if match else "", _folder_label(str(path.parent))


@lru_cache(maxsize=1024)
def _folder_label(folder: str) -> str:
    parts = os.path.abspath(folder).split(os.sep)
    return next((part for part in reversed(parts) if re.fullmatch(r"sub-[^_]+", part)), "")


def one_file_once(sources: list[Source]) -> tuple[list[Source], list[str]]:
    """Sources without those that are a second name of a file (link, hard link), and what is to be said of them."""
    first: dict[tuple[int, int], int] = {}
    kept: list[Source] = []
    same, people = [], []
    for source in sorted(sources, key=lambda one: one.path.is_symlink()):
        try:
            stat = source.path.stat()
        except OSError:
            kept.append(source)
            continue
        place = first.setdefault((stat.st_dev, stat.st_ino), len(kept))
        if place == len(kept):
            kept.append(source)
            continue
        other = kept[place]
        same.append(f"{source.path} is {other.path}")
        if other.subject != source.subject:
            people.append(f"{other.subject} and {source.subject}")
            note = f"the same file is also found as {source.path}: taken once, for {other.subject}"
            kept[place] = replace(other, notes=(*other.notes, note))
    notes = []
    if same:
        notes.append(f"{len(same)} files are another name of one that is taken: taken once ({_some(same)})")
    if people:
        notes.append(f"one file under the names of two subjects ({_some(people)}): whose it is, is a guess")
    order = {source.path: place for place, source in enumerate(sources)}
    return sorted(kept, key=lambda one: order[one.path]), notes


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")

"""fMRIPrep derivatives in BIDS layout: scans, their masks, sidecars, confounds and participants.

https://bids-specification.readthedocs.io (file names, inheritance principle, derivatives).
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from swift.data.ingest.nifti import SUFFIXES, strip_suffix
from swift.data.ingest.sources import (
    Source,
    find_folder,
    find_frames,
    find_table,
    is_nifti,
    legal_name,
    one_file,
    phenotypes,
)
from swift.utils.errors import UserError

LAYOUTS = ("auto", "bids", "folder", "table", "frames")
_NOT_A_NAME = ("space", "res", "den", "desc", "label", "cohort")
"""Entities that say how a run was processed, not which run it is."""
_PAIR = re.compile(r"([A-Za-z]+)-([A-Za-z0-9+]+)")


@dataclass(frozen=True)
class Name:
    """A BIDS file name taken apart."""

    entities: dict[str, str]
    suffix: str

    @property
    def run_entities(self) -> dict[str, str]:
        """Entities that tell runs apart."""
        return {key: value for key, value in self.entities.items() if key not in _NOT_A_NAME}


def parse_name(path: Path) -> Name:
    """sub-01_task-rest_space-MNI_desc-preproc_bold.nii.gz -> its entities and its suffix (bold)."""
    stem = strip_suffix(path)
    *pairs, suffix = stem.split("_")
    entities = {}
    for pair in pairs:
        if match := _PAIR.fullmatch(pair):
            entities[match.group(1)] = match.group(2)
    return Name(entities, suffix)


def find_sources(
    inputs: list[Path],
    *,
    layout: str = "auto",
    space: str | None = None,
    task: str | None = None,
    participants: Path | None = None,
) -> list[Source]:
    """All scans in the given places.

    Args:
        inputs: Folders (BIDS derivatives, any NIfTI, SwiFT v1 frames), NIfTI files, CSV or TSV tables.
        layout: auto | bids | folder | table | frames.
        space: Only this space entity (BIDS).
        task: Only this task entity (BIDS).
        participants: participants.tsv, when it does not lie in the dataset.

    Returns:
        Sources in a stable order; the same name may come twice (the caller refuses those).

    Raises:
        UserError: a place does not exist or holds no scan.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout!r}: legal are {', '.join(LAYOUTS)}")
    found: list[Source] = []
    for place in inputs:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
        kind = _guess(place) if layout == "auto" else layout
        if kind == "bids":
            some = find_bids(place, space=space, task=task, participants=participants)
        elif kind == "frames":
            some = find_frames(place)
        elif kind == "table":
            some = find_table(place)
        else:
            some = find_folder(place) if place.is_dir() else [one_file(place)]
        if not some:
            hint = "no *_desc-preproc_bold.nii.gz; --layout folder takes any NIfTI" if kind == "bids" else "no scan"
            chosen = "".join(f", {key} {value}" for key, value in (("space", space), ("task", task)) if value)
            raise UserError(f"{place}: {hint} (layout {kind}{chosen})")
        found += some
    return found


def _guess(place: Path) -> str:
    if place.is_file():
        if is_nifti(place):
            return "folder"
        if place.suffix in (".csv", ".tsv"):
            return "table"
        raise UserError(f"{place}: neither a NIfTI file ({', '.join(SUFFIXES)}) nor a table (.csv, .tsv)")
    if any(place.rglob("frame_*.pt")):
        return "frames"
    if (place / "dataset_description.json").is_file() or any(place.rglob("*_desc-preproc_bold.nii*")):
        return "bids"
    return "folder"


def find_bids(
    root: Path, *, space: str | None = None, task: str | None = None, participants: Path | None = None
) -> list[Source]:
    """Every *_desc-preproc_bold.nii(.gz) below a dataset, with what belongs to it.

    A mask, sidecar or table of confounds further up in the tree counts too when its entities are a part of the run's
    (inheritance principle).
    """
    people = read_participants(participants or _participants_file(root))
    found = []
    for path in sorted(root.rglob("*_desc-preproc_bold.nii*")):
        name = parse_name(path)
        wanted = space in (None, name.entities.get("space")) and task in (None, name.entities.get("task"))
        if wanted and is_nifti(path) and path.is_file():
            found.append(_source(root, path, name, people))
    return found


def _source(root: Path, path: Path, name: Name, people: dict[str, dict[str, str]]) -> Source:
    run = name.run_entities
    subject = f"sub-{run['sub']}" if "sub" in run else legal_name(strip_suffix(path))
    person = dict(people.get(subject, {}))
    return Source(
        scan_id=legal_name("_".join(f"{key}-{value}" for key, value in run.items()) or strip_suffix(path)),
        path=path,
        subject=subject,
        session=run.get("ses", ""),
        task=run.get("task", ""),
        run=run.get("run", ""),
        site=person.pop("site", person.pop("site_id", "")),
        mask=_inherited(root, path, "mask", SUFFIXES, desc="brain"),
        sidecar=_inherited(root, path, "bold", (".json",), desc=None),
        confounds=_inherited(root, path, "timeseries", (".tsv",), desc="confounds")
        or _inherited(root, path, "regressors", (".tsv",), desc="confounds"),
        events=_inherited(root, path, "events", (".tsv",), desc=None),
        phenotypes=phenotypes(person),
        space=name.entities.get("space"),
    )


def _inherited(root: Path, scan: Path, suffix: str, endings: tuple[str, ...], desc: str | None) -> Path | None:
    """The closest file, from the scan's folder up to the dataset's, whose entities are a part of the scan's."""
    mine = parse_name(scan).entities
    for folder in [scan.parent, *scan.parent.parents]:
        best: tuple[int, Path] | None = None
        for path in sorted(folder.glob(f"*{suffix}*")):
            if not path.name.endswith(endings) or not path.is_file():
                continue
            name = parse_name(path)
            theirs = {key: value for key, value in name.entities.items() if key != "desc"}
            if name.suffix != suffix or (desc is not None and name.entities.get("desc") != desc):
                continue
            # A mask of another space would be of another grid; confounds and sidecars need not name one.
            if suffix == "mask" and theirs.get("space") != mine.get("space"):
                continue
            if all(mine.get(key) == value for key, value in theirs.items()) and (best is None or len(theirs) > best[0]):
                best = (len(theirs), path)
        if best is not None:
            return best[1]
        if folder == root:
            break
    return None


def _participants_file(root: Path) -> Path | None:
    """participants.tsv of the dataset, or of the raw dataset that derivatives/<name>/ lies in."""
    raw = [root.parent.parent] if root.resolve().parent.name == "derivatives" else []
    for folder in [root, *raw]:
        if (folder / "participants.tsv").is_file():
            return folder / "participants.tsv"
    return None


def read_participants(path: Path | None) -> dict[str, dict[str, str]]:
    """participants.tsv -> columns of each participant_id, as text.

    Raises:
        UserError: no column participant_id, or one participant twice.
    """
    if path is None:
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, delimiter="," if path.suffix == ".csv" else "\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as a table ({error})") from error
    people: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, start=2):
        person = (row.get("participant_id") or "").strip()
        if not person:
            raise UserError(f"{path}, line {number}: no participant_id")
        if person in people:
            raise UserError(f"{path}, line {number}: a second line for {person}")
        people[person] = {key: value or "" for key, value in row.items() if key and key != "participant_id"}
    return people

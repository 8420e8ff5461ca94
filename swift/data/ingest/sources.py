"""What there is to ingest: a folder or table of NIfTI files, or SwiFT v1 folders of per-frame tensors.

`swift.data.ingest.bids` finds fMRIPrep derivatives. Nothing here opens a scan.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

from swift.data.ingest.nifti import SUFFIXES, strip_suffix
from swift.utils.errors import UserError

MASK_ENDINGS = ("_brainmask", "_desc-brain_mask", "_brain_mask", "_mask")
FRAME = re.compile(r"frame_(\d+)\.pt")
FIELDS = ("scan_id", "subject", "session", "task", "run", "site")
_TABLE_FILES = ("mask", "confounds", "sidecar", "events")
RESERVED = ("shard", "frames", "voxels", "tr")


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
    sidecar: Path | None = None
    """JSON file with RepetitionTime."""
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
    """Seconds from the start of the run to the time that frame 0 stands for (BIDS StartTime); None: not known."""
    phenotypes: dict[str, str] = field(default_factory=dict)

    @property
    def is_frames(self) -> bool:
        """A SwiFT v1 folder."""
        return self.path.is_dir()


def legal_name(text: str) -> str:
    """A scan_id from any text: letters, digits and _ . + - stay, the rest becomes a dash."""
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip(".+-")[:200]
    if not name:
        raise UserError(f"no scan name can be made from {text!r}; use letters or digits")
    return name


def is_nifti(path: Path) -> bool:
    """By its name."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def is_mask_name(path: Path) -> bool:
    """A file that belongs to a scan rather than being one."""
    return strip_suffix(path).lower().endswith("mask")


def mask_beside(scan: Path) -> Path | None:
    """<scan>_brainmask.nii.gz or the like, next to a scan."""
    stem = strip_suffix(scan)
    for ending in MASK_ENDINGS:
        for suffix in reversed(SUFFIXES):
            candidate = scan.with_name(f"{stem}{ending}{suffix}")
            if candidate.is_file():
                return candidate
    return None


def sidecar_beside(scan: Path) -> Path | None:
    """<scan>.json, next to a scan."""
    candidate = scan.with_name(strip_suffix(scan) + ".json")
    return candidate if candidate.is_file() else None


def find_folder(root: Path) -> list[Source]:
    """Every NIfTI file below a folder (masks are paired with their scans); names come from the relative path."""
    files = sorted(path for path in root.rglob("*") if is_nifti(path) and path.is_file() and not is_mask_name(path))
    return [one_file(path, path.relative_to(root)) for path in files]


def one_file(path: Path, relative: Path | None = None) -> Source:
    """A single NIfTI file. The subject is the first folder of the relative path, else the file's own name."""
    relative = relative or Path(path.name)
    parts = [*relative.parts[:-1], strip_suffix(relative)]
    name = legal_name("_".join(parts))
    entity = re.match(r"(?:.*_)?(sub-[A-Za-z0-9]+)(?:_|$)", parts[-1])
    subject = entity.group(1) if entity else legal_name(parts[0])
    space = re.search(r"(?:^|_)space-([A-Za-z0-9+]+)(?:_|$)", parts[-1])
    return Source(
        name,
        path,
        subject,
        mask=mask_beside(path),
        sidecar=sidecar_beside(path),
        space=space.group(1) if space else None,
    )


def find_frames(root: Path) -> list[Source]:
    """SwiFT v1: every folder at or below `root` that holds frame_0.pt, frame_1.pt, ..."""
    folders = {path.parent for path in root.rglob("frame_*.pt") if FRAME.fullmatch(path.name)}
    found = []
    for folder in sorted(folders):
        relative = folder.relative_to(root)
        parts = [part for part in relative.parts if part != "img"] or [folder.name]
        found.append(Source(legal_name("_".join(parts)), folder, legal_name(parts[0])))
    return found


def find_table(path: Path) -> list[Source]:
    """A CSV or TSV file with a column `path`.

    Known columns: scan_id, subject, session, task, run, site, mask, confounds, sidecar, events, tr. Every other one is
    kept as a phenotype. Relative paths count from the table's folder.

    Raises:
        UserError: no such column, or a line without a path or with a TR that is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as a table ({error})") from error
    if not rows or "path" not in rows[0]:
        raise UserError(f"{path}: a table of scans has a header line with a column `path` and a line for each scan")
    return [_table_row(path, number, row) for number, row in enumerate(rows, start=2)]


def _table_row(table: Path, number: int, row: dict[str, str]) -> Source:
    if None in row or None in row.values():
        raise UserError(f"{table}, line {number}: has not as many fields as the header")
    if not row["path"].strip():
        raise UserError(f"{table}, line {number}: no path")
    scan = table.parent / row["path"].strip()
    files = {name: table.parent / row[name].strip() for name in _TABLE_FILES if row.get(name, "").strip()}
    tr = row.get("tr", "").strip()
    try:
        seconds = float(tr) if tr else None
    except ValueError as error:
        raise UserError(f"{table}, line {number}: tr {tr!r} is not a number of seconds") from error
    guess = one_file(scan) if is_nifti(scan) else Source(legal_name(scan.name), scan, legal_name(scan.name))
    known = {name: row.get(name, "").strip() for name in FIELDS}
    return Source(
        scan_id=legal_name(known["scan_id"] or _joined(known) or guess.scan_id),
        path=scan,
        subject=known["subject"] or guess.subject,
        session=known["session"],
        task=known["task"],
        run=known["run"],
        site=known["site"],
        mask=files.get("mask", guess.mask),
        sidecar=files.get("sidecar", guess.sidecar),
        confounds=files.get("confounds"),
        events=files.get("events"),
        tr=seconds,
        phenotypes=phenotypes({k: v for k, v in row.items() if k not in ("path", *FIELDS, *_TABLE_FILES, "tr")}),
    )


def _joined(known: dict[str, str]) -> str:
    """subject_session_task_run, when a table gives more than a subject."""
    parts = [known[name] for name in ("subject", "session", "task", "run") if known[name]]
    return "_".join(parts) if len(parts) > 1 else ""


def phenotypes(columns: dict[str, str]) -> dict[str, str]:
    """Columns kept as they are; one named like a column of the manifest gets the prefix `given_`."""
    taken = (*FIELDS, *RESERVED)
    return {f"given_{name}" if name in taken else name: value for name, value in columns.items() if name}


def duplicates(sources: list[Source]) -> dict[str, list[Source]]:
    """Names that more than one source has, with those sources."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.scan_id, []).append(source)
    return {name: group for name, group in groups.items() if len(group) > 1}

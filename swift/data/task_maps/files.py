"""Which file holds the map of which subject and contrast: names in a folder, or columns of the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from swift.config.schema import TargetConfig
from swift.data.ingest.nifti import SUFFIXES, strip_suffix
from swift.data.labels.columns import NOT_KNOWN, listed
from swift.data.store.format import ScanInfo
from swift.utils.errors import UserError

Files = dict[str, dict[str, Path]]
"""Subject -> contrast -> file."""
ONLY = "map"
"""What the contrast is called where none is named."""


def contrasts_of(target: TargetConfig) -> list[str]:
    """Names of the channels of a map."""
    return list(target.contrasts) or [target.column or ONLY]


def find_maps(scans: Sequence[ScanInfo], target: TargetConfig) -> Files:
    """The files of a task's maps; a subject without one is not in it.

    Raises:
        UserError: no such folder or column, no file that fits, two files of one subject and contrast.
    """
    if target.maps is None:
        if not target.contrasts and not target.column:
            raise UserError(
                "task.target.maps=null: must name a folder of maps (SUBJECT_..._CONTRAST.nii.gz), or "
                "task.target.contrasts columns of the manifest that name files"
            )
        return _from_columns(scans, target)
    found = in_folder("task.target.maps", target.maps, {scan.subject for scan in scans}, target)
    if not found:
        wanted = "SUBJECT_..._CONTRAST.nii.gz" if target.contrasts else "SUBJECT_....nii.gz"
        raise UserError(f"task.target.maps={target.maps}: no file there fits a subject of the store ({wanted})")
    return found


def in_folder(setting: str, folder: str, subjects: Iterable[str], target: TargetConfig) -> Files:
    """Files whose names begin with a subject, and hold the contrast between underscores (X or contrast-X).

    Of contrasts of which one holds another (face, face_vs_house), a file belongs to the longest that fits.

    Args:
        setting: That named the folder, for messages.
        folder: Searched with all below it.
        subjects: To look for.
        target: Its contrasts; where none is named, a subject has one file.

    Raises:
        UserError: no such folder, two files of one subject and contrast.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{setting}={folder}: no such folder")
    wanted, contrasts = set(subjects), contrasts_of(target)
    found: Files = {}
    for file in sorted(path.rglob("*")):
        if not file.name.endswith(SUFFIXES):
            continue
        parts = strip_suffix(file).split("_")
        # The longest name wins: a subject's name may itself hold underscores.
        lengths = [n for n in range(len(parts), 0, -1) if "_".join(parts[:n]) in wanted]
        if not lengths:
            continue
        subject, rest = "_".join(parts[: lengths[0]]), "_".join(["", *parts[lengths[0] :], ""])
        for contrast in _named(rest, contrasts) if target.contrasts else contrasts:
            own = found.setdefault(subject, {})
            if contrast in own:
                raise UserError(
                    f"{setting}={folder}: subject {subject} has two maps of {contrast}: {own[contrast].name} and "
                    f"{file.name}" + ("" if target.contrasts else "; name one in task.target.contrasts")
                )
            own[contrast] = file
    return found


def _named(rest: str, contrasts: Sequence[str]) -> list[str]:
    """Contrasts that a name says, and that are no part of another one there; rest: its parts with _ around each."""
    fits = [name for name in contrasts if f"_{name}_" in rest or f"_contrast-{name}_" in rest]
    return [name for name in fits if not any(name != other and f"_{name}_" in f"_{other}_" for other in fits)]


def _from_columns(scans: Sequence[ScanInfo], target: TargetConfig) -> Files:
    found: Files = {}
    known = sorted({name for scan in scans for name in scan.phenotypes})
    for contrast in contrasts_of(target):
        if contrast not in known:
            raise UserError(
                f"task.target.maps=null and the manifest has no column {contrast} with files of maps; it has "
                f"{listed(known, 20) or 'none'}"
            )
        for scan in scans:
            text = scan.phenotypes.get(contrast, "").strip()
            if text in NOT_KNOWN:
                continue
            own = found.setdefault(scan.subject, {})
            if own.setdefault(contrast, Path(text)) != Path(text):
                raise UserError(f"subject {scan.subject} has two maps of {contrast}: {own[contrast]} and {text}")
    if not found:
        raise UserError(f"task.target.contrasts={contrasts_of(target)}: these columns name no file")
    return found

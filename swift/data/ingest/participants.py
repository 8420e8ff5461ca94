"""participants.tsv: what is known of people, and which line belongs to which subject.

A line is a subject's if the texts are equal, with or without `sub-`; else if both are the same number (50772 for
sub-0050772, as spreadsheets write it) and no other line or subject is. What is matched by number, and what is not
matched at all, is said.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from swift.utils.errors import UserError


@dataclass
class People:
    """Lines of a table of participants."""

    path: Path | None = None
    lines: dict[str, dict[str, str]] = field(default_factory=dict)
    """participant_id as written -> its other columns."""

    def match(self, subjects: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
        """Columns of each subject, and what has to be said: one sentence each."""
        subjects = sorted(set(subjects))
        if self.path is None:
            return {}, []
        exact = {bare(name): name for name in self.lines}
        numbers = _unique(self.lines)
        mine = _unique(subjects)
        found: dict[str, str] = {}
        by_number = []
        for subject in subjects:
            line = subject if subject in self.lines else exact.get(bare(subject))
            if line is None and (digits := _digits(subject)) and mine[digits] == subject:
                line = numbers.get(digits)
                if line is not None:
                    by_number.append(f"{line} for {subject}")
            if line is not None:
                found[subject] = line
        notes = []
        if by_number:
            notes.append(f"{self.path.name}: {len(by_number)} lines matched by number ({_some(by_number)})")
        without = [subject for subject in subjects if subject not in found]
        used = set(found.values())
        unused = [name for name in self.lines if name not in used]
        if without:
            notes.append(
                f"{self.path.name}: {len(without)} of {len(subjects)} subjects have no line ({_some(without)}); "
                f"{len(unused)} of {len(self.lines)} participants belong to no scan"
                + (f" ({_some(unused)})" if unused else "")
            )
        return {subject: self.lines[line] for subject, line in found.items()}, notes


def bare(name: str) -> str:
    """A subject's label without `sub-`."""
    return name[4:] if name.lower().startswith("sub-") else name


def _digits(name: str) -> str:
    label = bare(name)
    return (label.lstrip("0") or "0") if label.isdigit() else ""


def _unique(names: Iterable[str]) -> dict[str, str | None]:
    """Number -> the one name that is it; None where several are."""
    found: dict[str, str | None] = {}
    for name in names:
        if digits := _digits(name):
            found[digits] = None if digits in found else name
    return found


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def participants_file(root: Path) -> Path | None:
    """participants.tsv of the dataset, or of the raw dataset that derivatives/<name>/ lies in."""
    raw = [root.parent.parent] if root.resolve().parent.name == "derivatives" else []
    for folder in [root, *raw]:
        if (folder / "participants.tsv").is_file():
            return folder / "participants.tsv"
    return None


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and lines of a CSV (commas or semicolons) or TSV file; a byte order mark and CRLF are taken off.

    Raises:
        UserError: not readable as a table, a column twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a table ({error})") from error
    first = text.partition("\n")[0]
    comma = ";" if ";" in first and "," not in first else ","
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else comma)
        header = [(name or "").strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path}: not readable as a table ({error})") from error
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two columns are called {', '.join(twice)}")
    return header, rows


def read_participants(path: Path | None) -> People:
    """participants.tsv (or a .csv of that kind).

    Raises:
        UserError: no column participant_id, or one participant twice.
    """
    if path is None:
        return People()
    _, rows = read_table(path)
    people = People(path)
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        person = (row.get("participant_id") or "").strip()
        if not person:
            raise UserError(f"{path}, line {number}: no participant_id")
        if bare(person) in seen:
            raise UserError(f"{path}, line {number}: a second line for {person}")
        seen.add(bare(person))
        people.lines[person] = {
            key: (value or "").strip() for key, value in row.items() if key and key != "participant_id"
        }
    return people

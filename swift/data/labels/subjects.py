"""Subjects of a store as splits want them: label, family and site from the manifest's phenotypes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from swift.data.labels.columns import NOT_KNOWN, listed, number
from swift.data.labels.splits import BINS, Person, bin_labels
from swift.data.store.format import ScanInfo
from swift.utils.errors import UserError

log = logging.getLogger("swift.data")

SEVERAL = "several sites"
"""Site of a subject that was scanned at more than one: a stratum of its own."""
MANY = 10
"""A column with more different numbers than this is no list of classes."""


def people_of(
    scans: Iterable[ScanInfo],
    label: str | None = None,
    family: str | None = None,
    continuous: bool | None = False,
    together: Sequence[Collection[str]] = (),
) -> list[Person]:
    """One Person a subject.

    Args:
        scans: Of one store or several.
        label: Phenotype column to stratify by; None: none.
        family: Phenotype column that names families; None: none.
        continuous: The label is a number; its quantile bin is the stratum. None: where the column looks like that.
        together: Subjects that must stay together, whatever `family` says; see `same_person`.

    Raises:
        UserError: no such column; a subject with two values; a continuous label that is no number.
    """
    scans = list(scans)
    known = sorted({name for scan in scans for name in scan.phenotypes})
    for option, name in (("--label", label), ("--family", family)):
        if name is not None and name not in known:
            raise UserError(f"{option} {name}: no such phenotype; there are {', '.join(known) or 'none'}")
    values: dict[str, dict[str, str]] = {}
    sites: dict[str, set[str]] = {}
    for scan in scans:
        person = values.setdefault(scan.subject, {})
        for key, value in (("label", _value(scan, label)), ("family", _value(scan, family))):
            if value and person.setdefault(key, value) != value:
                raise UserError(f"subject {scan.subject} has two values of {key}: {person[key]!r} and {value!r}")
        sites.setdefault(scan.subject, set()).update({scan.site} - {""})
    travelled = sorted(subject for subject, some in sites.items() if len(some) > 1)
    if travelled:
        log.info(
            "%d subjects have scans of several sites, a stratum of their own: %s", len(travelled), listed(travelled)
        )
    subjects = sorted(values)
    labels = [values[subject].get("label", "") for subject in subjects]
    if label is not None and continuous is None and looks_continuous(labels):
        continuous = True
        different = len(set(labels) - {""})
        log.info(
            "--label %s: %d different numbers, taken as continuous: %d quantile bins (--no-continuous: each a class)",
            label, different, BINS,
        )  # fmt: skip
    if continuous and label is not None:
        labels = bin_labels([_number(text, label) for text in labels])
    families = _joined({subject: values[subject].get("family", "") for subject in subjects}, together)
    return [
        Person(subject, families[subject], stratum, SEVERAL if len(sites[subject]) > 1 else "".join(sites[subject]))
        for subject, stratum in zip(subjects, labels, strict=True)
    ]


def looks_continuous(texts: Sequence[str]) -> bool:
    """Whether a column holds numbers of a scale rather than classes: many different ones."""
    there = [text for text in texts if text]
    different = len(set(there))
    many = different > MANY or (different > BINS and 2 * different > len(there))
    return many and all(number(text) is not None for text in there)


def same_person(subjects: Iterable[str], sources: Mapping[str, Collection[str]]) -> dict[str, list[set[str]]]:
    """Subjects that may be one person under two names; they must not come into two parts of a split.

    Args:
        subjects: All of them.
        sources: Hash of a scan's source file -> subjects that have it.

    Returns:
        Why -> groups of subjects, by their first names.
    """
    copies = {frozenset(some) for digest, some in sources.items() if digest and len(set(some)) > 1}
    return {
        "the same file (source_sha256) is a scan of": sorted(map(set, copies), key=min),
        "one person in two spellings may be": two_spellings(subjects),
    }


def two_spellings(subjects: Iterable[str]) -> list[set[str]]:
    """Groups of subjects whose names differ by spelling only (sub-1, sub-01, 01), by their first names."""
    spelled: dict[tuple[str, ...], set[str]] = {}
    for subject in subjects:
        spelled.setdefault(_spelling(subject), set()).add(subject)
    return sorted((some for some in spelled.values() if len(some) > 1), key=min)


def _spelling(subject: str) -> tuple[str, ...]:
    """What is left of a name without sub-, upper case, separators and leading zeros."""
    runs = re.findall(r"\d+|[^\W\d_]+", subject.lower().removeprefix("sub-"))
    return tuple(run.lstrip("0") or "0" if run.isdigit() else run for run in runs)


def _joined(families: dict[str, str], together: Sequence[Collection[str]]) -> dict[str, str]:
    """Families where groups of subjects are one family too: subject -> name of its family, "" for none."""
    home = {subject: subject for subject in families}

    def root(subject: str) -> str:
        while home[subject] != subject:
            subject = home[subject]
        return subject

    members: dict[str, list[str]] = {}
    for subject, family in families.items():
        if family:
            members.setdefault(family, []).append(subject)
    for group in (*members.values(), *together):
        first, *others = sorted(group)
        for other in others:
            home[root(other)] = root(first)
    sizes: dict[str, int] = {}
    for subject in families:
        sizes[root(subject)] = sizes.get(root(subject), 0) + 1
    return {
        subject: (families[root(subject)] or root(subject)) if sizes[root(subject)] > 1 else family
        for subject, family in families.items()
    }


def _value(scan: ScanInfo, column: str | None) -> str:
    value = scan.phenotypes.get(column, "") if column else ""
    return "" if value in NOT_KNOWN else value


def _number(text: str, label: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError as error:
        raise UserError(f"--label {label} --continuous: {text!r} is not a number") from error

"""Subjects of a store as splits want them: label, family and site from the manifest's phenotypes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from swift.data.labels.columns import NOT_KNOWN
from swift.data.labels.splits import Person, bin_labels
from swift.data.store.format import ScanInfo
from swift.utils.errors import UserError


def people_of(
    scans: Iterable[ScanInfo], label: str | None = None, family: str | None = None, continuous: bool = False
) -> list[Person]:
    """One Person a subject.

    Args:
        scans: Of one store or several.
        label: Phenotype column to stratify by; None: none.
        family: Phenotype column that names families; None: none.
        continuous: The label is a number; its quantile bin is the stratum.

    Raises:
        UserError: no such column; a subject with two values; a continuous label that is no number.
    """
    scans = list(scans)
    known = sorted({name for scan in scans for name in scan.phenotypes})
    for option, name in (("--label", label), ("--family", family)):
        if name is not None and name not in known:
            raise UserError(f"{option} {name}: no such phenotype; there are {', '.join(known) or 'none'}")
    values: dict[str, dict[str, str]] = {}
    for scan in scans:
        person = values.setdefault(scan.subject, {})
        for key, value in (("label", _value(scan, label)), ("family", _value(scan, family)), ("site", scan.site)):
            if value and person.setdefault(key, value) != value:
                raise UserError(f"subject {scan.subject} has two values of {key}: {person[key]!r} and {value!r}")
    subjects = sorted(values)
    labels = [values[subject].get("label", "") for subject in subjects]
    if continuous and label is not None:
        labels = bin_labels([_number(text, label) for text in labels])
    return [
        Person(subject, values[subject].get("family", ""), stratum, values[subject].get("site", ""))
        for subject, stratum in zip(subjects, labels, strict=True)
    ]


def _value(scan: ScanInfo, column: str | None) -> str:
    value = scan.phenotypes.get(column, "") if column else ""
    return "" if value in NOT_KNOWN else value


def _number(text: str, label: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError as error:
        raise UserError(f"--label {label} --continuous: {text!r} is not a number") from error

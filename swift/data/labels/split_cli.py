"""The command `python -m swift.data split`."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from swift.data.labels.columns import listed
from swift.data.labels.splits import PARTS, Person, audit, k_fold, make_split, save_splits, small_strata
from swift.data.labels.subjects import people_of, same_person
from swift.data.store.reader import Store

log = logging.getLogger("swift.data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser that has --json and --quiet."""
    parser.add_argument("stores", type=Path, nargs="+", metavar="store")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--val", type=float, default=0.15, help="share of validation subjects (0.15)")
    parser.add_argument("--test", type=float, default=0.15, help="share of test subjects (0.15)")
    parser.add_argument("--folds", type=int, default=0, help="k folds instead; --val is then of the rest")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of the folds (1)")
    parser.add_argument("--label", help="stratify by this phenotype column")
    parser.add_argument(
        "--continuous",
        action=argparse.BooleanOptionalAction,
        help="the label is a number: stratify by quantiles (default: if the column holds many different numbers)",
    )
    parser.add_argument("--family", help="phenotype column whose members must stay together")
    parser.add_argument("--pretrained", type=Path, nargs="+", default=[], help="stores that a model has seen: warn")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    """Make the split or the folds, say what is to be known about them, save them.

    Raises:
        UserError: a store that cannot be opened, shares out of range, no such column, a leak.
    """
    stores = [Store(path) for path in options.stores]
    scans = [scan for store in stores for scan in store.scans]
    together = _one_person(stores)
    people = people_of(scans, options.label, options.family, options.continuous, together)
    if options.folds:
        splits = k_fold(people, options.folds, options.val, options.seed, options.repeats)
        shares = [1 / options.folds, *([options.val * (1 - 1 / options.folds)] if options.val else [])]
    else:
        splits = [make_split(people, options.val, options.test, options.seed)]
        shares = [share for share in (options.val, options.test) if share]
    _say_merged(people, shares)
    seen = {scan.subject for path in options.pretrained for scan in Store(path).scans}
    for warning in sorted({warning for split in splits for warning in audit(split, people, seen)}):
        log.warning("%s", warning)
    hashes = save_splits(options.out, splits)
    rows, lines = [], []
    for place, (digest, split) in enumerate(zip(hashes, splits, strict=True)):
        found: dict[str, Any] = {"hash": digest, **{part: len(split.parts[part]) for part in PARTS}}
        rows.append({**found, "how": split.how})
        found_text, how_text = ("  ".join(f"{k} {v}" for k, v in some.items()) for some in (found, split.how))
        lines.append(f"{options.out}:{place}  {found_text}  ({how_text})")
    print(json.dumps(rows, indent=2) if options.json else "\n".join(lines))
    return 0


def _one_person(stores: list[Store]) -> list[set[str]]:
    """Groups of subjects that may be one person; each is said."""
    sources: dict[str, set[str]] = {}
    homes: dict[str, set[Path]] = {}
    for store in stores:
        for place, scan in enumerate(store.scans):
            sources.setdefault(str(store.attributes(place)["source_sha256"]), set()).add(scan.subject)
            homes.setdefault(scan.subject, set()).add(store.path)
        store.close()
    shared = sorted(subject for subject, some in homes.items() if len(some) > 1)
    if shared:
        log.warning("%d subjects are in several stores and taken for one person each: %s", len(shared), listed(shared))
    found: list[set[str]] = []
    for why, groups in same_person(homes, sources).items():
        if groups:
            told = listed([" = ".join(sorted(group)) for group in groups])
            log.warning("%s %s: kept in one part", why, told)
            found += groups
    return found


def _say_merged(people: list[Person], shares: list[float]) -> None:
    """Say which strata are too small to be dealt by themselves."""
    small = small_strata(people, [*shares, 1.0]) if shares else set()
    if small:
        total = Counter((person.label, person.site) for person in people)
        names = [f"{label or 'no label'} {site}".strip() for label, site in sorted(small)]
        log.warning(
            "%d of %d strata (label, site) have too few subjects for shares of %s: merged, alike in label and in site "
            "only (%s)",
            len(small), len(total), ", ".join(f"{share:.3g}" for share in shares), listed(names),
        )  # fmt: skip

"""Splits by subject: stratified, families kept together, saved with a hash, audited for leaks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swift.utils.errors import UserError

PARTS = ("train", "val", "test")
BINS = 5
"""Quantile bins by which a continuous label is stratified."""


@dataclass(frozen=True)
class Person:
    """A subject with what its placement depends on. Empty text: not known."""

    subject: str
    family: str = ""
    label: str = ""
    site: str = ""


@dataclass(frozen=True)
class Split:
    """Subjects of each part, sorted.

    Attributes:
        parts: train, val, test -> subjects.
        how: What it was made with (seed, fractions, fold, repeat, ...): plain JSON values.
    """

    parts: dict[str, tuple[str, ...]]
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the sha256 over the subjects of each part."""
        text = json.dumps({part: sorted(self.parts[part]) for part in PARTS})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def places(self, subjects: Sequence[str]) -> dict[str, list[int]]:
        """Places of the scans of each part, given every scan's subject. Scans of other subjects are in none."""
        part_of = {subject: part for part in PARTS for subject in self.parts[part]}
        found: dict[str, list[int]] = {part: [] for part in PARTS}
        for place, subject in enumerate(subjects):
            if subject in part_of:
                found[part_of[subject]].append(place)
        return found


def bin_labels(values: Sequence[float], bins: int = BINS) -> list[str]:
    """Stratum of each value of a continuous label: its quantile bin, "" where it is not finite."""
    array = np.asarray(values, np.float64)
    good = np.isfinite(array)
    if not good.any():
        return [""] * len(array)
    edges = np.quantile(array[good], np.linspace(0, 1, bins + 1)[1:-1])
    return [str(int(np.searchsorted(edges, x, side="right"))) if ok else "" for x, ok in zip(array, good, strict=True)]


def _families(people: Sequence[Person]) -> list[list[Person]]:
    """Groups that must stay together, in an order that does not depend on the order of the input."""
    names = Counter(person.subject for person in people)
    doubled = sorted(name for name, count in names.items() if count > 1)
    if doubled:
        raise UserError(f"subjects listed twice: {', '.join(doubled[:5])}")
    groups: dict[tuple[int, str], list[Person]] = {}
    for person in sorted(people, key=lambda p: p.subject):
        groups.setdefault((1, person.family) if person.family else (0, person.subject), []).append(person)
    return [groups[key] for key in sorted(groups)]


def part_sizes(count: int, shares: Sequence[float]) -> list[int]:
    """Subjects of each part: shares of `count` by largest remainders; at least 1 for a share above 0, if they last.

    Raises:
        UserError: shares below 0, or whose sum is not 1.
    """
    if any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"shares {list(shares)}: must be 0 or more and sum to 1")
    sizes = [int(share * count + 1e-9) for share in shares]
    rest = sorted(range(len(shares)), key=lambda k: sizes[k] - shares[k] * count)
    for k in rest[: count - sum(sizes)]:
        sizes[k] += 1
    for k, share in enumerate(shares):
        largest = max(range(len(shares)), key=lambda one: sizes[one])
        if share and not sizes[k] and sizes[largest] > 1:
            sizes[k], sizes[largest] = 1, sizes[largest] - 1
    return sizes


def small_strata(people: Sequence[Person], shares: Sequence[float]) -> set[tuple[str, str]]:
    """Strata (label, site) with too few subjects for one of them in every part that has a share."""
    least = 1 / min(share for share in shares if share > 0)
    total = Counter((person.label, person.site) for person in people)
    return {stratum for stratum, count in total.items() if count < least - 1e-9} if len(total) > 1 else set()


def deal(people: Sequence[Person], shares: Sequence[float], seed: int) -> list[list[str]]:
    """Deal subjects into parts of given shares, alike in label and site.

    Groups (families) go one by one, large ones and those of rare strata first, to the part that lacks most at that
    moment: of the group's strata, labels and sites and of subjects in all together (minimisation: Pocock and Simon,
    Biometrics 31, 1975). Small strata do not count by themselves: they are merged, so that only their labels and sites
    do. A part that is full gets no more; ties are broken by a seeded order.

    Args:
        people: Subjects, each once.
        shares: Share of each part, summing to 1.
        seed: Any integer.

    Returns:
        Subjects of each part, sorted.
    """
    sizes = part_sizes(len(people), shares)
    groups = _families(people)
    rng = np.random.Generator(np.random.Philox(key=seed & ((1 << 64) - 1)))
    groups = [groups[i] for i in rng.permutation(len(groups))]
    total = Counter((p.label, p.site) for p in people)
    small = small_strata(people, shares)
    groups.sort(key=lambda g: (-len(g), min(total[p.label, p.site] for p in g)))
    parts: list[list[str]] = [[] for _ in shares]
    dealt: Counter[Any] = Counter()
    placed: list[Counter[Any]] = [Counter() for _ in shares]

    def kinds(person: Person) -> list[Any]:
        stratum = (person.label, person.site)
        own = [] if stratum in small else [stratum]
        return ["all", ("label", person.label), ("site", person.site), *own]

    for group in groups:
        brings = Counter(kind for person in group for kind in kinds(person))
        dealt.update(brings)
        room = [size - len(part) for size, part in zip(sizes, parts, strict=True)]
        open_ = [k for k in range(len(parts)) if room[k] >= len(group)] or [room.index(max(room))]
        share = [size / max(len(people), 1) for size in sizes]
        lack = {k: sum(n * (share[k] * dealt[kind] - placed[k][kind]) for kind, n in brings.items()) for k in open_}
        best = max(open_, key=lambda k: (round(lack[k], 9), room[k]))
        placed[best].update(brings)
        parts[best] += [p.subject for p in group]
    return [sorted(part) for part in parts]


def make_split(people: Sequence[Person], val: float, test: float, seed: int) -> Split:
    """One split with these shares of validation and test subjects.

    Raises:
        UserError: shares out of range, or a part that was asked for stays empty.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise UserError(f"val={val} and test={test}: each at least 0, together below 1")
    parts = dict(zip(PARTS, deal(people, (1 - val - test, val, test), seed), strict=True))
    for part, share in zip(PARTS, (1 - val - test, val, test), strict=True):
        if share and not parts[part]:
            raise UserError(f"{len(people)} subjects are too few: part {part} ({share:.3g}) would be empty")
    return Split({part: tuple(names) for part, names in parts.items()}, {"seed": seed, "val": val, "test": test})


def k_fold(people: Sequence[Person], folds: int, val: float, seed: int, repeats: int = 1) -> list[Split]:
    """Make folds x repeats splits; in each repeat every subject is tested once.

    Args:
        people: Subjects, each once.
        folds: At least 2, at most the number of families.
        val: Share of the non-test subjects that validates.
        seed: Repeat r uses seed + r.
        repeats: At least 1.
    """
    groups = len(_families(people))
    if not 2 <= folds <= groups or repeats < 1 or not 0 <= val < 1:
        raise UserError(f"folds={folds} must be 2..{groups}, repeats={repeats} at least 1, val={val} in [0, 1)")
    splits: list[Split] = []
    for repeat in range(repeats):
        tested = deal(people, [1 / folds] * folds, seed + repeat)
        for fold, test in enumerate(tested):
            rest = [person for person in people if person.subject not in set(test)]
            train, held = deal(rest, (1 - val, val), seed + repeat)
            if val and not held:
                raise UserError(f"{len(rest)} subjects beside the test ones are too few: part val ({val:g}) is empty")
            how = {"seed": seed, "folds": folds, "fold": fold, "repeat": repeat, "val": val}
            splits.append(Split({"train": tuple(train), "val": tuple(held), "test": tuple(test)}, how))
    return splits


# -------------------------------------------------------------------------------------------------------- files
def save_splits(path: str | os.PathLike[str], splits: Sequence[Split]) -> list[str]:
    """Write splits as JSON; returns their hashes."""
    entries = [{"hash": s.hash, "how": s.how, **{part: list(s.parts[part]) for part in PARTS}} for s in splits]
    target = Path(path)
    temp = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        temp.write_text(json.dumps({"version": 1, "splits": entries}, indent=1) + "\n", encoding="utf-8")
        os.replace(temp, target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            temp.unlink(missing_ok=True)
    return [s.hash for s in splits]


def load_splits(path: str | os.PathLike[str]) -> list[Split]:
    """Read and check a file of splits.

    Raises:
        UserError: no such file, another format, a hash that does not fit (the file was edited), a leak.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != 1:
            raise UserError(f"{path}: version {content['version']} of split files; this swift reads 1")
        read = [(Split({p: tuple(e[p]) for p in PARTS}, e["how"]), e["hash"]) for e in content["splits"]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        # Of bytes that are no text the error would hold the whole file.
        why = "not text" if isinstance(error, UnicodeDecodeError) else repr(error)[:120]
        raise UserError(f"{path}: not a file of splits made by `python -m swift.data split` ({why})") from error
    for number, (split, digest) in enumerate(read):
        if split.hash != digest:
            raise UserError(
                f"{path}: split {number} has hash {split.hash}, the file says {digest}: it was changed by hand"
            )
        audit(split)
    return [split for split, _ in read]


def load_split(name: str) -> Split:
    """The split that `file.json` (its first) or `file.json:3` (number 3, from 0) names."""
    path, mark, number = name.rpartition(":")
    if not mark or not number.isdigit():
        path, number = name, "0"
    splits = load_splits(path)
    if int(number) >= len(splits):
        raise UserError(f"{name}: split {number} of {path}; it has 0 to {len(splits) - 1}")
    return splits[int(number)]


# -------------------------------------------------------------------------------------------------------- audit
def audit(split: Split, people: Iterable[Person] = (), pretrained: Iterable[str] = ()) -> list[str]:
    """Look for leaks.

    Args:
        split: The subjects.
        people: With families, if these are known.
        pretrained: Subjects that the model's weights have seen.

    Returns:
        Warnings, one sentence each.

    Raises:
        UserError: a subject, or a family, is in two parts; names them.
    """
    family = {person.subject: person.family for person in people if person.family}
    for what, key in (("subject", lambda s: s), ("family", family.get)):
        homes: dict[str, set[str]] = {}
        for part in PARTS:
            for subject in split.parts[part]:
                name = key(subject)
                if name is not None:
                    homes.setdefault(name, set()).add(part)
        shared = sorted(name for name, where in homes.items() if len(where) > 1)
        if shared:
            listed = ", ".join(f"{name} ({' and '.join(p for p in PARTS if p in homes[name])})" for name in shared[:10])
            more = f" and {len(shared) - 10} more" if len(shared) > 10 else ""
            raise UserError(f"{what} in more than one part: {listed}{more}; make the split anew")
    seen = sorted(set(split.parts["test"]) & set(pretrained))
    if not seen:
        return []
    more = f" and {len(seen) - 10} more" if len(seen) > 10 else ""
    return [
        f"{len(seen)} test subjects were in pre-training: {', '.join(seen[:10])}{more}; their scores are optimistic."
    ]

"""Labels that can be told from the name of a subject: names then carry the group, and scanner or site with it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

CHANCE = 1e-4
"""A rule that would fit this rarely if names and labels had nothing to do with each other is no coincidence."""


def _log_arrangements(counts: Sequence[int]) -> float:
    """Logarithm of the number of ways to deal labels with these counts to the subjects."""
    return math.lgamma(sum(counts) + 1) - sum(math.lgamma(count + 1) for count in counts)


def _rules(names: Sequence[str]) -> list[tuple[str, Callable[[str], str]]]:
    """What of a name may tell its group: its letters, what it begins or ends with."""
    shortest = min(map(len, names))
    rules: list[tuple[str, Callable[[str], str]]] = [("the letters of", lambda name: re.sub(r"[\W\d_]+", " ", name))]
    rules += [(f"the first {n} characters of", lambda name, n=n: name[:n]) for n in range(1, shortest)]  # type: ignore[misc]
    rules += [(f"the last {n} characters of", lambda name, n=n: name[-n:]) for n in range(1, shortest)]  # type: ignore[misc]
    return rules


def id_leak(names: Sequence[str], classes: Sequence[str]) -> str | None:
    """How the class of every subject follows from its name, in words; None where it does not.

    A rule (a part of the name, or the order of names) counts if it tells all subjects' classes and would do so by
    chance less often than CHANCE, counting every way to give the found groups a class.

    Args:
        names: (n,) subjects.
        classes: (n,) the name of each one's class.
    """
    counts = Counter(classes)
    if len(counts) < 2:
        return None
    room = _log_arrangements(list(counts.values())) + math.log(CHANCE)
    for said, rule in _rules(names):
        groups: dict[str, set[str]] = {}
        for name, label in zip(names, classes, strict=True):
            groups.setdefault(rule(name), set()).add(label)
        if all(len(group) == 1 for group in groups.values()) and len(groups) * math.log(len(counts)) < room:
            example = sorted(groups)[:3]
            told = ", ".join(f"{key.strip()!r} is {next(iter(groups[key]))}" for key in example)
            return f"{said} a subject's name tell its class ({told})"
    order = [label for _, label in sorted(zip(names, classes, strict=True))]
    runs = 1 + sum(a != b for a, b in pairwise(order))
    if runs == len(counts) and math.lgamma(runs + 1) < room:
        return "in the order of their names subjects come class by class"
    return None

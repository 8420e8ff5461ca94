"""Study files: which points a study has, what is done with them, and which cohort they share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swift.utils.errors import UserError

KEYS = ("name", "base", "points", "kind", "cohort", "interrupt", "series", "probe", "report")
KINDS = ("train", "throughput")
SHORT = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        path: Of the file.
        name: Names the folder of its runs, runs/NAME.
        points: Overrides of each point, without the base.
        base: Overrides of all points.
        kind: train, or throughput (a few steps are timed, nothing is learned).
        cohort: Fields of `swift.data.synthetic.CohortSpec`: a cohort of their own, made once; None: what data= names.
        interrupt: Name of a point -> step after which it is stopped once (SIGUSR1, as at the end of a job) and goes on.
        series: {count, frames, lag} of scans whose series are described after training; None: not.
        probe: Per-frame column of the store that frozen features are asked for after training; None: none.
        report: The report's command and its options; {runs} stands for the folder of the runs, {out} for --out,
            {study} for the folder of the study file.
    """

    path: Path
    name: str
    points: list[list[str]]
    base: list[str] = field(default_factory=list)
    kind: str = "train"
    cohort: dict[str, Any] | None = None
    interrupt: dict[str, int] = field(default_factory=dict)
    series: dict[str, float] | None = None
    probe: str | None = None
    report: list[list[str]] = field(default_factory=list)


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("points"), list):
        raise UserError(f"{path}: a study needs points, a list of blocks NAME: VALUE or [VALUES]")
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise UserError(f"{path}: {unknown[0]} is not known; known are {', '.join(KEYS)}")
    kind = content.get("kind", "train")
    if kind not in KINDS:
        raise UserError(f"{path}: kind={kind}: must be one of {', '.join(KINDS)}")
    points = [point for block in content["points"] for point in multiplied(block, path)]
    if not points:
        raise UserError(f"{path}: no points")
    report = [[str(word) for word in line] for line in content.get("report") or []]
    base = [str(item) for item in content.get("base") or []]
    name = str(content.get("name") or path.parent.name)
    interrupt = content.get("interrupt") or {}
    if not isinstance(interrupt, dict) or (interrupt and kind != "train"):
        raise UserError(f"{path}: interrupt: wants POINT: STEP, of a study that trains")
    for point, step in interrupt.items():
        if point not in map(point_name, points) or not isinstance(step, int) or step < 1:
            raise UserError(f"{path}: interrupt: {point}: {step}: wants the name of a point and a step of at least 1")
    more = {key: content.get(key) for key in ("cohort", "series", "probe")}
    return Study(path, name, points, base, kind, interrupt=interrupt, report=report, **more)


def multiplied(block: Any, path: Path) -> list[list[str]]:
    """All combinations of a block's values, as overrides."""
    if not isinstance(block, dict):
        raise UserError(f"{path}: points must be blocks NAME: VALUE or [VALUES], not {block!r}")
    choices = [
        [f"{key}={_text(value)}" for value in (values if isinstance(values, list) else [values])]
        for key, values in block.items()
    ]
    return [list(chosen) for chosen in itertools.product(*choices)]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(_text(item) for item in value) + "]"
    return str(value)


def point_name(overrides: Sequence[str]) -> str:
    """Name of a run directory: the last part of each setting's name and its value."""
    parts = []
    for override in overrides:
        key, _, value = override.partition("=")
        value = SHORT.sub("x", value.strip("[]{}'\""))
        parts.append(f"{re.split(r'[./]', key.lstrip('+'))[-1]}-{value}")
    return "_".join(parts) or "point"


def cohort_store(fields: dict[str, Any], path: Path, store: Path) -> Path:
    """The store of a study's own cohort, made where it is not there yet.

    Args:
        fields: Of `CohortSpec`.
        path: Of the study file.
        store: Its folder.

    Raises:
        UserError: an unknown field or value, or the folder holds another cohort.
    """
    from swift.data.synthetic import CohortSpec
    from swift.data.synthetic.write import made_once

    try:
        spec = CohortSpec(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: cohort: {str(error).split('() ')[-1]}") from error
    if not made_once(spec, store):
        raise UserError(f"{store} holds another cohort than {path} asks for: move it away, and the runs beside it")
    return store

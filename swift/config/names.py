"""Names of settings and groups: what is legal, and a clear line for what is not, before Hydra's grammar has its say."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from swift.config.schema import Config
from swift.utils.errors import UserError

VALUE_OPTIONS = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p"),
    *("--cfg", "-c", "--info", "-i", "--experimental-rerun"),
)
"""Options of Hydra's whose value is the next word."""
FREE = ("hydra.", "hydra/", "sweep", "+")
"""What is not looked at: Hydra's own settings, and what is added on purpose (the schema says what of it is unknown)."""


def setting_names(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and type of every single setting, and of every section."""
    for name, hint in typing.get_type_hints(kind).items():
        parts = (hint, *typing.get_args(hint))
        inner = next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)
        yield prefix + name, hint
        if inner is not None and typing.get_origin(hint) is not list:
            yield from setting_names(inner, f"{prefix}{name}.")


def group_choices(folder: Path) -> dict[str, list[str]]:
    """Groups of a folder of YAML files, such as model or model/variant, and their choices."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*/*.yaml")):
        if not path.name.startswith("_"):
            found.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path.stem)
    return found


def options_first(arguments: Sequence[str]) -> list[str]:
    """Options before settings, each in its order: Hydra takes settings in one piece only."""
    options: list[str] = []
    settings: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-"):
            settings.append(word)
            continue
        options.append(word)
        if word in VALUE_OPTIONS:
            options += [value for value in [next(rest, None)] if value is not None]
    return [*options, *settings]


def refuse_unknown(arguments: Sequence[str], folder: Path, more: Sequence[str] = ()) -> None:
    """Look at the names of settings, and at the choices of groups.

    Args:
        arguments: Of a command that takes settings, options among them.
        folder: Of swift's own YAML files.
        more: Settings that only this command has.

    Raises:
        UserError: no such setting or choice; names the nearest. A word that is no setting.
    """
    ordered = options_first(arguments)
    own_files = any(
        word.partition("=")[0] in ("--config-dir", "-cd", "--config-path", "-cp", "hydra.searchpath")
        for word in ordered
    )
    groups, single = group_choices(folder), dict(setting_names())
    legal = [*single, *groups, *more]
    skip = False
    for word in ordered:
        if skip or word.startswith("-"):
            skip = word in VALUE_OPTIONS and not skip
            continue
        name, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise UserError(f"{word!r} is no setting: settings are NAME=VALUE, such as trainer.max_steps=100")
        name = name.removeprefix("~")
        name = name.partition("@")[0]
        if word.startswith(FREE) or name in more or own_files:
            continue
        if name not in single and name not in groups and not _below_a_mapping(name, single):
            near = get_close_matches(name, legal, 1, 0.6) or get_close_matches(name.rpartition(".")[2], legal, 1, 0.8)
            alike = [known for known in single if known.rpartition(".")[2] == name.rpartition(".")[2]]
            hint = f"did you mean {(near or alike)[0]}?" if near or alike else "swift-fmri train --help lists them"
            raise UserError(f"no setting {name}; {hint}")
        for choice in value.split(",") if name in groups and re.fullmatch(r"[\w.,+-]+", value) else ():
            if choice not in groups[name] and choice != "null":
                near = get_close_matches(choice, groups[name], 1)
                hint = f"did you mean {name}={near[0]}? " if near else ""
                raise UserError(f"{name}={choice}: no such choice; {hint}There are {', '.join(groups[name])}")


def _below_a_mapping(name: str, single: dict[str, Any]) -> bool:
    """Whether a name goes on below a setting that is a mapping or a list, or is only known as `Any`."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        hint = single.get(".".join(parts[:end]))
        if hint is not None and any(typing.get_origin(one) in (dict, list) for one in (hint, *typing.get_args(hint))):
            return True
    return False

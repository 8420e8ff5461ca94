"""What `python -m swift.train --help` lists: groups with their choices, settings with their values and meaning."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from dataclasses import is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from swift.config import schema, schema_data
from swift.config.compose import conf_dir

WIDTH = 118
_INDENT = 36


def meanings() -> dict[str, dict[str, str]]:
    """The text under every setting in the schema: class name -> setting -> one line ("" where there is none)."""
    found: dict[str, dict[str, str]] = {}
    for node in (node for source in (schema, schema_data) for node in ast.parse(inspect.getsource(source)).body):
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for part, after in zip(node.body, [*node.body[1:], None]):
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    expression = after.value if isinstance(after, ast.Expr) else None
                    text = expression.value if isinstance(expression, ast.Constant) else ""
                    texts[part.target.id] = " ".join(str(text).split())
    return found


def groups_text() -> str:
    """One line a group: its choices, without the parts they share (files beginning with _)."""
    choices: dict[str, list[str]] = {}
    for path in conf_dir().rglob("*/*.yaml"):
        if not path.name.startswith("_"):
            choices.setdefault(path.parent.relative_to(conf_dir()).as_posix(), []).append(path.stem)
    lines = []
    for group, names in sorted(choices.items()):
        head = f"{'+' if group == 'launcher' else ''}{group}="
        lines += textwrap.wrap(
            ", ".join(sorted(names)), WIDTH, initial_indent=f"  {head:<16}", subsequent_indent=" " * 18
        )
    return "\n".join(lines)


def values_text(tree: DictConfig) -> str:
    """One setting a line, with its value in `tree` and its meaning; sections apart, what belongs to none last."""
    blocks: list[list[str]] = []
    rows = _rows(schema.Config, tree, "", meanings(), blocks)
    return "\n\n".join("\n".join(block) for block in [*blocks, rows] if block)


def _rows(
    kind: type, node: DictConfig, prefix: str, texts: dict[str, dict[str, str]], blocks: list[list[str]]
) -> list[str]:
    """The lines of one section; those of sections inside it are added to `blocks`."""
    rows = []
    for name, hint in typing.get_type_hints(kind).items():
        parts = (hint, *typing.get_args(hint))
        inner = next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)
        if name not in node:
            continue
        value = node[name]
        if inner and isinstance(value, DictConfig):
            place = len(blocks)
            blocks.insert(place, _rows(inner, value, f"{prefix}{name}.", texts, blocks))
        else:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            rows.append(_line(prefix + name, plain, texts[kind.__name__][name]))
    return rows


def _line(name: str, value: Any, meaning: str) -> str:
    """name=value, then the meaning in a column of its own."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    shown = shown.replace(", ", ",") if isinstance(value, list) else shown
    head = f"  {name}={shown}"
    text = textwrap.wrap(meaning, WIDTH - _INDENT, break_on_hyphens=False)
    if len(head) + 2 <= _INDENT and text:
        head = f"{head:<{_INDENT}}{text.pop(0)}"
    return "\n".join([head, *(" " * _INDENT + row for row in text)])


def register() -> None:
    """Make `${swift_groups:}` and `${swift_values:}` known, which the help text in conf/config.yaml is made of."""

    def values(*, _root_: DictConfig) -> str:
        # Hydra fills in $NAMEs afterwards.
        return values_text(_root_).replace("$", "$$")

    OmegaConf.register_new_resolver("swift_groups", groups_text, replace=True)
    OmegaConf.register_new_resolver("swift_values", values, replace=True)

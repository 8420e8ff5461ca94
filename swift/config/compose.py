"""From Hydra's composed tree to the typed settings, and to the frozen file of a run directory."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from swift.config.check import check
from swift.config.derive import fill_grid, fill_maps, fill_step, quoted, refuse_truth_values, take_model, take_v1_input
from swift.config.names import refuse_unknown
from swift.config.schema import Config
from swift.utils.errors import UserError
from swift.utils.files import replace_text

FROZEN = "config.yaml"
"""The settings of a run, in its directory."""
CHECKPOINTS = "checkpoints"
"""What a run goes on from, in its directory."""

_LEGAL = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[int]: "a list of integers such as [6,6,6,1]",
    list[str]: "a list of texts such as [sub-01,sub-02]",
    list[float]: "a list of numbers such as [0.9,0.95]",
}


def conf_dir() -> Path:
    """Folder of the YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def typed(tree: DictConfig, overrides: Sequence[str] | None = None, model: bool = True) -> Config:
    """Typed and checked settings of a composed tree.

    Args:
        tree: Composed by Hydra, or read from a run.
        overrides: Those it was composed with; init= then brings its model along, or v1's input.
            None: of a run, which has its own.
        model: Check the model too; False: it plays no part.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value, or values that contradict each other.
    """
    plain: Any = None
    try:
        if overrides is not None:
            take_model(tree, overrides)
            take_v1_input(tree, overrides)
        plain = OmegaConf.to_container(tree, resolve=True)
        plain.pop("hydra", None)
        if isinstance(plain.get("data"), dict):
            fill_grid(plain["data"])
        fill_maps(plain)
        fill_step(plain)
        refuse_truth_values(plain)
        # Merged into the schema's own (closed) tree: `+model.foo=1` is an unknown key here although Hydra allows it.
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise UserError(_complaint(error, plain)) from error
    assert isinstance(cfg, Config)
    check(cfg, model)
    return cfg


def composed(overrides: Sequence[str], folder: Path | None = None, model: bool = True) -> tuple[Config, Any]:
    """Typed settings of Hydra overrides, and the launcher's section as it stands (None without one).

    Args:
        overrides: As typed.
        folder: With YAML files of one's own beside those of swift (--config-dir).
        model: As in `typed`.

    Raises:
        UserError: Hydra or the checks refuse them.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    if folder is not None and not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")
    refuse_unknown([*(["--config-dir", str(folder)] if folder else []), *overrides], conf_dir())
    overrides = quoted(overrides)
    search = [] if folder is None else [f"hydra.searchpath=['file://{folder.absolute()}']"]
    try:
        with initialize_config_dir(str(conf_dir()), version_base=None):
            tree = compose("config", [*search, *overrides])
        return typed(tree, overrides, model), OmegaConf.select(tree, "launcher")
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(" ".join(lines[:20])) from error


def _complaint(error: OmegaConfBaseException, plain: Any) -> str:
    """One line for an error of OmegaConf: the value, and what is legal in its place."""
    key = re.sub(r"\[\d+\]$", "", getattr(error, "full_key", None) or "")
    *sections, name = key.split(".")
    where: Any = Config
    value = plain
    for section in sections:
        hint = typing.get_type_hints(where)[section] if is_dataclass(where) else where
        inner = [part for part in typing.get_args(hint) if is_dataclass(part)]
        where, value = inner[0] if inner else hint, value[section] if value else None
    if plain is None or not is_dataclass(where):
        return f"{key or 'configuration'}: {str(error).splitlines()[0]}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing: give it a value with {key}=..."
    given = f"{key}={value.get(name)}"
    if isinstance(error, ConfigKeyError):
        of = f" of {'.'.join(sections)}" if sections else ""
        return f"{given}: no such setting; those{of} are {', '.join(field.name for field in fields(where))}"
    kind = typing.get_type_hints(where)[name]
    wanted = [_LEGAL.get(part, "a section") for part in typing.get_args(kind) if part is not type(None)]
    if typing.get_origin(kind) is typing.Union:
        return f"{given}: must be {wanted[0]}, or null"
    return f"{given}: must be {_LEGAL.get(kind, 'a section')}"


def whole_paths(cfg: Config) -> Config:
    """The settings with absolute paths: a run that goes on may be started from another folder."""

    def whole(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path else path

    mixture = [replace(cohort, path=str(Path(cohort.path).absolute())) for cohort in cfg.data.mixture]
    data = replace(cfg.data, path=whole(cfg.data.path), split=whole(cfg.data.split), mixture=mixture)
    task = cfg.task
    if task.target is not None:
        target = task.target
        target = replace(target, events=whole(target.events), maps=whole(target.maps), retest=whole(target.retest))
        task = replace(task, target=target)
    return replace(cfg, data=data, task=task, init=whole(cfg.init))


def freeze(cfg: Config, path: Path) -> None:
    """Write the settings as YAML that `load_frozen` and Hydra's --config-path read back; all of it or nothing."""
    replace_text(path, OmegaConf.to_yaml(OmegaConf.structured(whole_paths(cfg))))


def load_frozen(run_dir: Path, overrides: Sequence[str]) -> Config:
    """Settings of an existing run with `SECTION.NAME=VALUE` overrides on top, or `parallel=NAME` for another strategy.

    Raises:
        UserError: no (readable) frozen configuration there, or an override that a resumed run cannot have.
    """
    path = run_dir / FROZEN
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no {FROZEN}")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} holds no settings")
    # How a run is spread over devices is no part of what it computes: the one group that may change.
    for override in overrides:
        if override.startswith("parallel="):
            tree.parallel = strategy_settings(override.removeprefix("parallel="))
    overrides = [override for override in overrides if not override.startswith("parallel=")]
    for override in overrides:
        key = override.partition("=")[0]
        section = key.partition(".")[0]
        if key.startswith(("+", "~")) or "/" in key or isinstance(OmegaConf.select(tree, key), DictConfig):
            raise UserError(f"{override}: a resumed run keeps its own configuration; only single values can be changed")
        if section in ("model", "run_dir", "init"):
            raise UserError(f"{override}: a resumed run keeps its model, its weights and its folder")
        if key == "data.brain" and override.partition("=")[2] != OmegaConf.select(tree, key, default="scan"):
            raise UserError(f"{override}: a resumed run keeps the tokens of its model")
    try:
        tree.merge_with_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    return typed(tree)


def strategy_settings(name: str) -> DictConfig:
    """What conf/parallel has under a name.

    Raises:
        UserError: there is no such strategy.
    """
    folder = conf_dir() / "parallel"
    known = sorted(path.stem for path in folder.glob("[!_]*.yaml"))
    if name not in known:
        raise UserError(f"parallel={name}: must be one of {', '.join(known)}")
    own = OmegaConf.load(folder / f"{name}.yaml")
    assert isinstance(own, DictConfig)
    del own["defaults"]
    merged = OmegaConf.merge(OmegaConf.load(folder / "_common.yaml"), own)
    assert isinstance(merged, DictConfig)
    return merged


def differences(before: Config, after: Config) -> list[str]:
    """Names of the values that differ, as SECTION.NAME."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not is_dataclass(value):
            return {name: value}
        found: dict[str, Any] = {}
        for field in fields(value):
            found |= flat(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
        return found

    old, new = flat(whole_paths(before), ""), flat(whole_paths(after), "")
    return sorted(name for name in old if old[name] != new[name])


LEFT_OPEN = (("trainer", "log_every"), ("parallel", "compile"), ("model", "cohort"))
"""Settings whose null a run replaces by what suits its machine or its stores, and freezes."""


def as_begun(cfg: Config, run_dir: Path) -> Config:
    """The settings with what they leave open as the run of a folder has settled it, if there is one that has begun.

    Raises:
        UserError: its settings cannot be read.
    """
    if not (run_dir / FROZEN).exists():
        return cfg
    before = load_frozen(run_dir, [])
    for section, name in LEFT_OPEN:
        part = getattr(cfg, section)
        if getattr(part, name) is None:
            settled = getattr(getattr(before, section), name)
            cfg = replace(cfg, **{section: replace(part, **{name: settled})})
    return cfg


def writable(folder: Path) -> bool:
    """Whether `folder` can be written, or could be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)

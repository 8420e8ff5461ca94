"""From Hydra's composed tree to the typed settings, and to the frozen file of a run directory."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swift.config.check import check
from swift.config.schema import Config
from swift.utils.errors import UserError

FROZEN = "config.yaml"


def conf_dir() -> Path:
    """Folder of the YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def typed(tree: DictConfig) -> Config:
    """Typed and checked settings of a composed tree.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value, or values that contradict each other.
    """
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    try:
        # Merged into the schema's own (closed) tree: `+model.foo=1` is an unknown key here although Hydra allows it.
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(cfg, Config)
    check(cfg)
    return cfg


def freeze(cfg: Config, path: Path) -> None:
    """Write the settings as YAML that `load_frozen` and Hydra's --config-path read back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))


def load_frozen(run_dir: Path, overrides: list[str]) -> Config:
    """Settings of an existing run with `SECTION.NAME=VALUE` overrides on top.

    Raises:
        UserError: no frozen configuration there, or an override that names a group.
    """
    path = run_dir / FROZEN
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no {FROZEN}")
    tree = OmegaConf.load(path)
    for override in overrides:
        key = override.partition("=")[0]
        if OmegaConf.is_config(OmegaConf.select(tree, key)) or key.startswith(("+", "~")):
            raise UserError(f"{override}: a resumed run keeps its own configuration; only single values can be changed")
    tree.merge_with_dotlist(overrides)
    assert isinstance(tree, DictConfig)
    return typed(tree)

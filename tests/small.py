"""A run small enough for a test: a synthetic store of two scans on a 12^3 grid, a model of two stages."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from swift.config.compose import conf_dir, typed
from swift.config.schema import Config
from swift.data.synthetic import CohortSpec, write_store
from swift.utils import jsonl

GRID = (12, 12, 12)
MODEL = [
    "model.embed_dim=12",
    "model.depths=[1,2]",
    "model.num_heads=[1,2]",
    "model.patch_size=[4,4,4,2]",
    "model.window=[2,2,2,2]",
    "model.decoder_dim=16",
]
DATA = [
    "data.grid=[12,12,12]",
    "data.spacing=4.0",
    "data.frames=8",
    "data.clip_stride=4",
    "data.val_gap=4",
    "data.workers=0",
]
TRAINER = ["trainer.max_steps=6", "trainer.val_every=3", "trainer.log_every=1", "optimizer.warmup_steps=2"]


def small_store(folder: Path) -> Path:
    """Two scans of 48 frames, with different brain masks, and little in them but slow, smooth networks."""
    quiet = {"noise_white": 0.1, "noise_smooth": 0.1, "drift": 0.0, "motion": 0.0, "signal": 3.0}
    write_store(CohortSpec(n_subjects=2, frames=48, grid=GRID, spacing=4.0, seed=3, sites=1, **quiet), folder)
    return folder


VALUE = re.compile(r"(?!hydra\.)(\w+(\.\w+)+|run_dir|init|resume|seed)=.*", re.DOTALL)
"""An override of a value; the others choose from groups, and Hydra composes anew for them."""


def composed(*overrides: str) -> DictConfig:
    """Hydra's tree for these overrides, as `python -m swift.train` gets it.

    Composed once a process for the same groups; Hydra's own function then sets the values, in a twentieth of the time.
    """
    values = [override for override in overrides if VALUE.fullmatch(override)]
    tree = copy.deepcopy(_composed(tuple(override for override in overrides if not VALUE.fullmatch(override))))
    ConfigLoaderImpl._apply_overrides_to_config([_parsed(value) for value in values], tree)
    return tree


@functools.lru_cache(maxsize=100)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base=None):
        return compose("config", list(overrides))


@functools.lru_cache(maxsize=1000)
def _parsed(override: str) -> Override:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert not parsed.is_sweep_override(), override
    return parsed


def command(store: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The overrides of a small run."""
    return ["data=store", f"data.path={store}", f"run_dir={run_dir}", *MODEL, *DATA, *TRAINER, *overrides]


def settings(*overrides: str) -> Config:
    """Typed settings of a small run on a store that need not exist."""
    return typed(composed(*command(Path("nowhere"), Path("nowhere-run"), *overrides)))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the training itself: step, train/... and val/..., not of time and speed."""
    records = []
    for record in jsonl.read(run_dir / "metrics.jsonl"):
        kept = {key: value for key, value in record.items() if key.startswith(("train/", "val/"))}
        if kept:
            records.append({"step": record["step"], **kept})
    return records

"""A trained model from wherever it was left, ready to be used: its weights, its settings and what it must be given."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from swift.config.compose import FROZEN, load_frozen, typed
from swift.config.schema import Config
from swift.inference.contract import Contract
from swift.models.encoder import SwinEncoder
from swift.models.heads import build_model
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.read import PREFIX, CheckpointWeights, FileWeights, Weights, find_checkpoint, metadata_of
from swift.utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A model to be used, on the CPU, float32, in eval mode.

    Attributes:
        source: Where it came from, a path.
        model: Encoder, and a decoder or a head. Of SwiFT v1 only the encoder has its weights.
        config: Settings of its run.
        contract: What it must be given.
        step: Optimizer steps it was trained for; None: not known (SwiFT v1).
        target: Of a fine-tuned model: its classes, or mean and std of the labels it was trained on.
    """

    source: str
    model: Any
    config: Config
    contract: Contract
    step: int | None
    target: dict[str, Any] = field(default_factory=dict)

    @property
    def encoder(self) -> SwinEncoder:
        """The part that all tasks share."""
        found: SwinEncoder = self.model.encoder
        return found


def load_trained(path: str | Path, which: str = "latest", config: str | Path | None = None) -> Trained:
    """Load a model for use.

    Args:
        path: A run directory, its folder of checkpoints, one checkpoint, a file of `python -m swift.export`, or a SwiFT
            v1 file.
        which: latest | best | the name of a checkpoint of a run.
        config: SwiFT v1 files only, which say nothing of their input: settings (a run directory or its config.yaml).

    Raises:
        UserError: nothing readable there, no input contract, or weights that do not fit their own settings.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or file")
    if path.is_file() and path.suffix != ".safetensors":
        return _load_v1(path, config)
    if config is not None:
        raise UserError(f"--config {config}: {path} carries its own settings; only SwiFT v1 files need some")
    weights: Weights
    if path.is_file():
        weights = FileWeights(path)
        said = weights.metadata
    else:
        weights = CheckpointWeights(*find_checkpoint(path, which))
        said = metadata_of(weights.manifest)
    needed = ("config", "contract") if said.get("origin") == "SwiFT v1" else ("config", "contract", "step")
    missing = [name for name in needed if not said.get(name)]
    if missing:
        raise UserError(f"{path} has no {' and no '.join(missing)} beside its weights: swift made no such file")
    from omegaconf import OmegaConf

    cfg = typed(OmegaConf.create(said["config"]))
    contract = Contract.of(said["contract"], path)
    model = _empty(cfg)
    _fill(model, weights, path)
    return Trained(str(path), model.eval(), cfg, contract, said.get("step"), said.get("target") or {})


def fingerprint(trained: Trained) -> str:
    """A hash of the encoder's parameters: which weights these are, wherever they were read from."""
    digest = xxhash.xxh3_64()
    for name, parameter in trained.encoder.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _empty(cfg: Config) -> nn.Module:
    """The model of these settings on the CPU, its parameters without values."""
    with torch.device("meta"):
        model = build_model(cfg.model, cfg.task, cfg.data.grid, cfg.data.frames)
    return model.to_empty(device="cpu")


def _fill(model: nn.Module, weights: Weights, source: object) -> None:
    """Give a model all its parameters.

    Raises:
        UserError: weights of another architecture.
    """
    own = {PREFIX + name: parameter for name, parameter in model.named_parameters()}
    checkpoint.compare_shapes(source, weights.shapes, {name: list(one.shape) for name, one in own.items()})
    for name, parameter in own.items():
        parameter.detach().view(-1).copy_(weights.read(name, 0, parameter.numel()))


def _load_v1(path: Path, config: str | Path | None) -> Trained:
    from swift.models.v1 import has_v1_names, load_v1, read_weights

    try:
        tensors = read_weights(path)
    except ValueError as error:
        raise UserError(f"{error}: a model is a run, a checkpoint, a .safetensors file or a SwiFT v1 file") from error
    if config is None:
        raise UserError(
            f"{path}: a SwiFT v1 file does not say what its model must be given: add --config RUN, a run directory or "
            "a config.yaml with its model=v1, data.grid, data.frames, ..."
        )
    config = Path(config)
    cfg = load_frozen(config.parent if config.name == FROZEN else config, [])
    model = build_model(cfg.model, cfg.task, cfg.data.grid, cfg.data.frames)
    try:
        report = load_v1(model.encoder, tensors)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    used = [name for name in report.missing if cfg.model.final_norm or not name.startswith("norm.")]
    if used:
        raise UserError(f"{path}: the settings of {config} want {len(used)} tensors more, such as {used[0]}")
    data = cfg.data
    if has_v1_names(tensors):
        contract = Contract.of_swift_v1(data.grid, data.frames, data.frame_stride)
        log.info("%s: SwiFT v1 was trained on %s", path, contract)
    else:
        x, y, z = data.grid
        contract = Contract(
            (x, y, z), data.spacing, data.frames, data.frame_stride, data.normalization, data.background
        )
    return Trained(str(path), model.eval(), cfg, contract, None)

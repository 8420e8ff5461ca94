"""Weights from wherever a run left them: a run's checkpoints, an exported file, or tensors in memory.

All are read by name and flat range, so that a rank takes the elements that it holds. Nothing here unpickles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swift.config.schema import ModelConfig
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.files import WEIGHT, Damaged, Manifest, Reader
from swift.utils.errors import UserError

FORMAT = "swift-weights-1"
PREFIX = "model."
"""Of a parameter of the training module; exported files carry the names of the model itself."""


class Weights(Protocol):
    """Named tensors that can be read in parts; names are those of the training module."""

    shapes: dict[str, list[int]]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements start..stop of a tensor."""


class TensorWeights:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements start..stop of a tensor."""
        return self.tensors[name].reshape(-1)[start:stop]


class CheckpointWeights:
    """The fp32 weights of a checkpoint.

    Args:
        path: Folder of one checkpoint, as `find_checkpoint` gives it.
        manifest: Its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest, self.shapes = path, manifest, manifest.shapes
        self._reader = Reader(path, manifest)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements start..stop of a tensor.

        Raises:
            UserError: the checkpoint is damaged.
        """
        try:
            parts = [part for _, part in self._reader.read(WEIGHT, name, start, stop)]
        except Damaged as error:
            raise UserError(f"{self.path} is damaged: {error}") from error
        return torch.cat(parts) if parts else torch.empty(0)


class FileWeights:
    """An exported file.

    Attributes:
        path: Of the file.
        metadata: config, contract, step and score of the run, as plain values.

    Raises:
        UserError: no file of ours there, or a pickle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            raw = self._file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is no safetensors file ({str(error).splitlines()[0]}): pickled weights are refused, as they "
                "can run code; make a file with python -m swift.export RUN --out FILE.safetensors"
            ) from error
        if raw.get("format") != FORMAT:
            raise UserError(f"{path} was not written by swift.export: its format is {raw.get('format')}, not {FORMAT}")
        self.metadata: dict[str, Any] = {name: json.loads(text) for name, text in raw.items() if name != "format"}
        self.shapes = {PREFIX + name: list(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, as it is in the file."""
        found: Tensor = self._file.get_tensor(name.removeprefix(PREFIX))
        return found

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements start..stop of a tensor."""
        return self.tensor(name).reshape(-1)[start:stop]


def metadata_of(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint says of its model: config, contract (with the TR of its training scans, if recorded), step.

    And, where recorded, the subjects that it was trained on, and the classes or the scale of its target.
    """
    state = manifest.state
    data = next((value for value in state.values() if isinstance(value, dict) and "contract" in value), {})
    contract = data.get("contract", {})
    tr = {"tr": data["tr"]} if contract and data.get("tr") else {}
    found = {"config": state["config"], "contract": contract | tr, "step": manifest.step}
    optional = {"subjects": data.get("subjects"), "target": state.get("target")}
    return found | {name: value for name, value in optional.items() if value}


def weights_metadata(weights: Weights) -> dict[str, Any]:
    """What comes with weights beside the tensors, as `metadata_of` has it; {} where nothing does."""
    if isinstance(weights, CheckpointWeights):
        return metadata_of(weights.manifest)
    return weights.metadata if isinstance(weights, FileWeights) else {}


def check_attention(weights: CheckpointWeights | FileWeights, model: ModelConfig) -> None:
    """Refuse weights whose attention scores were divided by something else: no tensor would show it.

    Raises:
        ValueError: the muP base width there and here.
    """
    config = weights.manifest.state["config"] if isinstance(weights, CheckpointWeights) else weights.metadata["config"]
    there = config["model"].get("attention_base_width")
    # At the base width itself scores are divided as without muP.
    if (there or model.embed_dim) != (model.attention_base_width or model.embed_dim):
        names = ["null" if width is None else width for width in (there, model.attention_base_width)]
        raise ValueError(
            f"trained with model.attention_base_width={names[0]}, which divides attention scores otherwise than "
            f"{names[1]} here: give model.attention_base_width={names[0]} (with optimizer=adamw_mup: "
            f"optimizer.base_width={names[0]})"
        )


def find_checkpoint(path: Path, which: str = "latest") -> tuple[Path, Manifest]:
    """A whole checkpoint of a run.

    Args:
        path: A run directory, its folder of checkpoints, or one checkpoint.
        which: latest | best | the name of a checkpoint.

    Raises:
        UserError: none there, or all of them damaged.
    """
    if (path / checkpoint.MANIFEST).exists():
        return path, _first_undamaged([path])[1]
    folder = next((place for place in (path / "checkpoints", path) if checkpoint.exists(place)), None)
    if folder is None:
        raise UserError(f"{path} holds no checkpoint of swift")
    found = checkpoint.candidates(folder)
    if which == "best":
        best = checkpoint.best(folder)
        if best is None:
            raise UserError(f"{folder}: no checkpoint has a score, as none was saved after a validation; take latest")
        found = [best]
    elif which != "latest":
        found = [folder / which]
    return _first_undamaged(found)


def _first_undamaged(found: list[Path]) -> tuple[Path, Manifest]:
    damage = []
    for path in found:
        try:
            manifest = Manifest.read(path)
            checkpoint.verify(path, manifest)
        except Damaged as error:
            damage.append(f"{path.name}: {error}")
            continue
        return path, manifest
    raise UserError(f"{found[0].parent}: no checkpoint can be read ({'; '.join(damage)})")

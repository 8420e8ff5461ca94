"""Weights from wherever a run left them: a run's checkpoints, an exported file, or tensors in memory.

All are read by name and flat range, so that a rank takes the elements that it holds. Nothing here unpickles.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swift.config.schema import ModelConfig
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.files import WEIGHT, Damaged, Manifest, Reader
from swift.parallel.checkpoint.write import SEAL, broken_seal
from swift.utils.errors import UserError

log = logging.getLogger(__name__)

FORMAT = "swift-weights-2"
_UNSEALED = "swift-weights-1"
"""Files of before they carried a checksum."""
PREFIX = "model."
"""Of a parameter of the training module; exported files carry the names of the model itself."""


class Weights(Protocol):
    """Named tensors that can be read in parts; names are those of the training module."""

    shapes: dict[str, list[int]]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements start..stop of a tensor."""


class TensorWeights:
    """Tensors in memory, and what is known of them (`metadata_of`)."""

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
        self.tensors, self.metadata = tensors, metadata or {}
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
        metadata: config, contract, step and score of the run, as plain values; and `subjects`, those it was trained on,
            where their list is kept beside the file (`subjects_file`).

    Raises:
        UserError: no file of ours there, a damaged one, or a pickle.
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
        if raw.get("format") not in (FORMAT, _UNSEALED):
            raise UserError(f"{path} was not written by swift.export: its format is {raw.get('format')}, not {FORMAT}")
        seal = raw.pop(SEAL, "")
        if raw.pop("format") == _UNSEALED:
            log.warning("%s carries no checksum, as an earlier version of swift wrote it: damage is not seen", path)
        elif broken_seal(path, seal):
            raise UserError(f"{path} is damaged: it has another checksum than swift.export gave it; copy it again")
        self.metadata: dict[str, Any] = {name: json.loads(text) for name, text in raw.items()}
        self.metadata |= _subjects_beside(path, seal)
        self.shapes = {PREFIX + name: list(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, as it is in the file."""
        found: Tensor = self._file.get_tensor(name.removeprefix(PREFIX))
        return found

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements start..stop of a tensor."""
        return self.tensor(name).reshape(-1)[start:stop]


def subjects_file(path: Path) -> Path:
    """Where the training subjects of an exported file are listed: beside it, as it is shared and they are not."""
    return path.with_name(f"{path.stem}.subjects.json")


def _subjects_beside(path: Path, seal: str) -> dict[str, list[str]]:
    """{"subjects": [...]}; {} where there is no list, or that of another file."""
    listed = subjects_file(path)
    if not listed.is_file():
        return {}
    try:
        content = json.loads(listed.read_text(encoding="utf-8"))
        subjects, weights = [str(name) for name in content["subjects"]], content["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listed} is no list of training subjects ({error})") from error
    if weights != seal:
        raise UserError(f"{listed} belongs to another file than {path.name}: their checksums differ")
    return {"subjects": subjects}


def metadata_of(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint says of its model: config, contract (with the TR of its training scans, if recorded), step.

    And, where recorded, the subjects that it was trained on, and the classes or the scale of its target.
    """
    state = manifest.state
    data = next((value for value in state.values() if isinstance(value, dict) and "contract" in value), {})
    contract = data.get("contract", {})
    beside = {name: data[name] for name in ("tr", "placement") if contract and data.get(name)}
    found = {"config": state["config"], "contract": contract | beside, "step": manifest.step}
    optional = {"subjects": data.get("subjects"), "target": state.get("target")}
    return found | {name: value for name, value in optional.items() if value}


def weights_metadata(weights: Weights) -> dict[str, Any]:
    """What comes with weights beside the tensors, as `metadata_of` has it; {} where nothing does."""
    if isinstance(weights, CheckpointWeights):
        return metadata_of(weights.manifest)
    return weights.metadata if isinstance(weights, FileWeights | TensorWeights) else {}


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
    """A whole checkpoint of a run: the one that is asked for, never another one in its place.

    Args:
        path: A run directory, its folder of checkpoints, or one checkpoint.
        which: latest | best | the name of a checkpoint.

    Raises:
        UserError: none there, or it is damaged; then the newest one that is whole is named.
    """
    if (path / checkpoint.MANIFEST).exists():
        return path, _whole(path, [])
    folder = next((place for place in (path / "checkpoints", path) if checkpoint.exists(place)), None)
    if folder is None:
        raise UserError(f"{path} holds no checkpoint of swift")
    found = checkpoint.finished(folder)
    if which == "best":
        chosen = _best(folder, found)
    elif which == "latest":
        chosen = folder / (checkpoint.latest_name(folder) or found[0].name)
    else:
        chosen = folder / which
    return chosen, _whole(chosen, found)


def _best(folder: Path, found: list[Path]) -> Path:
    for path in found:
        try:
            Manifest.read(path)
        except Damaged as error:
            raise UserError(
                f"{path} is damaged ({error}): which checkpoint is the best is not known; --which NAME takes one"
            ) from error
    best = checkpoint.best(folder)
    if best is None:
        raise UserError(f"{folder}: no checkpoint has a score, as none was saved after a validation; take latest")
    return best


def _whole(path: Path, others: list[Path]) -> Manifest:
    try:
        manifest = Manifest.read(path)
        checkpoint.verify(path, manifest)
    except Damaged as error:
        other = next((other for other in others if other != path and _is_whole(other)), None)
        hint = f"; {other} is whole (--which {other.name})" if other else "; no other one is whole" if others else ""
        raise UserError(f"{path} is damaged ({error}){hint}") from error
    return manifest


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.verify(path, Manifest.read(path))
    except (Damaged, UserError):
        return False
    return True

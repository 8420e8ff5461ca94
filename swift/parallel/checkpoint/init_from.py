"""The weights a task begins with: the encoder of another run or file, or the whole of one that did the same task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.config.schema import Config
from swift.models.adapt import is_lora, plain_name
from swift.models.encoder import SwinEncoder
from swift.models.v1 import INPUT, has_v1_names, load_v1, read_weights
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.files import describe_differences
from swift.parallel.checkpoint.read import (
    CheckpointWeights,
    FileWeights,
    TensorWeights,
    Weights,
    check_attention,
    find_checkpoint,
    metadata_of,
)

TR_TOLERANCE = 0.01
"""Relative difference of two TRs that count as the same."""
ENCODER = "model.encoder."
MAPS = "model.linear."
_TIME_TABLES = ("position.time", "position.t")
_CONTRACT = (
    "grid",
    "spacing",
    "orientation",
    "placement",
    "frames",
    "frame_stride",
    "normalization",
    "background",
)


@dataclass
class TaskWeights:
    """Weights for a module, by the names of its parameters.

    Attributes:
        shapes: What there is to take; other parameters keep their initial values.
        remarks: What was taken and what was not, a sentence each.
        seen: Subjects the weights were trained on; None: not recorded.
    """

    source: Weights
    names: dict[str, str]
    shapes: dict[str, list[int]]
    remarks: list[str]
    seen: list[str] | None
    merged: dict[str, float] = field(default_factory=dict)
    """Names whose low-rank change is added, with its factor."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements start..stop of a parameter."""
        there = self.names[name]
        part = self.source.read(there, start, stop)
        if name not in self.merged:
            return part
        stem = there.removesuffix("base_layer.weight")
        whole = [self._matrix(f"{stem}lora_{side}.default.weight") for side in "BA"]
        change = (whole[0] @ whole[1]).flatten() * self.merged[name]
        return part + change[start:stop]

    def _matrix(self, name: str) -> Tensor:
        shape = self.source.shapes[name]
        return self.source.read(name, 0, torch.Size(shape).numel()).float().view(shape)


def open_weights(path: Path, cfg: Config) -> tuple[Weights, dict[str, Any], list[str]]:
    """The weights of a run, a checkpoint, an exported file, or of SwiFT v1; what is known of them; remarks.

    Raises:
        ValueError: nothing readable there.
    """
    if not path.is_file():
        if not (path / checkpoint.MANIFEST).is_file() and not checkpoint.exists(path / "checkpoints"):
            raise ValueError("neither a file nor a run with a checkpoint")
        found = CheckpointWeights(*find_checkpoint(path))
        check_attention(found, cfg.model)
        return found, metadata_of(found.manifest), []
    if path.suffix == ".safetensors":
        file = FileWeights(path)
        check_attention(file, cfg.model)
        return file, file.metadata, []
    tensors = read_weights(path)
    if any(key.startswith(ENCODER) for key in tensors):
        return TensorWeights(tensors), {}, []
    encoder = SwinEncoder(cfg.model, cfg.data.grid, cfg.data.frames)
    report = load_v1(encoder, tensors)
    kept = {name: value for name, value in encoder.state_dict().items() if name not in report.missing}
    known = {"contract": INPUT} if has_v1_names(tensors) else {}
    return (
        TensorWeights({ENCODER + name: value for name, value in kept.items()}, known),
        known,
        str(report).splitlines(),
    )


def task_weights(path: Path, cfg: Config, here: Mapping[str, list[int]]) -> TaskWeights:
    """What a task takes from `path`.

    A source that did the same task with the same adaptation gives everything; any other one its encoder, low-rank
    changes added to it. A table of positions in time may be longer there: its first rows are taken.

    Args:
        path: Run, checkpoint or file.
        cfg: Of the task.
        here: Name -> shape of the parameters of the task's module.

    Raises:
        ValueError: nothing readable, or another architecture: names the first five tensors that differ.
    """
    source, known, remarks = open_weights(path, cfg)
    there = source.shapes
    seen = known.get("subjects")
    before = known.get("config", {}).get("task", {}).get("name")
    if before == cfg.task.name and dict(there) == dict(here):
        remarks.append(f"the whole model of the same task: {len(here)} tensors taken")
        return TaskWeights(source, {name: name for name in here}, dict(here), remarks, seen)
    plain = {plain_name(name): name for name in there if name.startswith(ENCODER) and not is_lora(name)}
    wanted = {name: plain_name(name) for name in here if name.startswith(ENCODER) and not is_lora(name)}
    names = {name: plain[own] for name, own in wanted.items() if own in plain}
    different = [
        name for name, own in wanted.items() if own not in plain or not _fits(own, there[plain[own]], here[name])
    ]
    different += [name for own, name in plain.items() if own not in wanted.values()]
    if remarks:  # weights of SwiFT v1: its report has named what they lack
        different = [name for name in different if wanted.get(name, name) in plain]
    maps = {name: name for name in here if name.startswith(MAPS)}
    if any(name not in there for name in maps):
        raise ValueError("task.courses=true with model.maps_of=shared: there are no shared maps there")
    different += [name for name in maps if not _fits(name, there[name], here[name])]
    if different:
        shapes = {name: there[names.get(name, name)] for name in different if names.get(name, name) in there}
        raise ValueError(f"another architecture: {describe_differences(different, shapes, here)}")
    merged = {}
    if any(is_lora(name) for name in there):
        task = known["config"]["task"]
        factor = task["lora_alpha"] / task["lora_rank"]
        merged = {name: factor for name, own in names.items() if own.endswith(".base_layer.weight")}
        remarks.append(f"low-rank changes of {len(merged)} tensors added to the encoder")
    left = sorted({name.split(".")[1] for name in there if not name.startswith(ENCODER) and name not in maps})
    new = sorted({name.split(".")[1] for name in here if not name.startswith(ENCODER) and name not in maps})
    count = sum(torch.Size(here[name]).numel() for name in names)
    remarks.append(f"encoder taken: {len(names)} tensors, {count:,} parameters" + (", and shared maps" if maps else ""))
    names |= maps
    remarks.append(f"left out there: {', '.join(left) or 'nothing'}; new here: {', '.join(new)}")
    return TaskWeights(source, names, {name: here[name] for name in names}, remarks, seen, merged)


def contract_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How clips differ from those of training, by both contracts, with `tr` and `placement` where known.

    A TR differs where some scan's lies more than 1 % outside the range of training.
    """
    known = [name for name in _CONTRACT if name in there and name in here]
    changed = [f"{name} {there[name]} -> {here[name]}" for name in known if there[name] != here[name]]
    if there.get("tr") and here.get("tr"):
        (low, high), (least, most) = there["tr"], here["tr"]
        if least < low * (1 - TR_TOLERANCE) or most > high * (1 + TR_TOLERANCE):
            changed.append(f"TR {low:g} to {high:g} s -> {least:g} to {most:g} s")
    return changed


def _fits(name: str, there: list[int], here: list[int]) -> bool:
    if name.endswith(_TIME_TABLES) and len(there) == 2:
        return there[1:] == here[1:] and there[0] >= here[0]
    return list(there) == list(here)

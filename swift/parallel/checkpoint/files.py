"""Checkpoints that survive: the folder, its files and its rules. Knows neither Lightning nor DeepSpeed.

A folder of checkpoints holds

    step-0000400/
        manifest.json          what is in it: state of the run, shapes, which file holds which part, checksums
        rank-00000.safetensors what each rank held: flat parts of fp32 weights and Adam moments, by parameter name
    latest                     name of the checkpoint to go on from

A checkpoint is written to a folder of another name, every file is flushed to the disk, the manifest is written last,
the folder is renamed, and only then `latest` is replaced. So `latest` always names a whole checkpoint, whenever the run
is killed. One that is damaged later (checksums) is recognised, and the one before is taken.

The parts carry names and flat positions, no layout of any strategy: what was saved by 2 ranks under ZeRO 1 is read by 4
ranks under ZeRO 3, each reading the ranges it needs.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swift.parallel.checkpoint.write import Written, disk_error, file_xxh3, write_text
from swift.utils.errors import UserError
from swift.utils.files import sync_folder

log = logging.getLogger(__name__)

LATEST = "latest"
MANIFEST = "manifest.json"
FORMAT = 1
WEIGHT = "weight"
_NAME = re.compile(r"step-(\d{7,})")
_UNFINISHED = ".unfinished-"


class Damaged(ValueError):
    """A checkpoint whose files are not what its manifest says; the message says which."""


@dataclass
class Piece:
    """A part of one parameter that a rank holds: flat elements from `start` on, of the weight and of its moments.

    Attributes:
        name: Of the parameter.
        shape: Of the whole parameter.
        start: First flat element.
        tensors: Kind (weight, exp_avg, exp_avg_sq) -> (n,) float32 views; a load fills them in place.
        owned: Whether this rank writes it; of equal copies one rank owns each.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    owned: bool = True

    @property
    def stop(self) -> int:
        """One past the last flat element."""
        return self.start + self.tensors[WEIGHT].numel()


@dataclass
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: Optimizer steps done.
        score: Of the validation at this step, lower is better; None without one.
        state: Everything that is no tensor: schedule, data position, settings, input contract.
        shapes: Parameter name -> shape, in the order of the model.
        files: File name -> bytes and checksum.
        ranges: File name -> tensor in it -> first and last flat element.
        world: Ranks that wrote it.
        optimizer_steps: What Adam's bias correction counts.
    """

    step: int
    score: float | None
    state: dict[str, Any]
    shapes: dict[str, list[int]]
    files: dict[str, Written]
    ranges: dict[str, dict[str, list[int]]]
    world: int
    optimizer_steps: int
    format: int = FORMAT
    _places: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict, repr=False)

    def text(self) -> str:
        """JSON, its first line the checksum of the second."""
        body = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        text = json.dumps(body, allow_nan=True)
        return f'{{"xxh3": "{xxhash.xxh3_64_hexdigest(text.encode())}", "manifest":\n{text}\n}}\n'

    @staticmethod
    def read(path: Path) -> Manifest:
        """The manifest of a checkpoint folder.

        Raises:
            Damaged: there is none, or it is not what was written.
            UserError: written by a later version of swift.
        """
        try:
            text = (path / MANIFEST).read_text(encoding="utf-8")
            _, body, _ = text.split("\n", 2)
            whole = json.loads(text)
        except (OSError, ValueError) as error:
            raise Damaged(f"{MANIFEST} cannot be read") from error
        if whole.get("xxh3") != xxhash.xxh3_64_hexdigest(body.encode()):
            raise Damaged(f"{MANIFEST} has another checksum")
        content = whole["manifest"]
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this version of swift reads {FORMAT}")
        content["files"] = {name: Written(*entry) for name, entry in content["files"].items()}
        return Manifest(**content)

    def places(self, key: str) -> list[tuple[int, int, str]]:
        """First and last flat element and file of every part of a tensor, in order."""
        if not self._places:
            for file, ranges in self.ranges.items():
                for name, (start, stop) in ranges.items():
                    self._places.setdefault(name, []).append((start, stop, file))
            for parts in self._places.values():
                parts.sort()
        return self._places.get(key, [])


def tensor_key(kind: str, name: str) -> str:
    """Name in a rank's file of a part of a parameter's weight or moment."""
    return f"{kind}/{name}"


def step_folder(step: int) -> str:
    """Name of the checkpoint of an optimizer step."""
    return f"step-{step:07d}"


def finished(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, newest first (they may have been damaged since)."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def latest_name(folder: Path) -> str | None:
    """The checkpoint that `latest` names; None where it cannot be read."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def candidates(folder: Path) -> list[Path]:
    """Checkpoints to go on from, the one that `latest` names first, then those before it."""
    found, named = finished(folder), latest_name(folder)
    places = [place for place, path in enumerate(found) if path.name == named]
    return found[places[0] :] if places else found


def exists(folder: Path) -> bool:
    """Whether a run has got as far as a checkpoint."""
    return bool(finished(folder))


def verify(path: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Compare every `parts`-th file, from `part` on, with its checksum.

    Raises:
        Damaged: a file is missing or has changed.
    """
    for name in list(manifest.files)[part::parts]:
        try:
            now = file_xxh3(path / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if now != manifest.files[name]:
            raise Damaged(f"{name} has another checksum")


def compare_shapes(source: object, there: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Make sure that weights were made by a model with these parameters.

    Args:
        source: Where they come from, for the message.
        there: Name -> shape of the weights.
        shapes: Name -> shape of the parameters of the model.

    Raises:
        UserError: the first five tensors that differ.
    """
    here = {name: list(shape) for name, shape in shapes.items()}
    different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if different:
        raise UserError(f"{source} is of another model: {describe_differences(different, there, here)}")


def describe_differences(names: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first five tensors that differ between a file (`there`) and a model (`here`), name -> shape."""

    def shape(shapes: Mapping[str, Any], name: str) -> str:
        return "×".join(map(str, shapes[name])) or "a scalar" if name in shapes else "nothing"

    some = "; ".join(f"{name} is {shape(there, name)} there, {shape(here, name)} here" for name in names[:5])
    return f"{len(names)} tensors differ ({some}{'; ...' if len(names) > 5 else ''})"


class Reader:
    """Reads flat ranges of the tensors of a checkpoint, from whichever files hold them."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Parts that make up flat elements start..stop: (first element, (n,) tensor).

        Raises:
            Damaged: a part is missing, or its file is not readable.
        """
        key, done = tensor_key(kind, name), start
        for first, last, file in self.manifest.places(key):
            if last <= done or first >= stop:
                continue
            if first > done:
                break
            end = min(last, stop)
            yield done, self.slice(file, key, done - first, end - first)
            done = end
        if done < stop:
            raise Damaged(f"elements {done} to {stop} of {key} are in no file")

    def slice(self, file: str, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements of a flat tensor as it lies in one file.

        Raises:
            Damaged: the file is not readable, or has no such tensor.
        """
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            part: Tensor = self._open[file].get_slice(key)[start:stop]
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{file} cannot be read ({error})") from error
        return part

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole tensor in its shape."""
        shape = self.manifest.shapes[name]
        out = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        for first, part in self.read(kind, name, 0, out.numel()):
            out[first : first + part.numel()] = part
        return out.view(shape)

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy what the checkpoint has into the tensors of the pieces.

        Raises:
            Damaged: it lacks a part of them.
        """
        for piece in pieces:
            for kind, target in piece.tensors.items():
                for first, part in self.read(kind, piece.name, piece.start, piece.stop):
                    at = first - piece.start
                    target[at : at + part.numel()].copy_(part)


def begin(folder: Path) -> Path:
    """A fresh folder to write a checkpoint to; what killed runs have left unfinished is removed.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        fresh = folder / f"{_UNFINISHED}{uuid.uuid4().hex[:8]}"
        fresh.mkdir()
    except OSError as error:
        raise disk_error(folder / "step", error) from error
    return fresh


def commit(folder: Path, fresh: Path, manifest: Manifest) -> Path:
    """Make a written checkpoint the latest: manifest, rename, pointer, each on the disk before the next.

    Returns:
        Where the checkpoint is now.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    path = folder / step_folder(manifest.step)
    write_text(fresh / MANIFEST, manifest.text())
    try:
        if path.exists():  # damaged, or of a future that was lost: only what `latest` named before it is still needed
            path.rename(folder / f"{_UNFINISHED}{uuid.uuid4().hex[:8]}")
        fresh.rename(path)
        sync_folder(folder)
    except OSError as error:
        raise disk_error(path, error) from error
    write_text(folder / LATEST, path.name + "\n")
    return path


def prune(folder: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints up to `latest` and the best one by its score."""
    kept = [*candidates(folder)[:keep], best(folder)]
    for path in finished(folder):
        if path not in kept:
            # Renamed first: half a folder must not look like a checkpoint.
            doomed = path.rename(folder / f"{_UNFINISHED}{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest score; None if none has one."""
    scores = {}
    for path in candidates(folder):
        try:
            scores[path] = Manifest.read(path).score
        except (Damaged, UserError):
            continue
    scored = {path: score for path, score in scores.items() if score is not None}
    return min(scored, key=lambda path: scored[path], default=None)

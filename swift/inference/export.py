"""`python -m swift.export RUN --out FILE.safetensors`: one file with weights, configuration and input contract.

The file holds tensors and text, no code: it is read by the safetensors package alone. `load` makes a model of it,
without DeepSpeed, Lightning or the run directory.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from swift.config.schema import Config
    from swift.models.autoencoder import MaskedAutoencoder
    from swift.models.drop import AnyDrop
    from swift.models.heads import TargetModel

DTYPES = ("fp32", "bf16")
LEFT_OUT = "left-out-by-export"


@dataclass(frozen=True)
class Exported:
    """What a file holds.

    Attributes:
        model: In eval mode, float32.
        config: Of the run.
        contract: What the model must be given: grid, spacing, frames, normalization, ...
        step: Optimizer steps it was trained for.
    """

    model: MaskedAutoencoder | AnyDrop | TargetModel
    config: Config
    contract: dict[str, Any]
    step: int


def export(run: Path, out: Path, dtype: str = "fp32", which: str = "latest") -> dict[str, Any]:
    """Write the weights of a checkpoint to one file, tensor by tensor.

    The file can be shared: of the data it says the input contract and how many subjects there were; it names neither a
    subject nor a path. Beside it lies the list of subjects (`swift.parallel.checkpoint.read.subjects_file`), for those
    who go on with the weights and must not test on them; it is not for sharing.

    Args:
        run: A run directory, its folder of checkpoints, or one checkpoint.
        out: The file; must not exist.
        dtype: fp32, the master weights | bf16, half the size.
        which: latest | best | the name of a checkpoint.

    Returns:
        {"file", "subjects_file" (None: not recorded), "checkpoint", "step", "tensors", "parameters", "bytes", "xxh3"}.

    Raises:
        UserError: nothing to export, a file that exists already, or a full disk.
    """
    import torch

    from swift.parallel.checkpoint.read import (
        FORMAT,
        PREFIX,
        CheckpointWeights,
        find_checkpoint,
        metadata_of,
        subjects_file,
    )
    from swift.parallel.checkpoint.write import Entry, write_sealed, write_text

    listed, partial = subjects_file(out), out.with_name(f".{out.name}.partial")
    _check_free(out, listed, partial)
    path, manifest = find_checkpoint(run, which)
    weights = CheckpointWeights(path, manifest)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def entry(name: str, shape: list[int]) -> Entry:
        numel = torch.Size(shape).numel()
        return Entry(
            name.removeprefix(PREFIX), kind, tuple(shape), lambda: weights.read(name, 0, numel).to(kind).view(shape)
        )

    said = metadata_of(manifest) | {"score": manifest.score, "base_shapes": manifest.state.get("base_shapes")}
    said["config"] = shareable(said["config"])
    subjects = said.pop("subjects", None)
    if subjects is not None:
        said["subject_count"] = len(subjects)
    metadata = {"format": FORMAT} | {name: json.dumps(value) for name, value in said.items()}
    partial.unlink(missing_ok=True)
    try:
        written = write_sealed(partial, [entry(*item) for item in manifest.shapes.items()], metadata)
        if subjects is not None:
            content = {"weights": written.xxh3, "subjects": sorted(subjects)}
            write_text(listed, json.dumps(content, indent=1) + "\n")
        partial.replace(out)
    except BaseException:
        if subjects is not None:
            listed.unlink(missing_ok=True)
        raise
    finally:
        partial.unlink(missing_ok=True)
    parameters = sum(torch.Size(shape).numel() for shape in manifest.shapes.values())
    return {
        "file": str(out),
        "subjects_file": str(listed) if subjects is not None else None,
        "checkpoint": str(path),
        "step": manifest.step,
        "tensors": len(manifest.shapes),
        "parameters": parameters,
        "bytes": written.bytes,
        "xxh3": written.xxh3,
    }


def _check_free(out: Path, listed: Path, partial: Path) -> None:
    """Raise UserError where the file, or the list of subjects that goes with it, cannot be made or is there."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    if out.exists():
        raise UserError(f"--out {out}: it exists already")
    # A list beside a partial file and no finished one was left by an export that was killed: it is written anew.
    if listed.exists() and not partial.exists():
        raise UserError(f"--out {out}: {listed.name} exists already")


def shareable(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run without what tells where it ran: `LEFT_OUT` for every path, and no launcher."""
    from swift.config.derive import PATHS

    shared = copy.deepcopy(config)
    for setting in PATHS:
        *groups, name = setting.split(".")
        part = functools.reduce(lambda inside, group: inside.get(group) or {}, groups, shared)
        if part.get(name) is not None:
            part[name] = LEFT_OUT
    for place, cohort in enumerate(shared["data"]["mixture"]):
        cohort["path"] = f"{LEFT_OUT}-{place}"
    shared["data"]["exclude"] = []
    return shared | {"launcher": None}


def load(path: str | Path) -> Exported:
    """The model of an exported file, built from the configuration in it.

    Raises:
        UserError: a pickle or another foreign file, or weights that are not those of its own configuration.
    """
    import torch
    from omegaconf import OmegaConf

    from swift.config.compose import typed
    from swift.models.heads import build_model
    from swift.parallel.checkpoint.read import FileWeights

    weights = FileWeights(Path(path))
    cfg = typed(OmegaConf.create(weights.metadata["config"]))
    with torch.device("meta"):
        model = build_model(cfg.model, cfg.task, cfg.data.grid, cfg.data.frames)
    model.to_empty(device="cpu")
    load_into(model, path)
    return Exported(model.eval(), cfg, weights.metadata["contract"], weights.metadata["step"])


def load_into(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of an exported file into a model.

    Raises:
        UserError: a foreign file, or another architecture (the first five tensors that differ).
    """
    import torch

    from swift.parallel.checkpoint.files import compare_shapes
    from swift.parallel.checkpoint.read import PREFIX, FileWeights

    weights = FileWeights(Path(path))
    own = dict(model.named_parameters())
    compare_shapes(path, weights.shapes, {PREFIX + name: list(parameter.shape) for name, parameter in own.items()})
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights.tensor(name))

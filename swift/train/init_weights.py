"""init=: the weights that a training begins with, from wherever they were left."""

from __future__ import annotations

from pathlib import Path

from swift.config.compose import CHECKPOINTS
from swift.models.encoder import SwinEncoder
from swift.models.v1 import INPUT, has_v1_names, load_v1, read_weights
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.init_from import task_weights
from swift.parallel.checkpoint.read import (
    CheckpointWeights,
    FileWeights,
    TensorWeights,
    Weights,
    check_attention,
    find_checkpoint,
    weights_metadata,
)
from swift.train.base import TrainingModule
from swift.train.finetune import FinetuneModule
from swift.utils.errors import UserError


def start_from(module: TrainingModule, source: str) -> str:
    """Give a module the weights of another run, of a checkpoint, of an exported file, or of a SwiFT v1 file (encoder).

    A module on the meta device gets them from the strategy that trains it, each rank the part that it holds.

    Returns:
        What was taken, for the log.

    Raises:
        UserError: nothing readable there, or weights that do not fit the model.
    """
    weights: Weights
    try:
        if isinstance(module, FinetuneModule):
            here = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
            weights = start = task_weights(Path(source), module.cfg, here)
            module.seen_before, said = start.seen, "; ".join(start.remarks)
            module.first_contract = weights_metadata(start.source).get("contract", {})
        else:
            weights, said = weights_at(Path(source), module)
            known = weights_metadata(weights)
            module.seen_before, module.first_contract = known.get("subjects"), known.get("contract", {})
    except ValueError as error:
        raise UserError(f"init={source}: {error}") from error
    module.first_weights = weights
    if not any(parameter.is_meta for parameter in module.parameters()):
        for name, parameter in module.named_parameters():
            if name in weights.shapes:
                parameter.detach().view(-1).copy_(weights.read(name, 0, parameter.numel()))
    return said


def weights_at(path: Path, module: TrainingModule) -> tuple[Weights, str]:
    """Weights for a module from a run, from one checkpoint, or from a file; and what was taken.

    Raises:
        ValueError: there are none, they are damaged, or do not fit.
    """
    weights: Weights
    if not path.is_file():
        if not (path / checkpoint.MANIFEST).is_file() and not checkpoint.exists(path / CHECKPOINTS):
            raise ValueError("neither a file nor a run with a checkpoint")
        weights = CheckpointWeights(*find_checkpoint(path))
    elif path.suffix == ".safetensors":
        weights = FileWeights(path)
    else:
        tensors = read_weights(path)
        if not any(key.startswith("model.encoder.") for key in tensors):
            encoder = SwinEncoder(module.cfg.model, module.cfg.data.grid, module.cfg.data.frames)
            report = load_v1(encoder, tensors)
            taken = {name: value for name, value in encoder.state_dict().items() if name not in report.missing}
            known = {"contract": INPUT} if has_v1_names(tensors) else {}
            return TensorWeights({f"model.encoder.{name}": value for name, value in taken.items()}, known), str(report)
        weights = TensorWeights(tensors)
    here = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    checkpoint.compare_shapes("the source", weights.shapes, here)
    if isinstance(weights, CheckpointWeights | FileWeights):
        check_attention(weights, module.cfg.model)
    return weights, f"{len(here)} tensors taken"

"""Floating-point operations of a training step in closed form, by part of the model.

A multiply-add counts as 2, and only matrix products count (linear maps, scores, weighted sums), as is usual for model
FLOPs: norms, GELU, softmax and rotations are bound by memory traffic and left to `swift.plan.step_time`.

For a block of the factorized variant, M tokens of width C and windows of n_space and n_time tokens, the forward pass is
32 M C^2 + 4 M (n_space + n_time) C. A shifted or ragged layer has smaller windows at its ends, and these formulas count
the windows that are really computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from swift.config.schema import TaskConfig
from swift.models.pooling import brain_tokens
from swift.models.token_sets import unpacked
from swift.plan.geometry import Block, Branch, Geometry, Stage, on_brain
from swift.plan.map_head import has_gradient


@dataclass(frozen=True)
class Flops:
    """Of one clip."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


def linear(rows: int, inputs: int, outputs: int, input_gradient: bool = True, trained: bool = True) -> Flops:
    """A linear map of `rows` rows: backward is one product for the weights and, unless first, one for the input."""
    forward = 2.0 * rows * inputs * outputs
    return Flops(forward, forward * (trained + input_gradient))


def _sum(parts: list[Flops]) -> Flops:
    return sum(parts, Flops(0.0, 0.0))


def attention_scores(branch: Branch) -> Flops:
    """Queries times keys, and weights times values; backward has two products for each."""
    forward = 4.0 * branch.pairs * branch.width
    return Flops(forward, 2 * forward)


def branch_flops(branch: Branch) -> Flops:
    """One residual branch."""
    if branch.is_attention:
        qkv = linear(branch.tokens, branch.width, 3 * branch.width)
        return qkv + attention_scores(branch) + linear(branch.tokens, branch.width, branch.width)
    up = linear(branch.tokens, branch.width, branch.hidden)
    return up + linear(branch.tokens, branch.hidden, branch.width)


def block_flops(block: Block) -> Flops:
    """One block."""
    return _sum([branch_flops(branch) for branch in block.branches])


def merging_flops(stage: Stage) -> Flops:
    """The map 8C -> 2C after a stage; nothing after the last."""
    return linear(stage.merged_rows, 8 * stage.width, 2 * stage.width)


def decoder_flops(geometry: Geometry) -> Flops:
    """All linear maps of the decoder."""
    last, patch = geometry.stages[-1], geometry.patch
    if geometry.cells is not None:
        cells, width = geometry.cells, geometry.decoder_dim
        laterals = [linear(stage.tokens, stage.width, width) for stage in geometry.stages[cells.first :]]
        return _sum([*laterals, *map(block_flops, cells.blocks), linear(cells.rows, width, cells.voxels)])
    if geometry.decoder == "local":
        laterals = [linear(stage.tokens, stage.width, geometry.decoder_dim) for stage in geometry.stages]
        return _sum([*laterals, linear(geometry.head_rows, geometry.decoder_dim, geometry.patch_voxels)])
    cell = patch[0] * patch[1] * patch[2] * 8 ** (len(geometry.stages) - 1)
    expand = linear(last.tokens, last.width, patch[3] * last.width)
    return expand + linear(last.tokens * patch[3], last.width, cell)


def maps_flops(geometry: Geometry) -> Flops:
    """Spatial maps: a Gram matrix a patch, their sum over the visible patches of a time step, reading, drawing.

    A head reads their courses and draws nothing. Over the whole grid; patches without brain are left out when it runs.
    Of maps that are not trained there is no backward pass.
    """
    maps, (_, _, _, frames) = geometry.maps, geometry.volume
    first = geometry.stages[0].grid
    patches = first[0] * first[1] * first[2]
    voxels = geometry.volume[0] * geometry.volume[1] * geometry.volume[2]
    products = 2.0 * geometry.space * maps**2
    sums = 2.0 * first[3] * patches * maps**2
    read = 2.0 * geometry.space * frames * maps
    draw = 2.0 * voxels * frames * maps if geometry.head is None else 0.0
    forward = products + sums + read + draw
    # Masks and voxels need no gradient: one product there, two where both sides come from the maps; and the gradient of
    # each frame's equations, an outer product.
    backward = 2 * products + sums + read + 2 * draw + 2.0 * frames * maps**2
    return Flops(forward, backward if geometry.maps_trained else 0.0)


def map_head_flops(geometry: Geometry, adapt: str) -> Flops:
    """Of one clip in a dense head: summaries and moments, maps from stages, convolutions."""
    assert geometry.head is not None
    stages, parts = len(geometry.stages), []
    for one in geometry.head.products:
        known = has_gradient(one.source, adapt, stages)
        if one.weighed:
            parts.append(linear(one.rows, one.inputs, one.outputs, known))
        else:  # both sides come from the same source
            parts.append(linear(one.rows, one.inputs, one.outputs, known, trained=known))
    return _sum(parts)


def flops_by_part(geometry: Geometry) -> dict[str, Flops]:
    """Of one clip: patch embedding, stage 1, merging 1, ..., decoder or head; all of it trained."""
    # Voxels need no gradient.
    parts = {
        "patch embedding": linear(
            geometry.tokens, geometry.patch_voxels, geometry.stages[0].width, input_gradient=False
        )
    }
    for index, stage in enumerate(geometry.stages, start=1):
        parts[f"stage {index}"] = _sum([block_flops(block) for block in stage.blocks])
        if stage.merged_rows:
            parts[f"merging {index}"] = merging_flops(stage)
    if geometry.head is None:
        parts["decoder"] = decoder_flops(geometry)
    else:
        parts["head"] = map_head_flops(geometry, "scratch")
    if geometry.maps:
        parts["maps"] = maps_flops(geometry)
    return parts


def model_flops(geometry: Geometry) -> Flops:
    """Of one clip: what MFU is measured by. Recomputation of activations is not part of it."""
    return _sum(list(flops_by_part(geometry).values()))


def encoder_flops(geometry: Geometry) -> dict[str, Flops]:
    """Of one clip, by part: the encoder without decoder, head and maps."""
    return {name: flops for name, flops in flops_by_part(geometry).items() if name not in ("decoder", "head", "maps")}


def _low_rank(rows: int, inputs: int, outputs: int, rank: int, input_gradient: bool) -> Flops:
    """A frozen linear map with a low-rank change beside it."""
    change = linear(rows, inputs, rank, input_gradient) + linear(rows, rank, outputs)
    return linear(rows, inputs, outputs, input_gradient, trained=False) + change


def _lora_flops(geometry: Geometry, rank: int) -> Flops:
    first = geometry.stages[0]
    embedding = linear(geometry.tokens, geometry.patch_voxels, first.width, input_gradient=False, trained=False)
    parts, below = [embedding], False
    for stage in geometry.stages:
        for branch in (branch for block in stage.blocks for branch in block.branches):
            rows, width = branch.tokens, branch.width
            if branch.is_attention:
                # The first of all is given what needs no gradient.
                parts += [_low_rank(rows, width, 3 * width, rank, below), attention_scores(branch)]
                parts.append(_low_rank(rows, width, width, rank, True))
                below = True
            else:
                parts += [
                    linear(rows, *sizes, trained=False) for sizes in ((width, branch.hidden), (branch.hidden, width))
                ]
        parts.append(linear(stage.merged_rows, 8 * stage.width, 2 * stage.width, trained=False))
    return _sum(parts)


def tuning_flops(geometry: Geometry, task: TaskConfig) -> Flops:
    """Of one clip of a task with a target: the encoder, with no backward pass where it is frozen.

    A head that sees one row a clip, or one a frame, is left out; one of brain maps counts, with the maps it reads.

    Args:
        geometry: The model.
        task: Its adaptation, and the rank of low-rank changes.
    """
    if geometry.head is None:
        return _encoder_tuning_flops(geometry, task)
    found = _encoder_tuning_flops(geometry, task) + map_head_flops(geometry, task.adapt)
    if not geometry.maps:
        return found
    read = maps_flops(geometry)
    return found + Flops(read.forward, read.backward if has_gradient("maps", task.adapt, 0) else 0.0)


def _encoder_tuning_flops(geometry: Geometry, task: TaskConfig) -> Flops:
    if task.adapt == "lora":
        return _lora_flops(geometry, task.lora_rank)
    whole = _sum(list(encoder_flops(geometry).values()))
    if task.adapt in ("scratch", "full"):
        return whole
    trained = block_flops(geometry.stages[-1].blocks[-1]).backward if task.adapt == "last_block" else 0.0
    return Flops(whole.forward, trained)


def step_flops(geometry: Geometry, task: TaskConfig) -> Flops:
    """Of one clip of a run: pre-training, or a task with a target."""
    return model_flops(geometry) if task.target is None else tuning_flops(geometry, task)


class BrainCosts:
    """FLOPs and patch tokens of clips with tokens=brain; worked out once for each set of patches, while it is kept."""

    KEPT = 4096

    def __init__(self, geometry: Geometry, task: TaskConfig) -> None:
        self._geometry, self._task = geometry, task
        self._of = lru_cache(self.KEPT)(self._work_out)

    def patches(self, brain: Tensor) -> Tensor:
        """Masks bool (B, X, Y, Z) -> which patches have a brain voxel, bool (B, x, y, z), on the same device."""
        return brain_tokens(brain, self._geometry.patch, 0)

    def __call__(self, patches: Tensor) -> tuple[float, int]:
        """Of one clip's patches, bool (x, y, z), on the CPU."""
        return self._of(np.packbits(patches.numpy()).tobytes(), tuple(patches.shape))

    def _work_out(self, packed: bytes, shape: tuple[int, ...]) -> tuple[float, int]:
        found = on_brain(self._geometry, torch.from_numpy(unpacked(packed, shape))[None])
        return step_flops(found, self._task).total, found.tokens

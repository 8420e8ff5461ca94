"""A model of task.hidden=drop on any mask, so that it can be judged on the masks of other models.

Training hides whole units; a mask of single patches leaves cells of which some patches are hidden, others in every
frame. Here all tokens of the grid are computed, but none sees a hidden one, and a hidden one is merged as zeros: what a
gathered encoder would find. A cell of which nothing is visible is what `visible` calls hidden. Slow; on masks of whole
units, or of whole frames for a model that leaves frames out, it equals the model itself.

Shapes: B batch, X Y Z T voxels and frames, x y z t grid of a stage, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from swift.models.cells import Cells, Frames, Seen
from swift.models.drop import AnyDrop
from swift.models.encoder import Stage, SwinEncoder
from swift.models.visible import Units, later_stages, put
from swift.models.visible_frames import FrameAutoencoder

UNITS = "b (x i) (y j) (z k) t ... -> (b x y z) i j k t ..."
GRID = "(b x y z) i j k t c -> b (x i) (y j) (z k) t c"


def _shown(tokens: Tensor, visible: Tensor) -> Tensor:
    """Zeros in place of tokens (B, x, y, z, t, C) that are not visible (B, x, y, z, t)."""
    return torch.where(visible.unsqueeze(-1), tokens, 0.0)


def _encode(encoder: SwinEncoder, units: Units, x: Tensor, visible: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Voxels (B, 1, X, Y, Z, T) and visible patches, bool (B, x, y, z, t) -> features of cells on their whole grid,
    those of later stages, and which cells are visible, bool (B, cells x, y, z, t).
    """
    tokens = encoder.dropout(encoder.position(_shown(encoder.embed(x), visible)))
    along = dict(zip("xyz", units.counts))
    for index in range(units.inner):
        stage = encoder.stages[index]
        assert isinstance(stage, Stage)
        inside = dict(zip("ijk", units.tokens(index)))
        boxes = rearrange(stage.position(tokens), UNITS, **inside)
        seen = Seen(rearrange(visible, UNITS, **inside), None)
        for block in stage.blocks:
            boxes = block(boxes, seen)
        tokens = stage.downsample(_shown(rearrange(boxes, GRID, **along, **inside), visible))
        visible = reduce(visible, "b (x i) (y j) (z k) t -> b x y z t", "any", i=2, j=2, k=2)
    stage = encoder.stages[units.inner]
    assert isinstance(stage, Stage)
    # The tokens of a frame along one axis.
    line = stage.position(tokens).flatten(1, 3)[:, :, None, None]
    places = torch.arange(line.shape[1], device=x.device).expand(len(x), -1)
    seen = Seen(visible.flatten(1, 3)[:, :, None, None], Cells(places, units.cells))
    for block in stage.blocks:
        line = block(line, seen)
    tokens = _shown(line.view(tokens.shape), visible)
    later = later_stages(encoder, units.inner, tokens)
    if encoder.cfg.final_norm and not later:
        tokens = encoder.norm(tokens)
    return tokens, later, visible


def _merged(visible: Tensor) -> Tensor:
    """Visible tokens (B, x, y, z, t) -> those of the next stage: where one of eight is."""
    pads = [n % 2 for n in visible.shape[1:4]]
    even = F.pad(visible, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
    return reduce(even, "b (x i) (y j) (z k) t -> b x y z t", "any", i=2, j=2, k=2)


def _encode_frames(encoder: SwinEncoder, x: Tensor, visible: Tensor) -> list[Tensor]:
    """The features of every stage of a model that leaves frames out, from visible patches, bool (B, x, y, z, t)."""
    steps = visible.shape[-1]
    frames = Frames(torch.arange(steps, device=x.device).expand(len(x), -1), steps)
    tokens = encoder.dropout(encoder.position(_shown(encoder.embed(x), visible)))
    features = []
    for stage in encoder.stages:
        assert isinstance(stage, Stage)
        tokens = stage.position(tokens)
        for block in stage.blocks:
            tokens = block(tokens, Seen(visible, frames))
        features.append(_shown(tokens, visible))
        tokens = stage.downsample(features[-1])
        visible = _merged(visible)
    if encoder.cfg.final_norm:
        features[-1] = encoder.norm(features[-1])
    return features


def reconstruct(model: AnyDrop, x: Tensor, mask: Tensor) -> Tensor:
    """Predict a clip from its visible patches.

    Args:
        model: Trained with task.hidden=drop.
        x: (B, 1, X, Y, Z, T) voxels; hidden ones are not read.
        mask: bool (B, x, y, z, t), True = the patch is hidden.

    Returns:
        (B, 1, X, Y, Z, T) prediction for every voxel, visible ones included, for which no model was trained.
    """
    if isinstance(model, FrameAutoencoder):
        return model.decoder.every_patch(_encode_frames(model.encoder, x, ~mask), ~mask)
    cells, later, visible = _encode(model.encoder, model.units, x, ~mask)
    boxes = model.decoder.every_cell(cells, later, visible)
    return put(boxes, torch.arange(boxes.shape[1], device=x.device).expand(len(x), -1), model.units.volume)

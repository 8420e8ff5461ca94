"""Masked pre-training whose encoder never sees hidden frames (task.hidden=drop task.mask_kind=frames).

Time steps are hidden as wholes, at random. The encoder merges tokens in space alone, so the visible ones are a dense
tensor of fewer time steps through all stages. They keep their true places in time, and all those of a clip see each
other: of a window of ten two would be left. Space has its windows and shifts as ever. The parameters of the encoder are
those of `SwinEncoder`.

Shapes: B batch, X Y Z T voxels and frames, x y z t grid of patches, V visible and H hidden time steps (of patches), pt
frames of a patch, C channels, D decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.config.check import mask_unit
from swift.config.schema import ModelConfig, TaskConfig
from swift.models.cells import Frames
from swift.models.decoders import block_settings, check_size, on_patches
from swift.models.encoder import SwinBlock, SwinEncoder
from swift.models.init import NORMAL, Init, draw
from swift.models.layers import AxialPosition, token_grid, unpatchify
from swift.models.masking import draw_mask, hidden_count
from swift.models.row_loss import mean_of_clips, row_sums

MLP_RATIO = 1.0
"""Of the decoder's block, which runs on all patches of all frames: a wider one would cost as much as the encoder."""


@dataclass(frozen=True)
class FrameUnits:
    """How clips are cut into frames that are shown or hidden."""

    volume: tuple[int, ...]
    """Voxels x, y, z and frames of a clip."""
    patch: tuple[int, ...]
    """Voxels x, y, z and frames."""
    unit: int
    """Frames hidden together."""
    shown: int
    """V, the same for every clip."""
    ratio: float
    """Part of the units that is hidden."""

    @property
    def frames(self) -> int:
        """Time steps of a clip."""
        return token_grid(self.volume, self.patch)[3]

    def draw(self, seed: int, sample_id: Tensor, brain: Tensor) -> Tensor:
        """Visible time steps of each sample, int64 (B, V), ascending: what `draw_mask` with kind=frames leaves."""
        one = (1, 1, 1, self.unit)
        patch = (1, 1, 1, self.patch[3])
        hidden = draw_mask(seed, sample_id, (1, 1, 1, self.volume[3]), patch, one, self.ratio, "frames")
        return hidden.flatten(1).to(torch.int8).argsort(dim=1, stable=True)[:, : self.shown]

    def usable(self, brain: Tensor) -> Tensor:
        """Clips of which something can be shown beside something hidden, bool (B,)."""
        return brain.flatten(1).any(1)

    def hidden(self, shown: Tensor) -> Tensor:
        """Visible time steps (B, V) -> the hidden ones, int64 (B, H), ascending."""
        flags = torch.zeros(len(shown), self.frames, dtype=torch.int8, device=shown.device)
        return flags.scatter_(1, shown, 1).argsort(dim=1, stable=True)[:, : self.frames - self.shown]

    def mask(self, shown: Tensor) -> Tensor:
        """Visible time steps (B, V) -> hidden patches, bool (B, x, y, z, t)."""
        hidden = torch.ones(len(shown), self.frames, dtype=torch.bool, device=shown.device).scatter(1, shown, False)
        x, y, z, _ = token_grid(self.volume, self.patch)
        return hidden[:, None, None, None].expand(-1, x, y, z, -1)

    def take(self, x: Tensor, steps: Tensor) -> Tensor:
        """Frames of clips: (B, 1, X, Y, Z, T) and time steps int64 (B, N) -> (B, 1, X, Y, Z, N * pt), padded with 0."""
        pt = self.patch[3]
        if x.shape[-1] % pt:
            x = F.pad(x, (0, -x.shape[-1] % pt))
        frames = (steps.unsqueeze(-1) * pt + torch.arange(pt, device=x.device)).flatten(1)
        return x.gather(5, frames.view(len(x), 1, 1, 1, 1, -1).expand(*x.shape[:5], -1))

    def put(self, predicted: Tensor, shown: Tensor) -> Tensor:
        """Hidden frames (B, 1, X, Y, Z, H * pt) at their places: (B, 1, X, Y, Z, T), 0 in visible frames."""
        pt, hidden = self.patch[3], self.hidden(shown)
        frames = (hidden.unsqueeze(-1) * pt + torch.arange(pt, device=shown.device)).flatten(1)
        out = predicted.new_zeros(*predicted.shape[:5], self.frames * pt)
        out = out.scatter(5, frames.view(len(frames), 1, 1, 1, 1, -1).expand_as(predicted), predicted)
        return out[..., : self.volume[3]]


def frame_units_of(cfg: ModelConfig, task: TaskConfig, volume: Sequence[int]) -> FrameUnits:
    """How clips of `volume` voxels and frames are cut. The settings must have passed `swift.config.check`."""
    unit, pt = mask_unit(task, cfg)[3], cfg.patch_size[3]
    count = -(-volume[3] // unit)
    shown = (count - hidden_count(task.mask_ratio, count)) * (unit // pt)
    return FrameUnits(tuple(volume), tuple(cfg.patch_size), unit, shown, task.mask_ratio)


def encode_frames(encoder: SwinEncoder, tokens: Tensor, frames: Frames) -> list[Tensor]:
    """Patch tokens (B, x, y, z, V, E) of visible time steps -> the features of every stage."""

    def position(module: nn.Module, tokens: Tensor) -> Tensor:
        return tokens if isinstance(module, nn.Identity) else module(tokens, times=frames.steps)

    tokens = encoder.dropout(position(encoder.position, tokens))
    features = []
    for stage in encoder.stages:
        tokens = position(stage.get_submodule("position"), tokens)
        for block in stage.get_submodule("blocks").children():
            tokens = block(tokens, frames)
        features.append(tokens)
        tokens = stage.get_submodule("downsample")(tokens)
    if encoder.cfg.final_norm:
        features[-1] = encoder.norm(features[-1])
    return features


class FrameDecoder(nn.Module):
    """Features of all stages on the patch grid, a learned token with its position for each patch of a hidden frame, a
    block of attention over all time steps of a place, and a linear map for each hidden patch.
    """

    def __init__(self, cfg: ModelConfig, units: FrameUnits):
        super().__init__()
        self.units = units
        width, grid = cfg.decoder_dim, token_grid(units.volume, units.patch)
        dims = [cfg.embed_dim * 2**stage for stage in range(len(cfg.depths))]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.laterals = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.position = AxialPosition(grid, width)
        # All time steps of one place: its neighbours in space have met in the encoder.
        window = [1, 1, 1, grid[3]]
        inside = block_settings(cfg, depths=[1], attention="joint", window=window, mlp_ratio=MLP_RATIO)
        self.blocks = nn.ModuleList([SwinBlock(inside, 0, grid, False, 0.0)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, math.prod(units.patch))
        nn.init.normal_(self.mask_token, std=NORMAL.value)
        draw(self)

    def own_initial_values(self) -> dict[str, Init]:
        """How the mask token begins."""
        return {"mask_token": NORMAL}

    def forward(self, features: list[Tensor], shown: Tensor) -> Tensor:
        """Predict the hidden frames (B, 1, X, Y, Z, H * pt) from features (B, Xs, Ys, Zs, V, Cs) of every stage."""
        joined = on_patches(features, self.norms, self.laterals)
        size = (*joined.shape[:4], self.units.frames, joined.shape[5])
        index = shown.view(len(shown), 1, 1, 1, -1, 1).expand_as(joined)
        tokens = self._mixed(self.mask_token.to(joined.dtype).expand(size).scatter(4, index, joined))
        hidden = self.units.hidden(shown).view(len(shown), 1, 1, 1, -1, 1)
        return self._voxels(tokens.gather(4, hidden.expand(*tokens.shape[:4], -1, tokens.shape[5])))

    def every_patch(self, features: list[Tensor], visible: Tensor) -> Tensor:
        """Predict all frames (B, 1, X, Y, Z, T), whichever patches were visible, bool (B, x, y, z, t)."""
        joined = on_patches(features, self.norms, self.laterals)
        tokens = torch.where(visible.unsqueeze(-1), joined, self.mask_token.to(joined.dtype))
        return self._voxels(self._mixed(tokens))[..., : self.units.volume[3]]

    def _mixed(self, tokens: Tensor) -> Tensor:
        tokens = self.position(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def _voxels(self, tokens: Tensor) -> Tensor:
        """Tokens (B, x, y, z, N, D) -> (B, 1, X, Y, Z, N * pt)."""
        values = self.head(F.gelu(self.norm(tokens)))
        patch = self.units.patch
        return unpatchify(values, patch, (*self.units.volume[:3], tokens.shape[4] * patch[3]))


class FrameAutoencoder(nn.Module):
    """Encoder of visible frames and decoder of hidden ones, for clips cut as `units` says."""

    def __init__(self, cfg: ModelConfig, units: FrameUnits):
        super().__init__()
        self.units = units
        self.encoder = SwinEncoder(cfg, units.volume[:3], units.volume[3])
        self.decoder = FrameDecoder(cfg, units)

    def blocks(self) -> list[nn.Module]:
        """The parts that repeat, in the order they run."""
        return self.encoder.blocks()

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        """Predict what is hidden from what is shown.

        Args:
            x: (B, 1, X, Y, Z, T) voxels.
            shown: int64 (B, V), the visible time steps of each clip, ascending.

        Returns:
            (B, 1, X, Y, Z, H * pt), the frames of `FrameUnits.hidden`.

        Raises:
            ValueError: a clip of another size than the model was built for.
        """
        check_size(x, self.units.volume)
        tokens = self.encoder.embed(self.units.take(x, shown))
        features = encode_frames(self.encoder, tokens, Frames(shown, self.units.frames))
        found: Tensor = self.decoder(features, shown)
        return found


def frames_loss(units: FrameUnits, prediction: Tensor, x: Tensor, counted: Tensor, shown: Tensor, kind: str) -> Tensor:
    """As `reconstruction_loss`, of hidden frames alone.

    Args:
        units: How clips are cut.
        prediction: (B, 1, X, Y, Z, H * pt).
        x: (B, 1, X, Y, Z, T) voxels.
        counted: bool (B, X, Y, Z), voxels that count where they are hidden.
        shown: int64 (B, V), the visible time steps.
        kind: l1 | smooth_l1 | l2.

    Returns:
        A scalar in float32 (or wider, as x); clips without a counted voxel are left out (0 if there is no other).
    """
    hidden = units.hidden(shown)
    target = units.take(x, hidden).to(torch.promote_types(x.dtype, torch.float32))
    # The frames that fill up the last patch count nowhere.
    real = units.take(torch.ones_like(x[:, :, :1, :1, :1], dtype=torch.int8), hidden) > 0
    voxels = counted.flatten(1).sum(1) * real.flatten(1).sum(1)
    return mean_of_clips(row_sums(prediction, target, counted[:, None, ..., None] & real, kind), voxels)

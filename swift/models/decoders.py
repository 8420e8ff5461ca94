"""Decoders of masked pre-training: features of the encoder -> voxels.

Shapes: B batch, X Y Z T voxels and frames, x y z t token grid, C channels, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swift.config.schema import ModelConfig
from swift.models.encoder import stage_grids
from swift.models.init import ZERO, Init, draw
from swift.models.layers import unpatchify
from swift.models.packed import Take, from_parents, to_grid
from swift.models.token_sets import TokenSet

HEAD_CHANNELS = 16
"""Channels of an attention head of a decoder with blocks, where decoder_dim allows."""


def block_settings(cfg: ModelConfig, **own: Any) -> ModelConfig:
    """Settings of the blocks of a decoder: `own`, the width of the decoder, no positions and nothing dropped."""
    most = max(1, cfg.decoder_dim // HEAD_CHANNELS)
    heads = next(heads for heads in range(most, 0, -1) if cfg.decoder_dim % heads == 0)
    return replace(
        cfg,
        embed_dim=cfg.decoder_dim,
        num_heads=[heads],
        position="none",
        last_stage="windowed",
        layer_scale=None,
        dropout=0.0,
        attention_dropout=0.0,
        # The width is the same at every embed_dim.
        attention_base_width=None,
        **own,
    )


def check_size(x: Tensor, volume: tuple[int, ...]) -> None:
    """Raise ValueError unless (B, C, X, Y, Z, T) are clips of the voxels and frames that a model was built for."""
    if tuple(x.shape[2:]) != volume:
        raise ValueError(f"clip of {tuple(x.shape[2:])} voxels and frames, the model was built for {volume}")


def on_patches(
    features: list[Tensor], norms: nn.ModuleList, laterals: nn.ModuleList, where: Sequence[TokenSet] | None = None
) -> Tensor:
    """Features of all stages, each normalized and mapped to D channels, summed on the patch grid.

    Args:
        features: (B, Xs, Ys, Zs, t, C_s), or (P_s, t, C_s) of places `where`.
        norms: Of each stage.
        laterals: Of each stage.
        where: The places of every stage; None: the whole grids.

    Returns:
        (B, x, y, z, t, D), or (P, t, D).
    """
    # From coarse to fine, doubling each time, so that no stage is repeated to the full grid by itself.
    hidden: Tensor | None = None
    for stage in reversed(range(len(features))):
        here = laterals[stage](norms[stage](features[stage]))
        if hidden is not None and where is not None:
            here = here + from_parents(hidden, where[stage])
        elif hidden is not None:
            x, y, z = here.shape[1:4]
            doubled = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
            here = here + doubled[:, :x, :y, :z]
        hidden = here
    assert hidden is not None
    return hidden


class LocalDecoder(nn.Module):
    """Per-patch head over the features of all stages, each brought back to the patch grid.

    A token reaches only the voxels of its own cell: nothing is mixed across patches here.
    """

    def __init__(self, cfg: ModelConfig, grid: Sequence[int], frames: int):
        super().__init__()
        self.patch = tuple(cfg.patch_size)
        self.volume = (*grid, frames)
        dims = [cfg.embed_dim * 2**stage for stage in range(len(cfg.depths))]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.laterals = nn.ModuleList(nn.Linear(dim, cfg.decoder_dim) for dim in dims)
        self.norm = nn.LayerNorm(cfg.decoder_dim)
        px, py, pz, pt = self.patch
        self.head = nn.Linear(cfg.decoder_dim, px * py * pz * pt)
        draw(self)

    def forward(
        self, features: list[Tensor], where: Sequence[TokenSet] | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Features (B, Xs, Ys, Zs, t, C_s) of every stage -> voxels (B, 1, X, Y, Z, T).

        The same from features (P_s, t, C_s) of places `where`; voxels of patches that do not exist are 0. Of some of
        these patches alone, `rows` int64 (R,) of P * t: (R, px*py*pz*pt).
        """
        joined = on_patches(features, self.norms, self.laterals, where)
        if rows is not None:
            joined = Take.apply(joined.flatten(0, 1), rows)
        values: Tensor = self.head(F.gelu(self.norm(joined)))
        if rows is not None:
            return values
        return unpatchify(values if where is None else to_grid(values, where[0]), self.patch, self.volume)


class LinearDecoder(nn.Module):
    """The report's decoder: one linear map from a token of the last stage to the voxels of its cell.

    `expand` and the time table turn a latent frame into its patch's frames; `head` maps C channels to the cell
    (48^3 voxels for a patch of 6 and four stages).
    """

    def __init__(self, cfg: ModelConfig, grid: Sequence[int], frames: int):
        super().__init__()
        dim = cfg.embed_dim * 2 ** (len(cfg.depths) - 1)
        self.cell = tuple(p * 2 ** (len(cfg.depths) - 1) for p in cfg.patch_size[:3])
        self.patch_frames = cfg.patch_size[3]
        self.volume = (*grid, frames)
        self.expand = nn.Linear(dim, self.patch_frames * dim, bias=False)
        self.time_embed = nn.Parameter(torch.zeros(self.patch_frames, dim))
        self.head = nn.Linear(dim, self.cell[0] * self.cell[1] * self.cell[2])
        draw(self)

    def own_initial_values(self) -> dict[str, Init]:
        """How the time table begins."""
        return {"time_embed": ZERO}

    def forward(self, features: list[Tensor], where: Sequence[TokenSet] | None = None) -> Tensor:
        """Features of every stage, of which the last (B, x, y, z, t, C) is used -> voxels (B, 1, X, Y, Z, T).

        The same from features (P, t, C) of the places `where`; voxels of cells that do not exist are 0.
        """
        x = self.expand(features[-1]).unflatten(-1, (self.patch_frames, -1)) + self.time_embed
        cx, cy, cz = self.cell
        pattern = "b x y z t pt (cx cy cz) -> b 1 (x cx) (y cy) (z cz) (t pt)"
        values = self.head(x)
        if where is not None:
            values = to_grid(values, where[-1])
        voxels = rearrange(values, pattern, cx=cx, cy=cy, cz=cz)
        nx, ny, nz, nt = self.volume
        return voxels[:, :, :nx, :ny, :nz, :nt]


def build_decoder(cfg: ModelConfig, grid: Sequence[int], frames: int) -> LocalDecoder | LinearDecoder:
    """The decoder that `cfg.decoder` names, for a volume of `grid` voxels and `frames` frames."""
    stage_grids(cfg, (*grid, frames))
    kind = LocalDecoder if cfg.decoder == "local" else LinearDecoder
    return kind(cfg, grid, frames)

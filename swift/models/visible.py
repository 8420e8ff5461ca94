"""Masked pre-training whose encoder never sees what is hidden (task.hidden=drop), as in MAE (He et al. 2022).

Boxes of a few patches, the same in all frames, are shown or hidden together: units. Every unit has the same shape, so
the visible ones are one dense tensor and the first stages run on them as on a batch of small clips: their windows lie
inside a unit, as in Hiera (Ryali et al. 2023). Where a unit has come down to few tokens (stage 3: one token for a unit
of 24 voxels), all visible tokens of a frame see each other. Later stages run on the whole grid, zeros standing for what
is hidden as they do for neighbours beyond its edge. The parameters of the encoder are those of `SwinEncoder`, so that
its weights run on all tokens too.

Shapes: B batch, U units of a clip, V visible ones, H hidden cells, G cells of the grid, X Y Z T voxels and frames, t
frames of tokens, C channels, D decoder width, cx cy cz voxels of a cell.
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
from swift.models.cells import Cells, unit_tokens
from swift.models.decoders import block_settings, check_size
from swift.models.encoder import Stage, SwinBlock, SwinEncoder, stage_grids
from swift.models.init import NORMAL, Init, draw
from swift.models.layers import AxialPosition, tokens_along
from swift.models.masking import draw_shown, hidden_count
from swift.models.row_loss import mean_of_clips, row_sums

DECODER_BLOCKS = 2


@dataclass(frozen=True)
class Units:
    """How clips are cut into units."""

    volume: tuple[int, ...]
    """Voxels x, y, z and frames of a clip."""
    voxels: tuple[int, ...]
    """Of a unit, x, y, z."""
    patch: tuple[int, ...]
    """Voxels x, y, z and frames."""
    inner: int
    """Stages that run inside units."""
    shown: int
    """V, the same for every clip: ranks and batches compute equally much, whatever the brains."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Units along x, y, z."""
        return tuple(n // size for n, size in zip(self.volume, self.voxels))

    @property
    def total(self) -> int:
        """U."""
        return math.prod(self.counts)

    @property
    def frames(self) -> int:
        """T."""
        return tokens_along(self.volume[3], self.patch[3])

    def tokens(self, stage: int) -> tuple[int, ...]:
        """Tokens x, y, z of a unit at a stage, counted from 0, no later than `inner`."""
        return tuple(size // (p * 2**stage) for size, p in zip(self.voxels, self.patch))

    @property
    def cell(self) -> tuple[int, ...]:
        """Voxels x, y, z of a cell: a token of stage `inner`."""
        return tuple(p * 2**self.inner for p in self.patch[:3])

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells along x, y, z."""
        return tuple(n // size for n, size in zip(self.volume, self.cell))

    @property
    def shown_cells(self) -> int:
        """Cells of the visible units."""
        return self.shown * math.prod(self.tokens(self.inner))

    @property
    def hidden_cells(self) -> int:
        """H."""
        return math.prod(self.cells) - self.shown_cells

    def touched(self, brain: Tensor) -> Tensor:
        """Bool (B, X, Y, Z) voxels of the brain -> bool (B, U), units that have one."""
        return _blocks(brain, self.voxels).flatten(4).any(-1).flatten(1)

    def draw(self, seed: int, sample_id: Tensor, brain: Tensor) -> Tensor:
        """Visible units of each sample, int64 (B, V), of those that touch its brain (`draw_shown`)."""
        return draw_shown(seed, sample_id, self.touched(brain), self.shown)

    def usable(self, brain: Tensor) -> Tensor:
        """Clips of whose brain something can be shown beside something hidden, bool (B,)."""
        return self.touched(brain).sum(1) >= 2

    def places(self, shown: Tensor, stage: int) -> Tensor:
        """Units int64 (B, V) -> the places (B, V, tokens of a unit) of their tokens in the grid of a stage."""
        return unit_tokens(self.counts, self.tokens(stage), shown.device)[shown]

    def mask(self, shown: Tensor) -> Tensor:
        """Visible units int64 (B, V) -> hidden patches, bool (B, x, y, z, t)."""
        hidden = torch.ones(len(shown), self.total, dtype=torch.bool, device=shown.device)
        hidden = hidden.scatter(1, shown, False).view(-1, *self.counts)
        for axis, size in enumerate(self.tokens(0), start=1):
            hidden = hidden.repeat_interleave(size, axis)
        return hidden.unsqueeze(-1).expand(*hidden.shape, self.frames)

    def hidden(self, shown: Tensor) -> Tensor:
        """Visible units (B, V) -> the hidden cells, int64 (B, H), in ascending order."""
        flags = torch.ones(len(shown), math.prod(self.cells), dtype=torch.int8, device=shown.device)
        flags.scatter_(1, self.places(shown, self.inner).flatten(1), 0)
        return flags.argsort(dim=1, descending=True, stable=True)[:, : self.hidden_cells]


def units_of(cfg: ModelConfig, task: TaskConfig, volume: Sequence[int]) -> Units:
    """How clips of `volume` voxels and frames are cut. The settings must have passed `swift.config.check`."""
    unit = mask_unit(task, cfg)
    counts = [n // size for n, size in zip(volume[:3], unit)]
    shown = math.prod(counts) - hidden_count(task.mask_ratio, math.prod(counts))
    return Units(tuple(volume), tuple(unit[:3]), tuple(cfg.patch_size), cfg.inner_stages, shown)


def _blocks(x: Tensor, size: Sequence[int]) -> Tensor:
    """View of (B, X, Y, Z, ...) as (B, x, y, z boxes, ..., cx, cy, cz)."""
    for axis, step in zip((1, 3, 5), size):
        x = x.unflatten(axis, (-1, step))
    return x.permute(0, 1, 3, 5, *range(7, x.ndim), 2, 4, 6)


def take(x: Tensor, size: Sequence[int], chosen: Tensor) -> Tensor:
    """Boxes of volumes.

    Args:
        x: (B, X, Y, Z, T) or (B, X, Y, Z).
        size: Voxels x, y, z of a box.
        chosen: int64 (B, N), places of boxes in the order x, y, z.

    Returns:
        (B, N, T, cx, cy, cz), or without T.
    """
    boxes = _blocks(x, size)
    _, ny, nz = boxes.shape[1:4]
    sample = torch.arange(len(x), device=x.device).unsqueeze(1)
    return boxes[sample, chosen // (ny * nz), chosen // nz % ny, chosen % nz]


def put(boxes: Tensor, chosen: Tensor, volume: Sequence[int]) -> Tensor:
    """The inverse of `take`: (B, N, T, cx, cy, cz) -> (B, 1, X, Y, Z, T), 0 where there is no box."""
    batch, _, frames, *size = boxes.shape
    counts = [n // step for n, step in zip(volume, size)]
    sample = torch.arange(batch, device=boxes.device).unsqueeze(1)
    out = boxes.new_zeros(batch, math.prod(counts), frames, *size).index_put((sample, chosen), boxes)
    out = out.view(batch, *counts, frames, *size).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return out.reshape(batch, 1, *volume[:3], frames)


def scatter(tokens: Tensor, cells: Cells, empty: Tensor) -> Tensor:
    """(B, N, t, C) tokens at their places among others that are `empty` (C,) -> (B, x, y, z, t, C)."""
    batch, _, frames, channels = tokens.shape
    sample = torch.arange(batch, device=tokens.device).unsqueeze(1)
    whole = empty.to(tokens.dtype).expand(batch, math.prod(cells.grid), frames, channels)
    return whole.index_put((sample, cells.places), tokens).view(batch, *cells.grid, frames, channels)


def encode_visible(encoder: SwinEncoder, units: Units, x: Tensor, shown: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run an encoder on visible units alone.

    Drop path drops a branch for a unit in the first stages, for a clip in the others.

    Args:
        encoder: Of any variant but v1.
        units: How clips are cut.
        x: (B, 1, X, Y, Z, T) voxels.
        shown: int64 (B, V), the visible units.

    Returns:
        The features of the cells of visible units (B, N, t, C), and those of later stages on the whole grid, each
        (B, Xs, Ys, Zs, t, Cs). The last of all is after the final norm if it is used.
    """
    batch = len(x)
    voxels = take(x.squeeze(1), units.voxels, shown).flatten(0, 1)  # (B * V, T, x, y, z of a unit)
    tokens = encoder.embed(voxels.permute(0, 2, 3, 4, 1).unsqueeze(1))

    def at(stage: int, shape: tuple[int, ...]) -> dict:
        places = units.places(shown, stage)
        return {"at": lambda table: table.flatten(0, 2)[places].view(*shape, table.shape[3])}

    def position(module: nn.Module, tokens: Tensor, stage: int) -> Tensor:
        return tokens if isinstance(module, nn.Identity) else module(tokens, **at(stage, tokens.shape[:4]))

    tokens = encoder.dropout(position(encoder.position, tokens, 0))
    for index in range(units.inner):
        stage = encoder.stages[index]
        assert isinstance(stage, Stage)
        tokens = position(stage.position, tokens, index)
        for block in stage.blocks:
            tokens = block(tokens)
        tokens = stage.downsample(tokens)
    # The tokens of all units of a frame along one axis.
    places = units.places(shown, units.inner).flatten(1)
    tokens = tokens.reshape(batch, places.shape[1], 1, 1, *tokens.shape[4:])
    stage = encoder.stages[units.inner]
    assert isinstance(stage, Stage)
    tokens = position(stage.position, tokens, units.inner)
    cells = Cells(places, units.cells)
    for block in stage.blocks:
        tokens = block(tokens, cells)
    tokens = tokens[:, :, 0, 0]
    if units.inner < len(encoder.stages) - 1:
        return tokens, later_stages(encoder, units.inner, scatter(tokens, cells, tokens.new_zeros(tokens.shape[-1])))
    return encoder.norm(tokens) if encoder.cfg.final_norm else tokens, []


def later_stages(encoder: SwinEncoder, inner: int, whole: Tensor) -> list[Tensor]:
    """Features of the stages after `inner` from its own on the whole grid (B, x, y, z, t, C), with the final norm."""
    features = []
    whole = encoder.stages[inner].get_submodule("downsample")(whole)
    for stage in list(encoder.stages)[inner + 1 :]:
        feature, whole = stage(whole)
        features.append(feature)
    if features and encoder.cfg.final_norm:
        features[-1] = encoder.norm(features[-1])
    return features


class CellDecoder(nn.Module):
    """Mask tokens with positions among the features of visible cells, two blocks of attention, and a linear map a cell.

    The blocks attend over all cells of a frame, then over time.
    """

    def __init__(self, cfg: ModelConfig, units: Units):
        super().__init__()
        self.units = units
        width, frames = cfg.decoder_dim, units.frames
        dims = [cfg.embed_dim * 2**stage for stage in range(units.inner, len(cfg.depths))]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.laterals = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.mask_token = nn.Parameter(torch.zeros(width))
        grid = (*units.cells, frames)
        self.position = AxialPosition(grid, width)
        inside = block_settings(
            cfg,
            depths=[DECODER_BLOCKS],
            attention="factorized",
            order="st",
            mlp="shared",
            window=[*units.cells, cfg.window[3]],
        )
        # The second is shifted in time; in space one window is the grid.
        self.blocks = nn.ModuleList(SwinBlock(inside, 0, grid, index % 2 == 1, 0.0) for index in range(DECODER_BLOCKS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, units.patch[3] * math.prod(units.cell))
        nn.init.normal_(self.mask_token, std=NORMAL.value)
        draw(self)

    def own_initial_values(self) -> dict[str, Init]:
        """How the mask token begins."""
        return {"mask_token": NORMAL}

    def forward(self, visible: Tensor, later: list[Tensor], shown: Tensor) -> Tensor:
        """Predict the hidden cells.

        Args:
            visible: (B, N, t, C) features of the cells of visible units.
            later: Features of the later stages on the whole grid.
            shown: int64 (B, V), the visible units.

        Returns:
            (B, H, T, cx, cy, cz), cells in the order of `Units.hidden`.
        """
        units = self.units
        cells = Cells(units.places(shown, units.inner).flatten(1), units.cells)
        fine = self.laterals[0](self.norms[0](visible))
        tokens = self._mixed(scatter(fine, cells, self.mask_token), later)
        sample = torch.arange(len(shown), device=shown.device).unsqueeze(1)
        return self._voxels(tokens.flatten(1, 3)[sample, units.hidden(shown)])

    def every_cell(self, features: Tensor, later: list[Tensor], visible: Tensor) -> Tensor:
        """Predict all cells, the visible ones too, whichever those are.

        Args:
            features: (B, x, y, z, t, C) of the cells.
            later: Features of the later stages on the whole grid.
            visible: bool (B, x, y, z, t), cells that the encoder saw.

        Returns:
            (B, G, T, cx, cy, cz).
        """
        fine = self.laterals[0](self.norms[0](features))
        tokens = torch.where(visible.unsqueeze(-1), fine, self.mask_token.to(fine.dtype))
        return self._voxels(self._mixed(tokens, later).flatten(1, 3))

    def _mixed(self, tokens: Tensor, later: list[Tensor]) -> Tensor:
        """Tokens of all cells (B, x, y, z, t, D) with positions and what is coarser, after the blocks."""
        coarse: Tensor | None = None
        for feature, norm, lateral in zip(reversed(later), reversed(self.norms[1:]), reversed(self.laterals[1:])):
            here = lateral(norm(feature))
            coarse = here if coarse is None else here + _doubled(coarse, here.shape[1:4])
        tokens = self.position(tokens)
        if coarse is not None:
            tokens = tokens + _doubled(coarse, self.units.cells)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def _voxels(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, t, D) of N cells -> (B, N, T, cx, cy, cz)."""
        units = self.units
        voxels = self.head(F.gelu(self.norm(tokens)))
        voxels = voxels.unflatten(-1, (units.patch[3], *units.cell)).flatten(2, 3)
        # A slice costs a pass over all voxels in the backward pass.
        frames = units.volume[3]
        return voxels if voxels.shape[2] == frames else voxels[:, :, :frames]


def _doubled(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Repeat tokens (B, X, Y, Z, t, C) twice along x, y, z, and cut to a grid."""
    x = x.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return x[:, : grid[0], : grid[1], : grid[2]]


class VisibleAutoencoder(nn.Module):
    """Encoder of visible units and decoder of hidden cells, for clips cut as `units` says."""

    def __init__(self, cfg: ModelConfig, units: Units):
        super().__init__()
        self.units = units
        grid, frames = units.volume[:3], units.volume[3]
        assert stage_grids(cfg, units.volume)[units.inner][:3] == units.cells, "refused by swift.config.check"
        self.encoder = SwinEncoder(cfg, grid, frames)
        self.decoder = CellDecoder(cfg, units)

    def blocks(self) -> list[nn.Module]:
        """The parts that repeat, in the order they run."""
        return self.encoder.blocks()

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        """Predict what is hidden from what is shown.

        Args:
            x: (B, 1, X, Y, Z, T) voxels.
            shown: int64 (B, V), the visible units of each clip.

        Returns:
            (B, H, T, cx, cy, cz), the cells of `Units.hidden`.

        Raises:
            ValueError: a clip of another size than the model was built for.
        """
        check_size(x, self.units.volume)
        return self.decoder(*encode_visible(self.encoder, self.units, x, shown), shown)


def put_cells(units: Units, cells: Tensor, shown: Tensor) -> Tensor:
    """Predictions of hidden cells (B, H, T, cx, cy, cz) -> (B, 1, X, Y, Z, T), 0 in visible units."""
    return put(cells, units.hidden(shown), units.volume)


def hidden_loss(units: Units, prediction: Tensor, x: Tensor, counted: Tensor, shown: Tensor, kind: str) -> Tensor:
    """As `reconstruction_loss`, of hidden cells alone: no prediction of the whole clip is made.

    Args:
        units: How clips are cut.
        prediction: (B, H, T, cx, cy, cz).
        x: (B, 1, X, Y, Z, T) voxels.
        counted: bool (B, X, Y, Z), voxels that count where they are hidden.
        shown: int64 (B, V), the visible units.
        kind: l1 | smooth_l1 | l2.

    Returns:
        A scalar in float32 (or wider, as x); clips without a counted voxel are left out (0 if there is no other).
    """
    hidden = units.hidden(shown)
    sample = torch.arange(len(x), device=x.device).unsqueeze(1)
    # All cells are laid out before some are taken: rows are copied faster than boxes.
    wide = torch.promote_types(x.dtype, torch.float32)
    target = _blocks(x.squeeze(1), units.cell).flatten(1, 3)[sample, hidden].to(wide)
    of_cells = take(counted, units.cell, hidden)
    sums = row_sums(prediction, target, of_cells.unsqueeze(2), kind)
    return mean_of_clips(sums, of_cells.flatten(1).sum(1) * units.volume[3])

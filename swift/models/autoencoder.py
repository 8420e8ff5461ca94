"""Masked autoencoder: a 4D Swin encoder that sees mask tokens in place of hidden patches, and a decoder to voxels.

As in SimMIM (Xie et al. 2022): the mask token replaces the embedding, and the loss counts hidden voxels only.
Shapes: B batch, X Y Z T voxels and frames, x y z t token grid, E width of stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.config.schema import ModelConfig
from swift.models.decoders import LinearDecoder, LocalDecoder, build_decoder, check_size
from swift.models.encoder import SwinEncoder
from swift.models.init import FIRST_WEIGHT, NORMAL, STD, ZERO, Init
from swift.models.layers import tokens_along
from swift.models.maps import LinearPart, Maps
from swift.models.packed import patches, to_places
from swift.models.pooling import brain_tokens
from swift.models.row_loss import mean_of_clips, row_sums
from swift.models.token_sets import TokenSet


class MaskedAutoencoder(nn.Module):
    """Encoder, mask token and decoder for clips of `grid` voxels and `frames` frames."""

    def __init__(self, cfg: ModelConfig, grid: Sequence[int], frames: int):
        super().__init__()
        self.volume = (*grid, frames)
        self.encoder = SwinEncoder(cfg, grid, frames)
        self.mask_token = nn.Parameter(torch.zeros(cfg.embed_dim))
        self.decoder: LocalDecoder | LinearDecoder = build_decoder(cfg, grid, frames)
        self.linear = LinearPart(cfg, grid) if cfg.maps else None
        if self.linear is not None:
            # The prediction begins as the linear one.
            head = self.decoder.head
            setattr(head, FIRST_WEIGHT, ZERO)
            nn.init.zeros_(head.weight)
        nn.init.normal_(self.mask_token, std=STD)

    def own_initial_values(self) -> dict[str, Init]:
        """How the mask token begins."""
        return {"mask_token": NORMAL}

    def blocks(self) -> list[nn.Module]:
        """The parts that repeat, in the order they run."""
        return self.encoder.blocks()

    def hidden_rows(self, x: Tensor, mask: Tensor, brain: Tensor) -> Tensor | None:
        """Hidden patches as `forward` can predict them alone, int64 (R,), ascending: of P * t existing ones.

        None: all are predicted, as there are tokens everywhere, maps, or a decoder of larger cells.
        """
        where = self.encoder.token_sets(brain, x)
        if where is None or self.linear is not None or not isinstance(self.decoder, LocalDecoder):
            return None
        if self.encoder.cohort is not None:
            # What is hidden in another scan's brain only counts nowhere.
            mask = mask & brain_tokens(brain, self.encoder.cfg.patch_size, 0).unsqueeze(-1)
        return to_places(mask, where[0]).flatten().nonzero().squeeze(1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        brain: Tensor | None = None,
        maps: Maps | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct a clip from its visible patches.

        Args:
            x: (B, 1, X, Y, Z, T) voxels.
            mask: bool (B, x, y, z, t), True = the patch is hidden.
            brain: bool (B, X, Y, Z), where a model with maps reads them and tokens=brain has tokens; None: everywhere.
            maps: Of each clip's scan, for a model with model.maps_of=scan.
            rows: Of `hidden_rows`, where only they shall be predicted; None: everything.

        Returns:
            (B, 1, X, Y, Z, T) prediction for every voxel, visible ones included; 0 where tokens=brain has none.
            With `rows` (R, px*py*pz*pt) of those patches.

        Raises:
            ValueError: a clip of another size than the decoder was built for; no maps where each scan has its own.
        """
        check_size(x, self.volume)
        where = self.encoder.token_sets(brain, x)
        tokens = self.encoder.embed(x, where)
        hidden = mask if where is None else to_places(mask, where[0])
        tokens = torch.where(hidden.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        features = self.encoder.encode(tokens, where)
        if rows is not None:
            found: Tensor = self.decoder(features, where, rows)
            return found
        rest: Tensor = self.decoder(features, where)
        if self.linear is None:
            return rest
        if brain is None:
            brain = torch.ones(len(x), *self.volume[:3], dtype=torch.bool, device=x.device)
        return rest + self.linear(x, mask, brain, maps)


LOSSES = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}


def clip_sums(prediction: Tensor, target: Tensor, counted: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Loss summed over the counted voxels of each clip, and how many those are.

    Args:
        prediction: (B, 1, X, Y, Z, T).
        target: the same shape.
        counted: bool (B, X, Y, Z, T): hidden, in the brain, in a real sample.
        kind: l1 | smooth_l1 | l2.

    Returns:
        float32 (B,) and int64 (B,).
    """
    # where, not a product (0 * NaN is NaN), and before the loss, not after it: its gradient at NaN is NaN, times 0 too.
    difference = torch.where(counted, prediction.squeeze(1).float() - target.squeeze(1).float(), 0.0)
    each = LOSSES[kind](difference, difference.new_zeros(()).expand_as(difference), reduction="none")
    return each.flatten(1).sum(1), counted.flatten(1).sum(1)


def reconstruction_loss(prediction: Tensor, target: Tensor, counted: Tensor, kind: str) -> Tensor:
    """Mean over the clips of a batch of the mean loss over the counted voxels of each; arguments as in `clip_sums`.

    Every clip weighs the same, so that the loss of a batch is the mean of those of its parts: micro-batches and ranks
    change nothing. A mean over all voxels of a batch would weigh clips by the brains they are batched with.

    Returns:
        A scalar in float32; clips without a counted voxel are left out (0 if there is no other).
    """
    sums, voxels = clip_sums(prediction, target, counted, kind)
    return mean_of_clips(sums, voxels)


def rows_loss(
    prediction: Tensor, x: Tensor, counted: Tensor, rows: Tensor, where: TokenSet, patch: Sequence[int], kind: str
) -> Tensor:
    """As `reconstruction_loss`, of hidden patches alone: nothing is laid out on the grid.

    Args:
        prediction: (R, px*py*pz*pt).
        x: (B, 1, X, Y, Z, T) voxels.
        counted: bool (B, X, Y, Z), voxels that count where they are hidden.
        rows: int64 (R,), ascending, of the P * t existing patches.
        where: The P places.
        patch: Voxels x, y, z and frames.
        kind: l1 | smooth_l1 | l2.
    """
    frames, pt = tokens_along(x.shape[-1], patch[3]), patch[3]
    place = rows // frames
    wide = torch.promote_types(x.dtype, torch.float32)
    target = patches(x, patch, where).flatten(0, 1).index_select(0, rows).to(wide).unflatten(1, (-1, pt))
    inside = patches(counted[:, None, ..., None], (*patch[:3], 1), where)[:, 0].index_select(0, place)
    of_rows = inside.unsqueeze(-1).expand_as(target)
    if x.shape[-1] % pt:
        # The frames that fill up the last patch.
        frame = (rows % frames).unsqueeze(1) * pt + torch.arange(pt, device=rows.device)
        of_rows = of_rows & (frame < x.shape[-1]).unsqueeze(1)
    sums = row_sums(prediction.view(target.shape), target, of_rows, kind)
    # The rows of a clip lie together: sums of pieces, which are the same in every run, on a GPU too.
    clips = torch.arange(len(x), device=rows.device).unsqueeze(1)
    pieces = (where.clip.index_select(0, place) == clips).sum(1).tolist()
    each, voxels = sums.split(pieces), of_rows.flatten(1).sum(1).split(pieces)
    return mean_of_clips(torch.stack([part.sum() for part in each]), torch.stack([part.sum() for part in voxels]))

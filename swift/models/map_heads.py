"""Dense heads: from the features of the encoder to a brain map for each contrast, on cells of about 4 mm.

Both pool each stage over time, bring all stages to the patch grid from the coarse ones down, and add a learned table of
places: the scans lie in one template's box, and without it a head could not say where in the brain it is. They give
deviations from the training mean, in units of the contrast's standard deviation, and begin with 0: the mean itself.
With task.courses a map that follows from the moments of the clip's courses is added (`swift.models.course_moments`).

Shapes: B batch, X Y Z T voxels and frames, x y z t token grid of a stage, C its channels, D width, K contrasts, and
cx cy cz the predicted cells.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swift.config.schema import ModelConfig, TaskConfig
from swift.models.course_moments import MapOfMoments, count_of, course_moments
from swift.models.encoder import stage_grids
from swift.models.init import FIRST_WEIGHT, NORMAL, ZERO, Init

EPSILON = 1e-6
SUMMARIES = 4
"""Channels of `summaries`."""
FINE_WIDTH = 16
"""Channels on the predicted cells: as wide as the rest, the last block alone would cost more than the encoder."""


def channels_of(task: TaskConfig) -> int:
    """K."""
    assert task.target is not None
    return max(1, len(task.target.contrasts))


class TimePool(nn.Module):
    """(B, x, y, z, t, C) -> (B, x, y, z, W) over time: W is C, or 2 C with the standard deviation.

    Args:
        dim: C.
        kind: mean | mean_std | attention: weights of the frames by one learned query.
    """

    def __init__(self, dim: int, kind: str):
        super().__init__()
        self.kind, self.width = kind, 2 * dim if kind == "mean_std" else dim
        self.query = nn.Linear(dim, 1, bias=False) if kind == "attention" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.query is not None:
            weight = self.query(F.layer_norm(x, x.shape[-1:])).softmax(-2)
            return (weight * x).sum(-2)
        mean = x.mean(-2)
        if self.kind == "mean":
            return mean
        variance = (x - mean.unsqueeze(-2)).square().mean(-2)
        return torch.cat([mean, (variance + EPSILON).sqrt()], -1)


class Conv(nn.Conv3d):
    """A 3 x 3 x 3 convolution with initial values as `swift.models.init` wants them."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)

    def own_initial_values(self) -> dict[str, Init]:
        """Variance kept."""
        return {"weight": Init(True, 1 / math.sqrt(27 * self.in_channels)), "bias": ZERO}


class ConvBlock(nn.Module):
    """Norm, GELU and convolution beside the identity; (B, x, y, z, D) -> the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = Conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.norm(x)).movedim(-1, 1)
        return x + self.conv(inner).movedim(1, -1)


class PlaceTable(nn.Module):
    """A learned vector for each place of the patch grid."""

    def __init__(self, grid: Sequence[int], dim: int):
        super().__init__()
        self.space = nn.Parameter(torch.zeros(*grid[:3], dim))

    def own_initial_values(self) -> dict[str, Init]:
        """How the table begins."""
        return {"space": NORMAL}

    def forward(self, x: Tensor) -> Tensor:
        """(B, x, y, z, D) -> the same."""
        return x + self.space


class MapHead(nn.Module):
    """What both heads share: `pooled` makes of clips what may be averaged over a subject, `decode` makes maps of it.

    Args:
        cfg: The architecture.
        task: With a target of kind map.
        grid: Voxels X, Y, Z.
        frames: Of a clip.

    Raises:
        ValueError: cells that do not fit the patches.
    """

    def __init__(self, cfg: ModelConfig, task: TaskConfig, grid: Sequence[int], frames: int):
        super().__init__()
        assert task.map_step is not None
        self.step = task.map_step
        self.cells = tuple(math.ceil(n / self.step) for n in grid)
        """cx, cy, cz."""
        self.outputs = channels_of(task)
        self.patch = tuple(cfg.patch_size[:3])
        if any(size % self.step for size in self.patch):
            raise ValueError(
                f"task.map_step={self.step}: does not divide model.patch_size={list(cfg.patch_size)}; take a number "
                "that divides its three sizes in space"
            )
        self.per_patch = tuple(size // self.step for size in self.patch)
        """Cells of a patch along x, y, z."""
        self.grids = stage_grids(cfg, (*grid, frames))
        dims = [cfg.embed_dim << stage for stage in range(len(cfg.depths))]
        kind = "attention" if task.adapt == "attentive" else task.pooling
        self.pools = nn.ModuleList(TimePool(dim, kind) for dim in dims)
        self.widths = [dim * (2 if kind == "mean_std" else 1) for dim in dims]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)
        self.laterals = nn.ModuleList(nn.Linear(width, cfg.decoder_dim) for width in self.widths)
        self.place = PlaceTable(self.grids[0], cfg.decoder_dim)
        self.courses = cfg.maps if task.courses else 0
        self.of_courses = MapOfMoments(self.courses, self.outputs, self.cells) if task.courses else None

    def shapes(self) -> list[tuple[int, ...]]:
        """Of what `pooled` gives for one clip."""
        return [*self.dense_shapes(), *([(count_of(self.courses),)] if self.courses else [])]

    def pooled(
        self, features: Sequence[Tensor], x: Tensor, brain: Tensor, courses: Tensor | None = None
    ) -> list[Tensor]:
        """What may be averaged over clips.

        Args:
            features: (B, x, y, z, t, C) of every stage.
            x: (B, 1, X, Y, Z, T).
            brain: bool (B, X, Y, Z).
            courses: (B, T, maps), for a head that takes them.
        """
        found = self.dense_pooled(features, x, brain)
        if self.of_courses is None:
            return found
        assert courses is not None, "this head takes courses"
        return [*found, course_moments(courses)]

    def decode(self, pooled: Sequence[Tensor]) -> Tensor:
        """What `pooled` gave, or its mean over clips -> (B, K, cx, cy, cz) float32."""
        if self.of_courses is None:
            return self.dense(pooled)
        moments = pooled[-1].to(self.of_courses.patterns.dtype)
        return self.dense(pooled[:-1]) + self.of_courses(moments)

    def forward(self, features: Sequence[Tensor], x: Tensor, brain: Tensor, courses: Tensor | None = None) -> Tensor:
        """Both: (B, K, cx, cy, cz) float32."""
        return self.decode(self.pooled(features, x, brain, courses))

    def dense_shapes(self) -> list[tuple[int, ...]]:
        """Of what `dense_pooled` gives for one clip."""
        return [(*grid[:3], width) for grid, width in zip(self.grids, self.widths, strict=True)]

    def dense_pooled(self, features: Sequence[Tensor], x: Tensor, brain: Tensor) -> list[Tensor]:
        """What `dense` reads; arguments as of `pooled`."""
        return [pool(feature) for pool, feature in zip(self.pools, features, strict=True)]

    @abstractmethod
    def dense(self, pooled: Sequence[Tensor]) -> Tensor:
        """The part that follows from the encoder's features: (B, K, cx, cy, cz) float32."""

    def _down(self, pooled: Sequence[Tensor], blocks: Sequence[nn.Module] | None) -> Tensor:
        """All stages on the patch grid, (B, x, y, z, D): doubled from stage to stage, a block after each."""
        hidden: Tensor | None = None
        for stage in reversed(range(len(self.grids))):
            here = self.laterals[stage](self.norms[stage](pooled[stage]))
            if hidden is not None:
                sx, sy, sz = here.shape[1:4]
                doubled = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
                here = here + doubled[:, :sx, :sy, :sz]
            if stage == 0:
                here = self.place(here)
            hidden = here if blocks is None else blocks[stage](here)
        assert hidden is not None
        return hidden


class LocalMapHead(MapHead):
    """Each patch by itself: a linear map from the sum of all stages to the cells of the patch."""

    def __init__(self, cfg: ModelConfig, task: TaskConfig, grid: Sequence[int], frames: int):
        super().__init__(cfg, task, grid, frames)
        self.norm = nn.LayerNorm(cfg.decoder_dim)
        self.out = nn.Linear(cfg.decoder_dim, self.outputs * math.prod(self.per_patch))
        setattr(self.out, FIRST_WEIGHT, ZERO)
        nn.init.zeros_(self.out.weight)

    def dense(self, pooled: Sequence[Tensor]) -> Tensor:
        """See MapHead."""
        out = self.out(F.gelu(self.norm(self._down(pooled, None)))).float()
        px, py, pz = self.per_patch
        pattern = "b x y z (k px py pz) -> b k (x px) (y py) (z pz)"
        cells = rearrange(out, pattern, px=px, py=py, pz=pz, k=self.outputs)
        cx, cy, cz = self.cells
        return cells[:, :, :cx, :cy, :cz]


class UnetMapHead(MapHead):
    """Convolutions from the last stage down to the patch grid, then on the cells, where summaries of the clip join."""

    def __init__(self, cfg: ModelConfig, task: TaskConfig, grid: Sequence[int], frames: int):
        super().__init__(cfg, task, grid, frames)
        self.blocks = nn.ModuleList(ConvBlock(cfg.decoder_dim) for _ in self.grids)
        self.narrow = nn.Linear(cfg.decoder_dim, FINE_WIDTH)
        self.skip = nn.Linear(SUMMARIES, FINE_WIDTH)
        self.fine = ConvBlock(FINE_WIDTH)
        self.norm = nn.LayerNorm(FINE_WIDTH)
        self.out = nn.Linear(FINE_WIDTH, self.outputs)
        setattr(self.out, FIRST_WEIGHT, ZERO)
        nn.init.zeros_(self.out.weight)

    def dense_shapes(self) -> list[tuple[int, ...]]:
        """With the summaries."""
        return [*super().dense_shapes(), (*self.cells, SUMMARIES)]

    def dense_pooled(self, features: Sequence[Tensor], x: Tensor, brain: Tensor) -> list[Tensor]:
        """With the summaries of the clip."""
        found = super().dense_pooled(features, x, brain)
        return [*found, summaries(x, brain, self.step).to(found[0].dtype)]

    def dense(self, pooled: Sequence[Tensor]) -> Tensor:
        """See MapHead."""
        hidden = self.narrow(self._down(pooled[:-1], list(self.blocks))).movedim(-1, 1)
        size = [n * p for n, p in zip(hidden.shape[2:], self.per_patch, strict=True)]
        cx, cy, cz = self.cells
        big = F.interpolate(hidden, size=size, mode="trilinear", align_corners=False)[:, :, :cx, :cy, :cz]
        fine = self.fine(big.movedim(1, -1) + self.skip(pooled[-1]))
        return self.out(F.gelu(self.norm(fine))).movedim(-1, 1).float()


@torch.no_grad()
def summaries(x: Tensor, brain: Tensor, step: int) -> Tensor:
    """What a clip is like at each cell: mean, logarithm of the standard deviation, autocorrelation at one frame, and
    correlation with the mean course of the brain. Of the mean course of a cell's brain voxels; 0 without brain.

    Args:
        x: (B, 1, X, Y, Z, T).
        brain: bool (B, X, Y, Z).
        step: Voxels along an edge of a cell.

    Returns:
        (B, cx, cy, cz, 4) float32.
    """
    inside = brain.float()
    courses = (x[:, 0].float() * inside[..., None]).movedim(-1, 1)
    both = torch.cat([courses, inside[:, None]], 1)
    both = F.avg_pool3d(both, step, ceil_mode=True) if step > 1 else both
    weight = both[:, -1]
    courses = (both[:, :-1] / weight.clamp(min=EPSILON)[:, None]).movedim(1, -1)
    mean = courses.mean(-1, keepdim=True)
    rest = courses - mean
    variance = rest.square().mean(-1) + EPSILON
    lagged = (rest[..., 1:] * rest[..., :-1]).mean(-1) / variance if rest.shape[-1] > 1 else torch.zeros_like(variance)
    whole = torch.einsum("bxyzt,bxyz->bt", rest, weight)
    whole = whole / (whole.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    along = torch.einsum("bxyzt,bt->bxyz", rest, whole) / rest.shape[-1] / variance.sqrt()
    found = torch.stack([mean[..., 0], variance.log() / 2, lagged, along], -1)
    return torch.where((weight > 0)[..., None], found, 0.0)


def build_map_head(cfg: ModelConfig, task: TaskConfig, grid: Sequence[int], frames: int) -> MapHead:
    """The head that `task.head` names."""
    kind = LocalMapHead if task.head == "map_local" else UnetMapHead
    return kind(cfg, task, grid, frames)

"""The encoder with a head: what is predicted from a clip, once a clip or once a frame.

Shapes: B batch, X Y Z T voxels and frames, x y z t token grid of the last stage, C its channels, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from swift.config.schema import ModelConfig, TaskConfig
from swift.models import drop
from swift.models.adapt import adapt, keep_frozen_still
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.encoder import SwinEncoder
from swift.models.init import FIRST_WEIGHT, NORMAL, ZERO, Init
from swift.models.map_heads import MapHead, build_map_head
from swift.models.maps import LinearPart, Maps
from swift.models.pooling import brain_tokens, pool

EPSILON = 1e-6
"""Under the root of a variance, whose gradient at 0 would be infinite."""


class LatentPool(AttentionPoolLatent):
    """Attention pooling with one learned query (timm's), over the brain tokens.

    Args:
        dim: Channels C.
        heads: Attention heads.
        base_width: muP: of the channels; scores are then divided by head_dim, and as usual at that width.
    """

    def __init__(self, dim: int, heads: int, base_width: int | None):
        super().__init__(dim, num_heads=heads, mlp_ratio=2.0, norm_layer=nn.LayerNorm)
        # The fused kernel of timm's takes no scale of ours; one query is cheap without it.
        self.fused_attn = False  # type: ignore[misc]  # final for torch.jit only
        if base_width is not None:
            self.scale = math.sqrt(base_width / dim / self.head_dim)

    def own_initial_values(self) -> dict[str, Init]:
        """How the query begins."""
        return {"latent": NORMAL}


class Head(nn.Module):
    """From the features of the last stage to the outputs: pooled over the brain, normalized, one linear map.

    Args:
        cfg: The architecture.
        outputs: K.
        per_frame: One output a frame instead of one a clip.
        pooling: mean | mean_std | attention.
        courses: Maps whose courses are given beside the features: a frame's own, or of a clip their mean and standard
            deviation over frames; 0: none.
    """

    def __init__(self, cfg: ModelConfig, outputs: int, per_frame: bool, pooling: str, courses: int = 0):
        super().__init__()
        stage = len(cfg.depths) - 1
        dim = cfg.embed_dim << stage
        self.patch, self.stage, self.per_frame = tuple(cfg.patch_size), stage, per_frame
        base = None if cfg.attention_base_width is None else cfg.attention_base_width << stage
        self.pool = LatentPool(dim, cfg.num_heads[-1], base) if pooling == "attention" else None
        self.spread = pooling == "mean_std"
        width = 2 * dim if self.spread else dim
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, outputs * (self.patch[3] if per_frame else 1))
        # A map of its own: the number of courses does not grow with the width (muP). They come at unit variance.
        inputs = courses if per_frame else 2 * courses
        self.of_courses = nn.Linear(inputs, outputs, bias=False) if courses else None
        if self.of_courses is not None:
            setattr(self.of_courses, FIRST_WEIGHT, ZERO)
            nn.init.zeros_(self.of_courses.weight)

    def forward(self, features: Tensor, brain: Tensor, frames: int, courses: Tensor | None = None) -> Tensor:
        """Outputs of a clip.

        Args:
            features: (B, x, y, z, t, C) of the last stage.
            brain: bool (B, X, Y, Z); a clip without a brain voxel (padding) gives finite rubbish.
            frames: T.
            courses: (B, T, maps), for a head that takes them.

        Returns:
            (B, K), or (B, T, K) per frame; float32.
        """
        tokens = brain_tokens(brain, self.patch, self.stage)
        tokens = tokens | ~tokens.flatten(1).any(1).view(-1, 1, 1, 1)
        pooled = self._pooled(features, tokens)
        out: Tensor = self.linear(self.norm(pooled)).float()
        if self.per_frame:
            # Of a patch of several frames each has outputs of its own; the last patch may reach beyond the clip.
            out = out.unflatten(-1, (self.patch[3], -1)).flatten(1, 2)[:, :frames]
        if self.of_courses is None:
            return out
        assert courses is not None, "this head takes courses"
        if not self.per_frame:
            spread = (courses.var(1, correction=0) + EPSILON).sqrt()
            courses = torch.cat([courses.mean(1), spread], -1)
        return out + self.of_courses(courses.to(self.of_courses.weight.dtype)).float()

    def _mean(self, features: Tensor, tokens: Tensor) -> Tensor:
        mean = pool(features, tokens)
        return mean if self.per_frame else mean.mean(1)

    def _pooled(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, C) over space and time, or (B, t, C) over space; twice as many with the standard deviation."""
        if self.pool is None:
            mean = self._mean(features, tokens)
            if not self.spread:
                return mean
            centre = mean[:, None, None, None] if self.per_frame else mean[:, None, None, None, None]
            variance = self._mean((features - centre).square(), tokens)
            return torch.cat([mean, (variance + EPSILON).sqrt()], -1)
        batch, _, _, _, steps, channels = features.shape
        hidden = torch.where(tokens.flatten(1), 0.0, -torch.inf).to(features.dtype)
        if self.per_frame:
            rows = features.flatten(1, 3).transpose(1, 2).reshape(batch * steps, -1, channels)
            hidden = hidden.repeat_interleave(steps, 0)
        else:
            rows = features.flatten(1, 4)
            hidden = hidden.repeat_interleave(steps, 1)
        out: Tensor = self.pool(rows, hidden[:, None, None, :])
        return out.unflatten(0, (batch, steps)) if self.per_frame else out


class TargetModel(nn.Module):
    """Encoder and head, of which as much is trained as the task says.

    Args:
        cfg: The architecture.
        task: With a target.
        grid: Voxels x, y, z.
        frames: Of a clip.
    """

    def __init__(self, cfg: ModelConfig, task: TaskConfig, grid: Sequence[int], frames: int):
        super().__init__()
        assert task.target is not None
        self.volume = (*grid, frames)
        self.encoder = SwinEncoder(cfg, grid, frames)
        self.head: Head | MapHead
        if task.target.kind == "map":
            self.head = build_map_head(cfg, task, grid, frames)
        else:
            outputs = 1 if task.target.kind == "regression" else len(task.target.classes)
            pooling = "attention" if task.adapt == "attentive" else task.pooling
            self.head = Head(cfg, outputs, task.target.per == "frame", pooling, cfg.maps if task.courses else 0)
        self.linear = LinearPart(cfg, grid) if task.courses else None
        adapt(self.encoder, task)
        if self.linear is not None:
            self.linear.requires_grad_(task.adapt in ("scratch", "full"))

    def blocks(self) -> list[nn.Module]:
        """The parts that repeat, in the order they run."""
        return self.encoder.blocks()

    def train(self, mode: bool = True) -> TargetModel:
        """As usual, but what is frozen stays in eval mode: it drops nothing."""
        super().train(mode)
        keep_frozen_still(self.encoder)
        return self

    def forward(self, x: Tensor, brain: Tensor, maps: Maps | None = None) -> Tensor:
        """Outputs of clips.

        Args:
            x: (B, 1, X, Y, Z, T) voxels.
            brain: bool (B, X, Y, Z).
            maps: Of each clip's scan, for task.courses with model.maps_of=scan.

        Returns:
            (B, K) or (B, T, K), float32; of maps (B, K, cx, cy, cz), see `swift.models.map_heads`.
        """
        courses = self._courses(x, brain, maps)
        if isinstance(self.head, MapHead):
            return self.head(self.encoder(x, brain), x, brain, courses)
        return self.head(self.encoder(x, brain)[-1], self.encoder.inside(brain), x.shape[-1], courses)

    other_forwards = ("pooled", "decode")
    """Methods that compute with weights beside `forward`: fully_shard gathers those of the root for them too."""

    def decode(self, pooled: list[Tensor]) -> Tensor:
        """What a head of maps makes of what `pooled` gave, or of its mean over clips."""
        assert isinstance(self.head, MapHead)
        return self.head.decode(pooled)

    def pooled(self, x: Tensor, brain: Tensor) -> list[Tensor]:
        """What a head of maps makes of clips before it makes a map, see `MapHead.pooled`."""
        assert isinstance(self.head, MapHead)
        return self.head.pooled(self.encoder(x, brain), x, brain, self._courses(x, brain, None))

    def _courses(self, x: Tensor, brain: Tensor, maps: Maps | None) -> Tensor | None:
        return None if self.linear is None else self.linear.courses_of_all(x, brain, maps)


def build_model(
    cfg: ModelConfig, task: TaskConfig, grid: Sequence[int], frames: int
) -> MaskedAutoencoder | drop.AnyDrop | TargetModel:
    """The model of a task: encoder with decoder, or with head."""
    if task.target is not None:
        return TargetModel(cfg, task, grid, frames)
    units = drop.cut(cfg, task, (*grid, frames))
    return MaskedAutoencoder(cfg, grid, frames) if units is None else drop.build(cfg, units)

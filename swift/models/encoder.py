"""The 4D Swin encoder with its three variants: SwiFT v1, joint and factorized (SwiFT V2) window attention.

Plain torch: knows nothing of training, sharding or configuration files.
Shapes: B batch, X Y Z T voxels and frames or their token grid, C channels of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from swift.config.schema import ModelConfig
from swift.models.attention import WindowAttention
from swift.models.cells import Cells
from swift.models.init import draw
from swift.models.layers import AbsolutePosition, AxialPosition, PatchEmbed, PatchMerging, Residual, token_grid
from swift.models.rope import WindowRotary

SPACE, TIME, JOINT = (0, 1, 2), (3,), (0, 1, 2, 3)


def stage_grids(cfg: ModelConfig, volume: Sequence[int]) -> list[tuple[int, ...]]:
    """Token grid (x, y, z, t) of every stage for a volume of x, y, z voxels and t frames.

    Raises:
        ValueError: a single token is left in space before the last stage, so that merging would only pad.
    """
    grids = [token_grid(volume, cfg.patch_size)]
    for stage in range(1, len(cfg.depths)):
        x, y, z, t = grids[-1]
        if x == y == z == 1:
            raise ValueError(
                f"a grid of {tuple(volume[:3])} voxels with patch {tuple(cfg.patch_size[:3])} is down to one token "
                f"before stage {stage + 1} of {len(cfg.depths)}: use a larger data.grid, a smaller model.patch_size "
                "or fewer model.depths"
            )
        grids.append(((x + 1) // 2, (y + 1) // 2, (z + 1) // 2, t))
    return grids


def _branch_order(cfg: ModelConfig) -> list[str]:
    """Names of a block's residual branches in the order they run."""
    if cfg.attention == "joint":
        return ["attn", "mlp"]
    first, second = ("space", "time") if cfg.order == "st" else ("time", "space")
    return [first, second, "mlp"] if cfg.mlp == "shared" else [first, "mlp1", second, "mlp2"]


def _branch_axes(name: str) -> tuple[int, ...]:
    return {"attn": JOINT, "space": SPACE, "time": TIME}[name]


class SwinBlock(nn.Module):
    """Residual branches in sequence: one attention and an MLP, or attention over space, over time and an MLP."""

    def __init__(self, cfg: ModelConfig, stage: int, grid: tuple[int, ...], shifted: bool, drop_path: float):
        super().__init__()
        self.order = _branch_order(cfg)
        dim = cfg.embed_dim * 2**stage
        for name in self.order:
            if name.startswith("mlp"):
                fn: nn.Module = Mlp(dim, int(cfg.mlp_ratio * dim), drop=cfg.dropout)
            else:
                fn = _attention(cfg, stage, grid, shifted, _branch_axes(name))
            self.add_module(name, Residual(dim, fn, cfg.layer_scale, drop_path))

    def forward(self, x: Tensor, cells: Cells | None = None) -> Tensor:
        """(B, X, Y, Z, T, C) -> the same; `cells`: as of `WindowAttention`."""
        for name in self.order:
            branch = self.get_submodule(name)
            x = branch(x) if cells is None or name.startswith("mlp") else branch(x, cells)
        return x


def _attention(
    cfg: ModelConfig, stage: int, grid: tuple[int, ...], shifted: bool, axes: tuple[int, ...]
) -> WindowAttention:
    """Attention of one branch: its window covers `axes` and is one token wide on the others."""
    last = stage == len(cfg.depths) - 1
    window = [cfg.window[axis] if axis in axes else 1 for axis in range(4)]
    if last and cfg.last_stage == "full":
        # 0 stands for the whole axis; in a factorized block only space has few enough tokens for that.
        window = [0 if axis in axes and axes != TIME else w for axis, w in enumerate(window)]
    dim, heads = cfg.embed_dim * 2**stage, cfg.num_heads[stage]
    rotary = None
    if cfg.position in ("rope", "rope_global"):
        largest = tuple(w or n for w, n in zip(window, grid))
        rotary = WindowRotary(largest, axes, dim // heads, cfg.rope_base)
    shifted = shifted and not (last and cfg.last_stage == "unshifted")
    # muP: queries and keys align during training, so their product grows like head_dim; equal to the usual scale at E0.
    base = cfg.attention_base_width
    scale = None if base is None or base == cfg.embed_dim else math.sqrt(base / cfg.embed_dim / (dim // heads))
    return WindowAttention(dim, heads, tuple(window), shifted, rotary, cfg.attention_dropout, cfg.dropout, scale)


class Stage(nn.Module):
    """Optional position tables, the blocks, of which every second is shifted, and the merging for the next stage."""

    def __init__(self, cfg: ModelConfig, stage: int, grid: tuple[int, ...], drop_paths: Sequence[float]):
        super().__init__()
        dim = cfg.embed_dim * 2**stage
        self.position = AbsolutePosition(grid, dim) if cfg.position == "absolute" else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(cfg, stage, grid, shifted=index % 2 == 1, drop_path=rate) for index, rate in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(dim) if stage < len(cfg.depths) - 1 else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, X, Y, Z, T, C) -> the features of this stage, the same shape, and the tokens of the next one."""
        x = self.position(x)
        for block in self.blocks:
            x = block(x)
        return x, self.downsample(x)


class SwinEncoder(nn.Module):
    """4D Swin transformer encoder.

    Args:
        cfg: the architecture.
        grid: voxels x, y, z of the input.
        frames: frames of a clip.
        in_channels: channels of the input.

    Raises:
        ValueError: the grid, the patch or the heads do not fit together (the message says which).
    """

    def __init__(self, cfg: ModelConfig, grid: Sequence[int], frames: int, in_channels: int = 1):
        super().__init__()
        self.cfg = cfg
        self.volume = (*grid, frames)
        self.grids = stage_grids(cfg, self.volume)
        self.patch_embed = PatchEmbed(cfg.patch_size, in_channels, cfg.embed_dim, cfg.patch_norm)
        self.position = AxialPosition(self.grids[0], cfg.embed_dim) if cfg.position == "rope_global" else nn.Identity()
        self.dropout = nn.Dropout(cfg.dropout)
        rates = iter(torch.linspace(0, cfg.drop_path, sum(cfg.depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            Stage(cfg, stage, stage_grid, [next(rates) for _ in range(depth)])
            for stage, (stage_grid, depth) in enumerate(zip(self.grids, cfg.depths, strict=True))
        )
        self.norm = nn.LayerNorm(cfg.embed_dim * 2 ** (len(cfg.depths) - 1))
        draw(self)

    def blocks(self) -> list[nn.Module]:
        """The parts that repeat, in the order they run."""
        return [block for stage in self.stages for block in stage.get_submodule("blocks").children()]

    def embed(self, x: Tensor) -> Tensor:
        """(B, C_in, X, Y, Z, T) voxels -> (B, x, y, z, t, E) patch tokens, before positions."""
        return self.patch_embed(x)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """(B, x, y, z, t, E) patch tokens -> the features of every stage, each (B, Xs, Ys, Zs, t, E * 2^s)."""
        x = self.dropout(self.position(tokens))
        features = []
        for stage in self.stages:
            feature, x = stage(x)
            features.append(feature)
        if self.cfg.final_norm:
            features[-1] = self.norm(features[-1])
        return features

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C_in, X, Y, Z, T) voxels -> the features of every stage, the last one after the final norm if used."""
        return self.encode(self.embed(x))

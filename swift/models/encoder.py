"""The 4D Swin encoder with its three variants: SwiFT v1, joint and factorized (SwiFT V2) window attention.

Plain torch: knows nothing of training, sharding or configuration files.
Shapes: B batch, X Y Z T voxels and frames or their token grid, C channels of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from swift.config.schema import ModelConfig
from swift.models.attention import WindowAttention
from swift.models.cells import Cells, Frames, Seen
from swift.models.init import draw
from swift.models.layers import AbsolutePosition, AxialPosition, PatchEmbed, PatchMerging, Residual, token_grid
from swift.models.packed import to_grid
from swift.models.rope import WindowRotary
from swift.models.token_sets import TokenSet, kept_sets, token_sets
from swift.utils.bits import from_text

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


def _place(position: nn.Module, x: Tensor, where: TokenSet | None) -> Tensor:
    """Positions, on the whole grid or on a TokenSet."""
    found: Tensor = position(x) if where is None or isinstance(position, nn.Identity) else position(x, where.take)
    return found


def _call(module: nn.Module, x: Tensor, where: TokenSet | None) -> Tensor:
    """A part that may be missing, on the whole grid or on a TokenSet."""
    found: Tensor = module(x) if where is None or isinstance(module, nn.Identity) else module(x, where)
    return found


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

    def forward(self, x: Tensor, where: Cells | Frames | Seen | TokenSet | None = None) -> Tensor:
        """(B, X, Y, Z, T, C), or (P, T, C) of a TokenSet -> the same; `where`: as of `WindowAttention`."""
        for name in self.order:
            branch = self.get_submodule(name)
            x = branch(x) if where is None else branch(x, where)
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

    def forward(self, x: Tensor, where: TokenSet | None = None) -> tuple[Tensor, Tensor]:
        """(B, X, Y, Z, T, C) -> the features of this stage, the same shape, and the tokens of the next one.

        The same with (P, T, C), on the places of a TokenSet.
        """
        x = _place(self.position, x, where)
        for block in self.blocks:
            x = _call(block, x, where)
        return x, _call(self.downsample, x, where)


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
        self.cohort = None if cfg.cohort is None else self._cohort(cfg.cohort)
        self._inside: dict[torch.device, Tensor] = {}

    def _cohort(self, text: str) -> np.ndarray:
        """Cells that are tokens in every clip, bool (x, y, z)."""
        cells = from_text(text)
        if cells.shape != self.grids[0][:3]:
            raise ValueError(
                f"model.cohort has {'x'.join(map(str, cells.shape))} cells, but clips of {self.volume[:3]} voxels have "
                f"{'x'.join(map(str, self.grids[0][:3]))} patches: it belongs to another grid"
            )
        return cells

    def blocks(self) -> list[nn.Module]:
        """The parts that repeat, in the order they run."""
        return [block for stage in self.stages for block in stage.get_submodule("blocks").children()]

    def token_sets(self, brain: Tensor | None, x: Tensor) -> tuple[TokenSet, ...] | None:
        """With tokens=brain: which tokens exist at every stage, of clips like x.

        Args:
            brain: bool (B, X, Y, Z); None: everywhere. With data.brain=cohort it decides nothing.
            x: (B, C_in, X, Y, Z, T).
        """
        if self.cfg.tokens == "box":
            return None
        if self.cohort is not None:
            present = np.broadcast_to(self.cohort, (len(x), *self.cohort.shape))
            return kept_sets(present, len(self.stages), x.device)
        if brain is None:
            brain = torch.ones(len(x), *x.shape[2:5], dtype=torch.bool, device=x.device)
        return token_sets(brain, self.cfg.patch_size, len(self.stages))

    def inside(self, brain: Tensor) -> Tensor:
        """Voxels of brains that lie in a token, bool (B, X, Y, Z): all, but for brains beyond those of the cohort."""
        if self.cohort is None:
            return brain
        if brain.device not in self._inside:
            cells = self.cohort
            for axis, size in enumerate(self.cfg.patch_size[:3]):
                cells = cells.repeat(size, axis)
            x, y, z = self.volume[:3]
            with torch.inference_mode(False):
                self._inside[brain.device] = torch.from_numpy(cells[:x, :y, :z].copy()).to(brain.device)
        return brain & self._inside[brain.device]

    def embed(self, x: Tensor, where: Sequence[TokenSet] | None = None) -> Tensor:
        """(B, C_in, X, Y, Z, T) voxels -> (B, x, y, z, t, E) patch tokens, before positions; (P, t, E) of `where`."""
        return self.patch_embed(x) if where is None else self.patch_embed(x, where[0])

    def encode(self, tokens: Tensor, where: Sequence[TokenSet] | None = None) -> list[Tensor]:
        """Patch tokens -> the features of every stage.

        Args:
            tokens: (B, x, y, z, t, E), or (P, t, E).
            where: The places of every stage; None: the whole grids.

        Returns:
            Each (B, Xs, Ys, Zs, t, E * 2^s), or (P_s, t, E * 2^s).
        """
        x = self.dropout(_place(self.position, tokens, None if where is None else where[0]))
        features = []
        for index, stage in enumerate(self.stages):
            feature, x = stage(x) if where is None else stage(x, where[index])
            features.append(feature)
        if self.cfg.final_norm:
            features[-1] = self.norm(features[-1])
        return features

    def forward(self, x: Tensor, brain: Tensor | None = None) -> list[Tensor]:
        """Features of every stage, the last one after the final norm if used.

        Args:
            x: (B, C_in, X, Y, Z, T) voxels.
            brain: bool (B, X, Y, Z), where tokens=brain reads it; None: everywhere.

        Returns:
            Each (B, Xs, Ys, Zs, t, E * 2^s); zeros where a token does not exist.
        """
        where = self.token_sets(brain, x)
        features = self.encode(self.embed(x, where), where)
        return features if where is None else [to_grid(feature, one) for feature, one in zip(features, where)]

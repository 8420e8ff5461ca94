"""The sizes that FLOPs, memory and traffic follow from, read off the model built on the meta device.

Nothing of the architecture is worked out twice: windows, grids and parameters come from the modules that will train.

Shapes: M tokens of one clip at a stage, C its channels, H hidden channels of its MLP, W windows, N tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from timm.layers import Mlp
from torch import nn

from swift.config.schema import ModelConfig
from swift.models.attention import KERNEL_SLOTS, WindowAttention
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.decoders import LocalDecoder
from swift.models.encoder import Stage as StageModule
from swift.models.encoder import SwinBlock, SwinEncoder
from swift.models.layers import Residual
from swift.models.window_layout import plan_groups
from swift.utils.errors import UserError


@dataclass(frozen=True)
class Branch:
    """A residual branch: attention, or an MLP where `heads` is 0."""

    name: str
    tokens: int
    width: int
    scaled: bool
    """LayerScale."""
    parameters: int
    hidden: int = 0
    heads: int = 0
    rotary: bool = False
    windows: tuple[tuple[int, int], ...] = ()
    """Attention: (W, N) of each group of equal windows of one clip."""

    @property
    def is_attention(self) -> bool:
        """Attention, not an MLP."""
        return self.heads > 0

    @property
    def fits_kernel(self) -> bool:
        """Whether a GPU's attention kernel is written for windows of this size."""
        return max(size for _, size in self.windows) <= KERNEL_SLOTS[-1]

    @property
    def pairs(self) -> int:
        """Query-key pairs of one clip, of one head."""
        return sum(count * size * size for count, size in self.windows)


@dataclass(frozen=True)
class Block:
    """Branches in the order they run."""

    branches: tuple[Branch, ...]

    @property
    def parameters(self) -> int:
        """Of all branches."""
        return sum(branch.parameters for branch in self.branches)

    @property
    def tokens(self) -> int:
        """M."""
        return self.branches[0].tokens

    @property
    def width(self) -> int:
        """C."""
        return self.branches[0].width


@dataclass(frozen=True)
class Stage:
    """Blocks on one token grid, and the merging into the next (rows after it, 0 for the last stage)."""

    grid: tuple[int, ...]
    width: int
    blocks: tuple[Block, ...]
    merged_rows: int
    merging_parameters: int

    @property
    def tokens(self) -> int:
        """M."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Geometry:
    """A masked autoencoder and its clip."""

    volume: tuple[int, ...]
    """Voxels x, y, z and frames."""
    patch: tuple[int, ...]
    patch_norm: bool
    stages: tuple[Stage, ...]
    final_norm: bool
    decoder: str
    decoder_dim: int
    maps: int
    """Spatial maps; 0: none."""
    maps_trained: bool
    parameters: dict[str, int] = field(hash=False)
    """By part: patch embedding, mask token and positions, stage 1, merging 1, ..., final norm, decoder, maps."""
    sizes: tuple[int, ...]
    """Elements of each parameter, largest first."""

    @property
    def total_parameters(self) -> int:
        """All of them."""
        return sum(self.parameters.values())

    @property
    def tokens(self) -> int:
        """Patch tokens of a clip."""
        return self.stages[0].tokens

    @property
    def space(self) -> int:
        """Voxels that the patches cover in one frame."""
        return self.padded_voxels // (self.stages[0].grid[3] * self.patch[3])

    @property
    def patch_voxels(self) -> int:
        """Voxels of a patch."""
        return math.prod(self.patch)

    @property
    def voxels(self) -> int:
        """Voxels of a clip, all frames."""
        return math.prod(self.volume)

    @property
    def padded_voxels(self) -> int:
        """Voxels that the patches cover."""
        return self.tokens * self.patch_voxels


def count(modules: Iterable[nn.Module | nn.Parameter]) -> int:
    """Parameters of modules and single parameters."""
    return sum(
        module.numel() if isinstance(module, nn.Parameter) else sum(p.numel() for p in module.parameters())
        for module in modules
    )


def _branch(block: SwinBlock, name: str, grid: tuple[int, ...]) -> Branch:
    branch = block.get_submodule(name)
    assert isinstance(branch, Residual)
    tokens, scaled = math.prod(grid), branch.gamma is not None
    fn = branch.fn
    if isinstance(fn, Mlp):
        assert isinstance(fn.fc1, nn.Linear)
        hidden = fn.fc1.out_features
        return Branch(name, tokens, fn.fc1.in_features, scaled, count([branch]), hidden=hidden)
    assert isinstance(fn, WindowAttention)
    window = tuple(w or n for w, n in zip(fn.window, grid))
    windows = tuple((group.windows, group.tokens) for group in plan_groups(grid, window, fn.shifted))
    width, rotary = fn.proj.in_features, fn.rotary is not None
    return Branch(name, tokens, width, scaled, count([branch]), heads=fn.heads, rotary=rotary, windows=windows)


def _stages(encoder: SwinEncoder) -> tuple[Stage, ...]:
    stages = []
    for index, (module, grid) in enumerate(zip(encoder.stages, encoder.grids)):
        assert isinstance(module, StageModule)
        blocks = []
        for block in module.blocks:
            assert isinstance(block, SwinBlock)
            blocks.append(Block(tuple(_branch(block, name, grid) for name in block.order)))
        last = index == len(encoder.stages) - 1
        rows = 0 if last else math.prod(encoder.grids[index + 1])
        stages.append(Stage(grid, blocks[0].width, tuple(blocks), rows, count([module.downsample])))
    return tuple(stages)


def build_geometry(cfg: ModelConfig, volume: tuple[int, ...]) -> Geometry:
    """Sizes of the model of `cfg` for clips of `volume` = voxels x, y, z and frames. Allocates no weights.

    Raises:
        UserError: the architecture does not fit the volume.
    """
    try:
        with torch.device("meta"):
            model = MaskedAutoencoder(cfg, volume[:3], volume[3])
    except ValueError as error:
        raise UserError(str(error)) from error
    encoder = model.encoder
    parameters = {
        "patch embedding": count([encoder.patch_embed]),
        "mask token, positions": count([model.mask_token, encoder.position])
        + sum(count([stage.get_submodule("position")]) for stage in encoder.stages),
    }
    stages = _stages(encoder)
    for index, stage in enumerate(stages, start=1):
        parameters[f"stage {index}"] = sum(block.parameters for block in stage.blocks)
        if stage.merging_parameters:
            parameters[f"merging {index}"] = stage.merging_parameters
    parameters["final norm"] = count([encoder.norm])
    parameters["decoder"] = count([model.decoder])
    if model.linear is not None:
        parameters["maps"] = count([model.linear])
    assert sum(parameters.values()) == count([model]), "a part of the model is missing here"
    return Geometry(
        volume=tuple(volume),
        patch=tuple(cfg.patch_size),
        patch_norm=cfg.patch_norm,
        stages=stages,
        final_norm=cfg.final_norm,
        decoder="local" if isinstance(model.decoder, LocalDecoder) else "linear",
        decoder_dim=cfg.decoder_dim,
        maps=cfg.maps,
        maps_trained=model.linear is not None and model.linear.shared,
        parameters=parameters,
        sizes=tuple(sorted((parameter.numel() for parameter in model.parameters()), reverse=True)),
    )

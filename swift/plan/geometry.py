"""The sizes that FLOPs, memory and traffic follow from, read off the model built on the meta device.

Nothing of the architecture is worked out twice: windows, grids and parameters come from the modules that will train.

Shapes: M tokens of one clip at a stage, C its channels, H hidden channels of its MLP, W windows, N tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from swift.config.check import mask_unit
from swift.config.schema import Config, ModelConfig, TaskConfig
from swift.models import drop
from swift.models.attention import KERNEL_SLOTS, WindowAttention
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.cells import Frames, scattered_window
from swift.models.decoders import LinearDecoder, LocalDecoder
from swift.models.encoder import Stage as StageModule
from swift.models.encoder import SwinBlock, SwinEncoder
from swift.models.layers import Residual, token_grid
from swift.models.map_heads import build_map_head
from swift.models.masking import hidden_count
from swift.models.pooling import brain_tokens
from swift.models.token_sets import sets_of
from swift.models.visible import CellDecoder, VisibleAutoencoder
from swift.models.visible_frames import FrameAutoencoder, FrameDecoder, FrameUnits
from swift.models.window_layout import plan_groups
from swift.plan.map_head import HeadSizes, head_sizes
from swift.utils.bits import from_text
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
    scattered: bool = False
    """Attention among tokens that have only some places of their grid."""
    window: tuple[int, ...] = ()
    """Attention: tokens x, y, z, t of a full window."""
    shifted: bool = False

    @property
    def is_attention(self) -> bool:
        """Attention, not an MLP."""
        return self.heads > 0

    @property
    def fits_kernel(self) -> bool:
        """Whether a GPU's attention kernel is written for windows of this size."""
        return not self.scattered and max(size for _, size in self.windows) <= KERNEL_SLOTS[-1]

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
    """Where only visible units have tokens: those of all units along x."""
    width: int
    blocks: tuple[Block, ...]
    merged_rows: int
    merging_parameters: int
    places: int
    """Cells of the grid that are tokens: all, or those with brain."""

    @property
    def tokens(self) -> int:
        """M."""
        return self.places * self.grid[3]

    @property
    def share(self) -> float:
        """Part of the grid that is computed."""
        return self.places / math.prod(self.grid[:3])


@dataclass(frozen=True)
class Cells:
    """What task.hidden=drop decodes: hidden cells, or the patches of hidden frames."""

    blocks: tuple[Block, ...]
    """Of the decoder."""
    first: int
    """The stage, counted from 0, whose features come first."""
    rows: int
    """That reach the decoder's head, of all time steps."""
    voxels: int
    """Of a row, in its space and time."""
    predicted: int
    """Voxels of a clip that are predicted."""
    shown: str
    """What the encoder sees."""


@dataclass(frozen=True)
class Geometry:
    """A masked autoencoder, or an encoder with a dense head, and its clip."""

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
    cells: Cells | None = None
    """Of task.hidden=drop."""
    head: HeadSizes | None = None
    """Of a task of brain maps; it stands in for the decoder."""
    hidden: float | None = None
    """Part of the patches that the decoder's head predicts, where those are the hidden ones alone; None: all."""

    @property
    def total_parameters(self) -> int:
        """All of them."""
        return sum(self.parameters.values())

    @property
    def tokens(self) -> int:
        """Patch tokens of a clip that the encoder sees."""
        return self.stages[0].tokens

    @property
    def head_rows(self) -> int:
        """Patch tokens that reach the head of the local decoder; of a random mask, as many as are expected."""
        return self.tokens if self.hidden is None else round(self.tokens * self.hidden)

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
        return math.prod(self.stages[0].grid) * self.patch_voxels


def count(modules: Iterable[nn.Module | nn.Parameter]) -> int:
    """Parameters of modules and single parameters."""
    return sum(
        module.numel() if isinstance(module, nn.Parameter) else sum(p.numel() for p in module.parameters())
        for module in modules
    )


def _branch(
    block: SwinBlock, name: str, grid: tuple[int, ...], clips: int, scattered: bool, frames: Frames | None
) -> Branch:
    """A branch on `clips` grids; scattered: on (N, 1, 1, t) tokens of a larger grid; frames: on some of its frames."""
    branch = block.get_submodule(name)
    assert isinstance(branch, Residual)
    tokens, scaled = clips * math.prod(grid), branch.gamma is not None
    fn = branch.fn
    if isinstance(fn, Mlp):
        assert isinstance(fn.fc1, nn.Linear)
        hidden = fn.fc1.out_features
        return Branch(name, tokens, fn.fc1.in_features, scaled, count([branch]), hidden=hidden)
    assert isinstance(fn, WindowAttention)
    scattered = scattered and fn.window[:3] != (1, 1, 1)
    window = scattered_window(fn.window, grid) if scattered else fn.window_on(grid)
    if frames is not None:
        window = frames.window(window, grid)
    groups = plan_groups(grid, window, fn.shifted)
    windows = tuple((clips * group.windows, group.tokens) for group in groups)
    width, rotary = fn.proj.in_features, fn.rotary is not None
    return Branch(
        name,
        tokens,
        width,
        scaled,
        count([branch]),
        heads=fn.heads,
        rotary=rotary,
        windows=windows,
        scattered=scattered,
        window=window,
        shifted=fn.shifted,
    )


def _blocks(
    modules: Iterable[nn.Module],
    grid: tuple[int, ...],
    clips: int = 1,
    scattered: bool = False,
    frames: Frames | None = None,
) -> tuple[Block, ...]:
    blocks = []
    for block in modules:
        assert isinstance(block, SwinBlock)
        blocks.append(Block(tuple(_branch(block, name, grid, clips, scattered, frames) for name in block.order)))
    return tuple(blocks)


def _stages(encoder: SwinEncoder, units: drop.AnyUnits | None) -> tuple[Stage, ...]:
    shown: Frames | None = None
    whole = encoder.grids
    if isinstance(units, FrameUnits):
        shown = Frames(torch.arange(units.shown, device="cpu")[None], units.frames)
        whole = [(*grid[:3], units.shown) for grid in whole]
        units = None
    inner = -1 if units is None else units.inner
    # For each stage: its grid, how many of them there are in a clip, and whether it is a part of a larger one.
    grids = [(grid, 1, False) for grid in whole]
    if units is not None:
        frames = (units.frames,)
        grids[:inner] = [((*units.tokens(index), *frames), units.shown, False) for index in range(inner)]
        grids[inner] = (units.shown_cells, 1, 1, *frames), 1, True
    stages = []
    for index, (module, (grid, clips, scattered)) in enumerate(zip(encoder.stages, grids)):
        assert isinstance(module, StageModule)
        blocks = _blocks(module.blocks, grid, clips, scattered, shown)
        rows = 0
        if index < len(grids) - 1:
            rows = math.prod(whole[index + 1]) if index >= inner else clips * math.prod(grid) // 8
        together = (clips * grid[0], *grid[1:])
        stages.append(
            Stage(together, blocks[0].width, blocks, rows, count([module.downsample]), math.prod(together[:3]))
        )
    return tuple(stages)


RADII = (0.77, 0.93, 0.75)
"""Of an ellipsoid in a box that reaches from -1 to 1. At 96x96x96 voxels and a patch of 6 it is in 37, 48 and 88 % of
the cells of stages 1 to 3, as three measured brains are (34-36, 47-49 and 86-89 %)."""


def usual_brain(grid: tuple[int, ...]) -> Tensor:
    """An ellipsoid about as large in the box as a brain: bool (1, X, Y, Z)."""
    axes = [((torch.arange(n, device="cpu") + 0.5) / n * 2 - 1) / radius for n, radius in zip(grid, RADII)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    found: Tensor = (x.square() + y.square() + z.square() <= 1)[None]
    return found


def on_brain(geometry: Geometry, present: Tensor) -> Geometry:
    """The sizes of tokens=brain for one clip.

    Args:
        geometry: Of the whole box.
        present: bool (1, x, y, z), which patches have a brain voxel, on the CPU.
    """
    sets = sets_of(present.numpy(), len(geometry.stages), present.device)
    stages = []
    for index, (stage, where) in enumerate(zip(geometry.stages, sets)):
        frames = stage.grid[3]
        blocks = []
        for block in stage.blocks:
            branches = [replace(branch, tokens=len(where) * frames) for branch in block.branches]
            blocks.append(
                Block(
                    tuple(
                        replace(branch, windows=where.window_sizes(branch.window, branch.shifted, frames))
                        if branch.is_attention
                        else branch
                        for branch in branches
                    )
                )
            )
        rows = len(sets[index + 1]) * frames if stage.merged_rows else 0
        stages.append(replace(stage, blocks=tuple(blocks), merged_rows=rows, places=len(where)))
    return replace(geometry, stages=tuple(stages))


DECODERS: dict[type[nn.Module], str] = {
    LocalDecoder: "local",
    LinearDecoder: "linear",
    CellDecoder: "cells",
    FrameDecoder: "frames",
}


def build_geometry(
    cfg: ModelConfig,
    volume: tuple[int, ...],
    units: drop.AnyUnits | None = None,
    brain: Tensor | None = None,
    hidden: float | None = None,
) -> Geometry:
    """Sizes of the model of `cfg` for clips of `volume` = voxels x, y, z and frames. Allocates no weights.

    Args:
        cfg: Of the model.
        volume: Of a clip.
        units: Of task.hidden=drop (`swift.models.drop.cut`).
        brain: Of a clip with tokens=brain, bool (1, X, Y, Z); None: `usual_brain`; with data.brain=cohort that
            of the cohort.
        hidden: Part of the patches that training predicts, where it predicts the hidden ones alone (`hidden_part`).

    Raises:
        UserError: the architecture does not fit the volume.
    """
    model: MaskedAutoencoder | drop.AnyDrop
    try:
        with torch.device("meta"):
            model = MaskedAutoencoder(cfg, volume[:3], volume[3]) if units is None else drop.build(cfg, units)
    except ValueError as error:
        raise UserError(str(error)) from error
    encoder = model.encoder
    linear = model.linear if isinstance(model, MaskedAutoencoder) else None
    cells = None
    if isinstance(model, VisibleAutoencoder):
        cut, cell = model.units, math.prod(model.units.cell)
        blocks = _blocks(model.decoder.blocks, (*cut.cells, cut.frames))
        rows, predicted = cut.hidden_cells * cut.frames, cut.hidden_cells * cell * volume[3]
        cells = Cells(blocks, cut.inner, rows, cell * cut.patch[3], predicted, "units")
    elif isinstance(model, FrameAutoencoder):
        grid, patch = model.encoder.grids[0], math.prod(cfg.patch_size)
        hidden_steps = grid[3] - model.units.shown
        rows = math.prod(grid[:3]) * hidden_steps
        predicted = math.prod(volume[:3]) * hidden_steps * cfg.patch_size[3]
        cells = Cells(_blocks(model.decoder.blocks, grid), 0, rows, patch, predicted, "frames")
    token = [model.mask_token] if isinstance(model, MaskedAutoencoder) else []
    parameters = {
        "patch embedding": count([encoder.patch_embed]),
        "mask token, positions": count([*token, encoder.position])
        + sum(count([stage.get_submodule("position")]) for stage in encoder.stages),
    }
    stages = _stages(encoder, units)
    for index, stage in enumerate(stages, start=1):
        parameters[f"stage {index}"] = sum(block.parameters for block in stage.blocks)
        if stage.merging_parameters:
            parameters[f"merging {index}"] = stage.merging_parameters
    parameters["final norm"] = count([encoder.norm])
    parameters["decoder"] = count([model.decoder])
    if linear is not None:
        parameters["maps"] = count([linear])
    assert sum(parameters.values()) == count([model]), "a part of the model is missing here"
    found = Geometry(
        volume=tuple(volume),
        patch=tuple(cfg.patch_size),
        patch_norm=cfg.patch_norm,
        stages=stages,
        final_norm=cfg.final_norm,
        decoder=DECODERS[type(model.decoder)],
        decoder_dim=cfg.decoder_dim,
        maps=cfg.maps,
        maps_trained=linear is not None and linear.shared,
        parameters=parameters,
        sizes=tuple(sorted((parameter.numel() for parameter in model.parameters()), reverse=True)),
        cells=cells,
        hidden=hidden,
    )
    if cfg.tokens == "box" or units is not None:
        return found
    if cfg.cohort is not None:
        return on_brain(found, torch.from_numpy(from_text(cfg.cohort))[None])
    return on_brain(found, brain_tokens(usual_brain(volume[:3]) if brain is None else brain, found.patch, 0))


def hidden_part(cfg: ModelConfig, task: TaskConfig, volume: Sequence[int]) -> float | None:
    """Part of the patches that pre-training predicts: the hidden ones, as `MaskedAutoencoder.hidden_rows` has it.

    None: all of them. The mask does not look at the brain, so that its part there is that of the grid, on average.
    """
    if task.target is not None or task.hidden == "drop":
        return None
    if cfg.tokens == "box" or cfg.decoder != "local" or cfg.maps:
        return None
    units = token_grid(volume, mask_unit(task, cfg))
    drawn = math.prod({"random": units, "tube": units[:3]}.get(task.mask_kind, units[3:]))
    return hidden_count(task.mask_ratio, drawn) / drawn


def with_map_head(geometry: Geometry, cfg: ModelConfig, task: TaskConfig) -> Geometry:
    """The same encoder with the dense head of a task, and with spatial maps where the head reads their courses.

    Raises:
        UserError: cells that do not fit the patches.
    """
    volume = geometry.volume
    try:
        with torch.device("meta"):
            encoder, head = SwinEncoder(cfg, volume[:3], volume[3]), build_map_head(cfg, task, volume[:3], volume[3])
    except ValueError as error:
        raise UserError(str(error)) from error
    found = head_sizes(head, volume[3])
    kept = {name: size for name, size in geometry.parameters.items() if name not in ("decoder", "maps")}
    # The mask token is pre-training's.
    kept["mask token, positions"] -= cfg.embed_dim
    kept["head"] = found.parameters
    sizes = [parameter.numel() for module in (encoder, head) for parameter in module.parameters()]
    if task.courses:
        kept["maps"] = geometry.parameters["maps"]
        sizes += [cfg.maps * math.prod(volume[:3]), 1]
    return replace(
        geometry,
        head=found,
        parameters=kept,
        sizes=tuple(sorted(sizes, reverse=True)),
        maps=cfg.maps if task.courses else 0,
        maps_trained=geometry.maps_trained and task.courses,
    )


def geometry_of(cfg: Config) -> Geometry:
    """Sizes of what a run trains, in pre-training with its decoder; of a task of brain maps with its head.

    Raises:
        UserError: the architecture does not fit the clip.
    """
    volume = (*cfg.data.grid, cfg.data.frames)
    units, hidden = drop.cut(cfg.model, cfg.task, volume), hidden_part(cfg.model, cfg.task, volume)
    found = build_geometry(cfg.model, volume, units, hidden=hidden)
    if cfg.task.target is None or cfg.task.target.kind != "map":
        return found
    return with_map_head(found, cfg.model, cfg.task)

"""muP, the maximal update parametrization: how each parameter changes with the width, by name.

After Yang et al. 2022 (Tensor Programs V, arXiv:2203.03466), the form of its table 3 for Adam. With m = width / base
width, relative to the base model:

| parameter                                               | initial values | learning rate |
|---------------------------------------------------------|----------------|---------------|
| hidden matrix: the width in and out                     | m^-1/2         | 1/m           |
| output matrix: the width in, a fixed number out         | 1/m            | 1/m           |
| input matrix, bias, norm, LayerScale, table, mask token | 1              | 1             |
| nothing of the width (head of the local decoder)        | 1              | 1             |

A gradient of a hidden or input matrix or of a vector falls like 1/m, as output matrices do, and Adam's eps with it
(`OptimizerConfig.eps_scaled`; Everett et al. 2024, arXiv:2407.05872): else eps stops the widest models.

Attention scores are divided by head_dim instead of its root (`ModelConfig.attention_base_width`). Nothing else of the
forward pass changes: the package's `MuReadout` divides the input of an output matrix by m, keeps its values and
its rate; the same function of time under Adam, but then weights could not be used without knowing m.

The local decoder has the same width at every embed_dim, so that its laterals are the output matrices. A matrix of the
twin is a weight of a `nn.Linear`: by shape alone a position table (T, C) looks like an output matrix.

Shapes come from twins on the meta device and are kept by name, so that they outlive whatever an engine, deepcopy or
torch.load does to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from mup.infshape import InfShape
from mup.shape import apply_infshapes, get_shapes, make_base_shapes, zip_infshapes
from torch import nn

from swift.config.schema import ModelConfig
from swift.utils.errors import UserError

# What torch.compile, DDP and FSDP, and activation checkpointing put into the names of parameters.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

Builder = Callable[[ModelConfig], nn.Module]
"""Makes the whole model (encoder, decoder, heads) of an architecture."""


@dataclass(frozen=True)
class Scale:
    """How a parameter differs from the same one of the base model.

    Attributes:
        kind: input | hidden | output: matrices | vector: anything else of the width | finite: nothing of the width.
        shape: Each dimension with its size in the base model (None: it does not grow).
    """

    kind: str
    shape: InfShape

    @property
    def mult(self) -> float:
        """Width into the matrix over that of the base model; 1 for everything without a width into it."""
        return self.shape[1].width_mult() if self.kind in ("hidden", "output") else 1.0

    @property
    def init(self) -> float:
        """Factor on the initial values."""
        return self.mult**-0.5 if self.kind == "hidden" else 1 / self.mult

    @property
    def lr(self) -> float:
        """Factor on the learning rate."""
        return 1 / self.mult

    @property
    def decay(self) -> float:
        """Factor on the weight decay: rate times decay, what AdamW takes off a weight a step, is that of the base."""
        return self.mult

    @property
    def eps(self) -> float:
        """Factor on Adam's eps: gradients of everything that grows are 1/m of the base model's, but for outputs."""
        grows = self.kind in ("input", "hidden", "vector")
        return 1 / max(dimension.width_mult() for dimension in self.shape if dimension.isinf()) if grows else 1.0


Table = dict[str, Scale]
"""Name of a parameter -> its scale."""


def matrices(model: nn.Module) -> set[str]:
    """Names of the weights of linear maps.

    By type and not by dimensions: an engine that shards leaves parameters of another shape, and a table is no matrix.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {f"{name}.weight".removeprefix(".") for name in linear}


def _kind(shape: InfShape, matrix: bool) -> str:
    if not shape.ninf():
        return "finite"
    if not matrix:
        assert shape.ninf() == 1, f"a table that grows along several axes: {shape}"
        return "vector"
    fan_in, fan_out = shape.fanin_fanout()
    if not fan_in.isinf():
        return "input"
    return "hidden" if fan_out.isinf() else "output"


def width_table(build: Builder, cfg: ModelConfig, base_width: int) -> Table:
    """The scale of every parameter, from three twins on the meta device that hold no memory.

    Args:
        build: makes the model of an architecture; the names are those of its parameters.
        cfg: the architecture at hand.
        base_width: embed_dim of the base model, in which everything else is as in `cfg`.
    """

    def twin(width: int) -> nn.Module:
        with torch.device("meta"):
            return build(replace(cfg, embed_dim=width))

    target = twin(cfg.embed_dim)
    # The wider twin only shows which dimensions grow: at the base width the other two are equal.
    base = make_base_shapes(get_shapes(twin(base_width)), get_shapes(twin(2 * base_width)))
    shapes = zip_infshapes(base, get_shapes(target))
    linear = matrices(target)
    return {name: Scale(_kind(shape, name in linear), shape) for name, shape in shapes.items()}


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (torch.compile, FSDP, activation checkpointing) put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def attach(model: nn.Module, table: Table) -> None:
    """Hang the shapes on the parameters, where functions of the `mup` package look for them.

    swift itself never looks there: deepcopy, torch.load and sharding drop them.
    """
    apply_infshapes(model, {name: table[plain_name(name)].shape for name, _ in model.named_parameters()})


def record(table: Table) -> dict[str, list[int | None]]:
    """Base shapes for a checkpoint: plain lists, as in the files of the `mup` package."""
    return {name: scale.shape.base_shape() for name, scale in table.items()}


def check_record(found: Any, table: Table) -> None:
    """Make sure that a checkpoint was trained with these base shapes.

    Args:
        found: the checkpoint's record, None if it has none.
        table: of the model that is to go on.

    Raises:
        UserError: no record, or other base shapes (the first five that differ are named).
    """
    if not isinstance(found, Mapping):
        raise UserError(
            "the checkpoint has no record of muP base shapes, so its weights were trained without muP: "
            "go on with the optimizer it was made with (optimizer=adamw), or start anew with optimizer=adamw_mup"
        )
    wanted = record(table)
    different = [name for name in {**wanted, **found} if list(found.get(name) or []) != wanted.get(name)]
    if different:
        some = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} here" for name in different[:5])
        raise UserError(
            f"the checkpoint was trained with other muP base shapes ({len(different)} differ: {some}): "
            "use its model and optimizer.base_width"
        )

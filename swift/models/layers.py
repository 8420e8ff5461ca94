"""Small parts of the encoder: patch embedding, patch merging, position tables, residual branches.

Shapes: B batch, X Y Z T voxels and frames or their token grid, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from swift.models import packed
from swift.models.cells import Cells, Frames, Seen
from swift.models.init import NORMAL, Init
from swift.models.pieces import joined, rows_at_once
from swift.models.token_sets import TokenSet


def tokens_along(length: int, patch: int) -> int:
    """Patches that cover `length` voxels or frames, the last one padded."""
    return -(-length // patch)


def token_grid(volume: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Token grid of a volume of x, y, z voxels and t frames."""
    return tuple(tokens_along(n, p) for n, p in zip(volume, patch, strict=True))


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, X, Y, Z, T) voxels -> (B, x, y, z, t, px*py*pz*pt*C) patches, padded at the end with 0.

    Voxels of a patch are ordered x, y, z, t, channel, as in SwiFT v1.
    """
    pads = [-n % p for n, p in zip(x.shape[2:], patch, strict=True)]
    if any(pads):
        x = F.pad(x, [value for pad in reversed(pads) for value in (0, pad)])
    px, py, pz, pt = patch
    pattern = "b c (x px) (y py) (z pz) (t pt) -> b x y z t (px py pz pt c)"
    return rearrange(x, pattern, px=px, py=py, pz=pz, pt=pt)


def unpatchify(patches: Tensor, patch: Sequence[int], volume: Sequence[int]) -> Tensor:
    """(B, x, y, z, t, px*py*pz*pt) -> (B, 1, X, Y, Z, T), the padding of `patchify` cut off."""
    px, py, pz, pt = patch
    pattern = "b x y z t (px py pz pt) -> b 1 (x px) (y py) (z pz) (t pt)"
    x = rearrange(patches, pattern, px=px, py=py, pz=pz, pt=pt)
    nx, ny, nz, nt = volume
    return x[:, :, :nx, :ny, :nz, :nt]


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping 4D patches."""

    def __init__(self, patch: Sequence[int], in_channels: int, dim: int, norm: bool):
        super().__init__()
        self.patch = tuple(patch)
        self.proj = nn.Linear(in_channels * patch[0] * patch[1] * patch[2] * patch[3], dim)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor, where: TokenSet | None = None) -> Tensor:
        """(B, C_in, X, Y, Z, T) voxels -> (B, x, y, z, t, C) tokens, or of the places of a TokenSet (P, t, C)."""
        if where is not None:
            return self._tokens(packed.patches(x, self.patch, where))
        x_patches, *others = token_grid(x.shape[2:], self.patch)
        layer = len(x) * math.prod(others)
        layers = max(1, rows_at_once(x, x_patches * layer, self.proj.in_features) // layer)
        parts = [x] if layers == x_patches else x.split(layers * self.patch[0], dim=2)
        return joined([self._tokens(patchify(part, self.patch)) for part in parts], dim=1)

    def _tokens(self, patches: Tensor) -> Tensor:
        # Voxels come in float32, the weights may be narrower; autocast does as it likes.
        return self.norm(self.proj(patches.to(self.proj.weight.dtype)))


class PatchMerging(nn.Module):
    """Merge 2x2x2 tokens in space, never in time: concatenate 8C, LayerNorm, project to 2C."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, where: TokenSet | None = None) -> Tensor:
        """(B, X, Y, Z, T, C) -> (B, ceil(X/2), ceil(Y/2), ceil(Z/2), T, 2C); a missing neighbour counts as zeros.

        Of the places of a TokenSet (P, T, C) -> (P', T, 2C) of those of the next stage.
        """
        if where is not None:
            return self.reduction(self.norm(packed.eight_neighbours(x, where)))
        pads = [n % 2 for n in x.shape[1:4]]
        if any(pads):
            x = F.pad(x, (0, 0, 0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
        x = rearrange(x, "b (x i) (y j) (z k) t c -> b x y z t (i j k c)", i=2, j=2, k=2)
        return self.reduction(self.norm(x))


def _of_times(table: Tensor, x: Tensor, times: Tensor | None) -> Tensor:
    """Entries (T, C) of a table for the first T time steps of x (..., T, C); of `times` (B, T): (B, 1, 1, 1, T, C)."""
    return table[: x.shape[-2]] if times is None else table[times][:, None, None, None]


class AbsolutePosition(nn.Module):
    """Learned tables of SwiFT v1: one over space, one over time, summed."""

    def __init__(self, grid: Sequence[int], dim: int):
        super().__init__()
        self.space = nn.Parameter(torch.zeros(*grid[:3], dim))
        self.time = nn.Parameter(torch.zeros(grid[3], dim))

    def own_initial_values(self) -> dict[str, Init]:
        """How the tables begin."""
        return {"space": NORMAL, "time": NORMAL}

    def forward(self, x: Tensor, at: Callable[[Tensor], Tensor] | None = None, times: Tensor | None = None) -> Tensor:
        """Add to (B, X, Y, Z, T, C); a clip may have fewer frames than the table.

        Args:
            x: Tokens.
            at: Takes the entries of the tokens that x has, (X, Y, Z, C) -> the shape of x without T; None: it has all.
            times: int64 (B, T), the time step of each token; None: the first T.
        """
        fits = x.shape[-2] <= self.time.shape[0] and (at is not None or x.shape[1:4] == self.space.shape[:3])
        if not fits:
            raise ValueError(
                f"tokens of {tuple(x.shape[1:-1])} do not fit the learned positions of "
                f"{(*self.space.shape[:3], self.time.shape[0])}: model.position=rope has no tables"
            )
        if at is not None:
            return x + at(self.space).unsqueeze(-2) + self.time[: x.shape[-2]]
        return (x + self.space.unsqueeze(3)).add_(_of_times(self.time, x, times))


class AxialPosition(nn.Module):
    """Global place of a token as the sum of four learned tables, one an axis."""

    def __init__(self, grid: Sequence[int], dim: int):
        super().__init__()
        for axis, length in zip("xyzt", grid, strict=True):
            self.register_parameter(axis, nn.Parameter(torch.zeros(length, dim)))

    def own_initial_values(self) -> dict[str, Init]:
        """How the tables begin."""
        return dict.fromkeys("xyzt", NORMAL)

    def forward(self, x: Tensor, at: Callable[[Tensor], Tensor] | None = None, times: Tensor | None = None) -> Tensor:
        """Add to (B, X, Y, Z, T, C); each axis may be shorter than its table. Others as of `AbsolutePosition`."""
        tables = [getattr(self, axis) for axis in "xyzt"]
        lengths = x.shape[1:5] if at is None else [0, 0, 0, x.shape[-2]]  # `at` looks at the grid itself
        for axis, length, table in zip("xyzt", lengths, tables):
            if length > table.shape[0]:
                raise ValueError(f"{length} tokens along {axis}, but the position table has {table.shape[0]}")
        if at is not None:
            space = tables[0][:, None, None] + tables[1][:, None] + tables[2]
            return x + at(space).unsqueeze(-2) + tables[3][: x.shape[-2]]
        tx, ty, tz = (table[:length] for table, length in zip(tables, x.shape[1:4]))
        return x + (tx[:, None, None, None] + ty[:, None, None] + tz[:, None] + _of_times(tables[3], x, times))


class _AddScaled(torch.autograd.Function):
    """x + y * gamma. The gradients of torch.addcmul are the same to the last bit, but pass over y once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(y, gamma)
        return torch.addcmul(x, y, gamma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (y, gamma) = grads[0], ctx.saved_tensors
        of_y = grad * gamma if ctx.needs_input_grad[1] else None
        of_gamma = (grad * y).sum_to_size(gamma.shape) if ctx.needs_input_grad[2] else None
        return grad, of_y, of_gamma


class Residual(nn.Module):
    """Pre-norm branch x + gamma * drop_path(fn(norm(x))), gamma an optional LayerScale (Touvron et al. 2021)."""

    def __init__(self, dim: int, fn: nn.Module, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn
        self.layer_scale = layer_scale
        self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.hidden = int(fn.fc1.out_features) if isinstance(fn, Mlp) else 0  # type: ignore[arg-type]
        self.draws = drop_path > 0 or any(isinstance(part, nn.Dropout) and part.p > 0 for part in fn.modules())

    def own_initial_values(self) -> dict[str, Init]:
        """How LayerScale begins."""
        return {} if self.layer_scale is None else {"gamma": Init(False, float(self.layer_scale))}

    def forward(self, x: Tensor, where: Cells | Frames | Seen | TokenSet | None = None) -> Tensor:
        """(B, X, Y, Z, T, C), or (P, T, C) of a TokenSet -> the same; `where`: as of `WindowAttention`."""
        # A token's MLP knows nothing of other tokens. Random numbers are drawn for all at once.
        tokens = x.shape[:-1].numel()
        rows = rows_at_once(x, tokens, self.hidden) if self.hidden and not (self.training and self.draws) else tokens
        if rows == tokens:
            return self._branch(x, where)
        return joined([self._branch(part, None) for part in x.flatten(0, -2).split(rows)]).view(x.shape)

    def _branch(self, x: Tensor, where: Cells | Frames | Seen | TokenSet | None) -> Tensor:
        y = self.norm(x)
        y = self.fn(y) if where is None or isinstance(self.fn, Mlp) else self.fn(y, where)
        y = packed.drop_clips(self.drop_path, y, where) if isinstance(where, TokenSet) else self.drop_path(y)
        return x + y if self.gamma is None else _AddScaled.apply(x, y, self.gamma)

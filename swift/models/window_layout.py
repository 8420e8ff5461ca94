"""Splitting a 4D token grid into attention windows without masks.

A shifted or ragged window layout is a set of rectangular groups. Along one axis of L tokens, windows of w tokens and a
shift s cut at 0, s, s+w, s+2w, ..., L: full windows in the middle and smaller ones at the ends. This equals the
roll-and-mask of Swin (Liu et al. 2021, section 3.2) with wrapped and padding tokens masked out, but computes no score
that is thrown away and needs no mask. Equal-sized windows of an axis form a `Run`; the product of the runs of the four
axes gives the groups, each of which is plain attention over windows of one shape.

Shapes: B batch, X Y Z T token grid, C channels, M = B*X*Y*Z*T tokens, W windows of a group, N tokens of a window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swift.models.pieces import cut


class Run(NamedTuple):
    """`windows` windows of `size` tokens along one axis; window k starts at `start + k * step`."""

    start: int
    step: int
    windows: int
    size: int


class Group(NamedTuple):
    """Windows of one shape: a run for each of the axes x, y, z, t."""

    runs: tuple[Run, ...]

    @property
    def windows(self) -> int:
        """Windows of this group in one sample."""
        return math.prod(run.windows for run in self.runs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens of a window along x, y, z, t."""
        return tuple(run.size for run in self.runs)

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return math.prod(self.shape)


def axis_runs(length: int, window: int, shift: int) -> list[Run]:
    """Runs of equal windows that tile an axis of `length` tokens; no longer than the window, it is a single one."""
    if length <= window:
        return [Run(0, length, 1, length)]
    cuts = [0, *range(shift or window, length, window), length]
    windows = list(zip(cuts, (b - a for a, b in itertools.pairwise(cuts))))
    runs = []
    for size in sorted({size for _, size in windows}, reverse=True):
        starts = [start for start, s in windows if s == size]
        # Equal windows are evenly spaced: the full ones by `window`, the two halves at the ends by the rest.
        step = starts[1] - starts[0] if len(starts) > 1 else size
        assert starts == [starts[0] + k * step for k in range(len(starts))]
        runs.append(Run(starts[0], step, len(starts), size))
    return runs


@lru_cache(maxsize=1024)
def plan_groups(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> tuple[Group, ...]:
    """The groups that tile a grid of x, y, z, t tokens; `shifted` by half a window on each axis longer than it."""
    axes = [axis_runs(n, w, w // 2 if shifted else 0) for n, w in zip(grid, window, strict=True)]
    groups = tuple(Group(runs) for runs in itertools.product(*axes))
    assert sum(group.windows * group.tokens for group in groups) == math.prod(grid)
    return groups


def _is_identity(groups: tuple[Group, ...]) -> bool:
    """Whether windows already lie one after the other in memory: nothing is cut outside an axis with several tokens."""
    runs = groups[0].runs
    pairs = itertools.combinations(runs, 2)
    return len(groups) == 1 and all(outer.size == 1 or inner.windows == 1 for outer, inner in pairs)


def _group_view(x: Tensor, group: Group) -> Tensor:
    """View of a grid (B, X, Y, Z, T, C) as (B, x, y, z, t windows, x, y, z, t tokens, C)."""
    # Not narrow and unfold, which say the same: torch.compile fills what lies between two windows with zeros when it
    # writes into such a view.
    runs, (batch, *axes, channel) = group.runs, x.stride()
    size = (x.shape[0], *(run.windows for run in runs), *group.shape, x.shape[5])
    stride = (batch, *(run.step * axis for run, axis in zip(runs, axes)), *axes, channel)
    return x.as_strided(size, stride, x.storage_offset() + sum(run.start * axis for run, axis in zip(runs, axes)))


def _to_windows(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """(B, X, Y, Z, T, C) -> (M, C), the groups one after the other, window-major inside."""
    out = x.new_empty(x.shape[:5].numel(), x.shape[5])
    start = 0
    for group in groups:
        view = _group_view(x, group)
        stop = start + view.shape[:9].numel()
        out[start:stop].view(view.shape).copy_(view)
        start = stop
    return out


def _to_grid(x: Tensor, groups: tuple[Group, ...], shape: torch.Size) -> Tensor:
    """The inverse of `_to_windows`."""
    x = x.contiguous()
    out = x.new_empty(shape)
    start = 0
    for group in groups:
        view = _group_view(out, group)
        stop = start + view.shape[:9].numel()
        view.copy_(x[start:stop].view(view.shape))
        start = stop
    return out


class _Partition(torch.autograd.Function):
    """Reordering is a permutation, so its gradient is the inverse reordering: one copy, no scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[Group, ...]) -> Tensor:
        ctx.groups, ctx.shape = groups, x.shape
        return _to_windows(x, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_grid(grads[0], ctx.groups, ctx.shape), None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[Group, ...], shape: torch.Size) -> Tensor:
        ctx.groups = groups
        return _to_grid(x, groups, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _to_windows(grads[0], ctx.groups), None, None


def partition(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Reorder a grid (B, X, Y, Z, T, C) to window-major tokens (M, C), group after group.

    A group with W windows of N tokens (in one sample) has B * W * N rows.
    """
    if _is_identity(groups):
        return x.reshape(-1, x.shape[5])
    return _Partition.apply(x, groups)


def merge(x: Tensor, groups: tuple[Group, ...], shape: torch.Size) -> Tensor:
    """The inverse of `partition`: (M, C) -> `shape` = (B, X, Y, Z, T, C)."""
    if _is_identity(groups):
        return x.reshape(shape)
    return _Merge.apply(x, groups, shape)


@lru_cache(maxsize=1024)
def whole_windows(groups: tuple[Group, ...], batch: int, rows: int) -> tuple[tuple[tuple[Group, int], ...], ...]:
    """Cut window-major tokens into pieces of whole windows, `rows` tokens or fewer each, but one window at least.

    Returns:
        For each piece: the groups it has windows of, in order, and how many.
    """
    pieces: list[tuple[tuple[Group, int], ...]] = []
    piece: list[tuple[Group, int]] = []
    left = rows
    for group in groups:
        windows = batch * group.windows
        while windows:
            take = min(windows, max(left, 0) // group.tokens)
            if not take and piece:
                pieces.append(tuple(piece))
                piece, left = [], rows
                continue
            take = max(take, 1)
            piece.append((group, take))
            windows, left = windows - take, left - take * group.tokens
    return (*pieces, tuple(piece))


def tokens_of(piece: Sequence[tuple[Group, int]]) -> int:
    """Tokens of a piece of `whole_windows`."""
    return sum(windows * group.tokens for group, windows in piece)


def slabs(x: Tensor, piece: Sequence[tuple[Group, int]]) -> list[Tensor]:
    """Cut the tokens (M, D) of a piece of `whole_windows` into one (W, N, D) tensor a group."""
    parts = cut(x, [windows * group.tokens for group, windows in piece])
    return [part.view(-1, group.tokens, x.shape[1]) for part, (group, _) in zip(parts, piece)]


def largest_window(grid: tuple[int, ...], window: tuple[int, ...]) -> int:
    """Tokens of the largest window of a grid."""
    # A list: torch.compile has no code for the product of a generator.
    return math.prod([min(w, n) for w, n in zip(window, grid, strict=True)])


class Tiles(NamedTuple):
    """The windows of one sample, packed whole into tiles of equally many slots; int32 (tiles, slots) each."""

    token: Tensor
    """Which token of the grid (in its order x, y, z, t) a slot holds; -1: none."""
    place: Tensor
    """Its place in the table of positions, in the same order; 0 where there is no token."""
    segment: Tensor
    """Which window of its tile it belongs to; -1: none. Only tokens of one window see each other."""
    slot: Tensor
    """(tokens,), in which slot of all tiles a token lies."""
    alone: bool
    """Every tile is one window and full."""


def _window_tokens(group: Group, grid: tuple[int, ...], largest: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (windows, tokens) of the windows of a group, and the places (tokens,) of a window's tokens."""
    starts = [run.start + run.step * np.arange(run.windows) for run in group.runs]
    inside = [np.arange(run.size) for run in group.runs]
    first = np.stack([axis.ravel() for axis in np.meshgrid(*starts, indexing="ij")], axis=1)
    offset = np.stack([axis.ravel() for axis in np.meshgrid(*inside, indexing="ij")], axis=1)
    tokens = np.ravel_multi_index(tuple((first[:, None] + offset).transpose(2, 0, 1)), grid)
    return tokens, np.ravel_multi_index(tuple(offset.T), largest)


@lru_cache(maxsize=256)
def pack(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    shifted: bool,
    largest: tuple[int, ...],
    slots: int,
    device: torch.device,
) -> Tiles:
    """Pack the windows of a grid of x, y, z, t tokens into tiles: the largest that still fits comes next.

    Args:
        grid: tokens of a sample.
        window: tokens of a window along x, y, z, t.
        shifted: by half a window on each axis longer than it.
        largest: tokens x, y, z, t of the table of positions.
        slots: of a tile; no fewer than the tokens of a window.
        device: where the tables go.
    """
    groups = sorted(plan_groups(grid, window, shifted), key=lambda group: -group.tokens)
    waiting = [(*_window_tokens(group, grid, largest), 0) for group in groups]
    tiles: list[tuple[np.ndarray, ...]] = []
    while waiting:
        token, place, segment = (np.full(slots, fill, np.int32) for fill in (-1, 0, -1))
        used = windows = 0
        for index, (tokens, places, done) in enumerate(waiting):
            take = min((slots - used) // len(places), len(tokens) - done)
            end = used + take * len(places)
            token[used:end] = tokens[done : done + take].ravel()
            place[used:end] = np.tile(places, take)
            segment[used:end] = windows + np.repeat(np.arange(take), len(places))
            waiting[index] = (tokens, places, done + take)
            used, windows = end, windows + take
        assert windows, f"a window of {waiting[0][1].size} tokens in a tile of {slots}"
        waiting = [entry for entry in waiting if entry[2] < len(entry[0])]
        tiles.append((token, place, segment))
    token, place, segment = (np.stack(part) for part in zip(*tiles))
    slot = np.empty(math.prod(grid), np.int32)
    slot[token[token >= 0]] = np.flatnonzero(token >= 0)
    alone = slots == groups[-1].tokens
    tables = [torch.from_numpy(part).to(device) for part in (token, place, segment, slot)]
    return Tiles(tables[0], tables[1], tables[2], tables[3], alone)

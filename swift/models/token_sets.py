"""Which tokens of a batch exist with model.tokens=brain, and in which order its attention windows take them.

A place is a cell of a stage's grid in one clip; it exists if its cell has a brain voxel, in all frames. The places of a
batch lie one after the other, clip by clip, each in the order x, y, z; features are (P, T, C). Windows are those of the
grid: what does not exist is missing in them, so they differ in length. Plain data, made with numpy once for each set of
masks and kept.

Shapes: B batch, x y z grid of a stage, P places of a batch, T time steps, W windows, M = P * T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from swift.models.pooling import brain_tokens
from swift.models.window_layout import Run, axis_runs

KEPT = 32
"""Batches whose sets are kept: a validation and the clips of one scan come again, a random batch does not."""


class Windows:
    """Windows of one number of slots in space and one of frames.

    Attributes:
        count: W, in space.
        slots: Places of a window, those that do not exist included.
        run: Its windows along time.
        cells: int64 (W, slots), place of a slot in the table of positions (x, y, z); None: all at the first.
        seen: bool (W, slots), which slots exist; None: all.
    """

    def __init__(self, count: int, slots: int, run: Run, cells: Tensor | None, seen: Tensor | None) -> None:
        self.count, self.slots, self.run, self.cells, self.seen = count, slots, run, cells, seen

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Windows in space, windows in time, slots in space, frames."""
        return self.count, self.run.windows, self.slots, self.run.size

    @property
    def rows(self) -> int:
        """Slots of all windows and frames."""
        return math.prod(self.shape)


class Layout:
    """The order in which an attention takes the tokens of a batch.

    Attributes:
        windows: Windows of one length after the other.
        order: int64 (slots of all windows,), the token of a slot; an empty slot repeats token 0.
        slot: int64 (M,), the slot of a token.
        same: Tokens lie in this order already.
    """

    def __init__(self, windows: list[Windows], order: Tensor, slot: Tensor) -> None:
        self.windows, self.order, self.slot = windows, order, slot
        self.same = len(order) == len(slot) and torch.equal(order.cpu(), torch.arange(len(slot)))


def _along(length: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of an axis: the number of its window, and its place in it."""
    label, place = np.zeros(length, np.int64), np.zeros(length, np.int64)
    starts = sorted(
        (run.start + k * run.step, run.size) for run in axis_runs(length, window, shift) for k in range(run.windows)
    )
    for number, (start, size) in enumerate(starts):
        label[start : start + size], place[start : start + size] = number, np.arange(size)
    return label, place


class TokenSet:
    """The places of a batch at one stage.

    Attributes:
        batch: B.
        grid: x, y, z.
        clip: int64 (P,), the clip of a place.
        cell: int64 (P,), its place in the grid.
        xyz: int64 (3, P).
        parent: int64 (P,), the place of the next stage that it merges into; None at the last stage.
        eighth: int64 (P,), which of the eight neighbours there it is.
        parents: Places of the next stage.
    """

    def __init__(self, present: np.ndarray, device: torch.device) -> None:
        self.batch, self.grid = len(present), present.shape[1:]
        self.device = device
        clip, *xyz = np.nonzero(present)
        self._clip, self._xyz = clip, np.stack(xyz)
        self.clip, self.xyz = self._tensor(clip), self._tensor(self._xyz)
        self.cell = self._tensor(np.ravel_multi_index(tuple(xyz), self.grid))
        self.parent: Tensor | None = None
        self.eighth: Tensor | None = None
        self.parents = 0
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._lengths: dict[tuple[object, ...], tuple[tuple[int, int], ...]] = {}

    def _tensor(self, values: np.ndarray) -> Tensor:
        # Sets are kept: tables made in inference mode (a validation) could not be used in training.
        with torch.inference_mode(False):
            return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def __len__(self) -> int:
        return len(self._clip)

    @property
    def cells(self) -> int:
        """Cells of the grid."""
        return math.prod(self.grid)

    @property
    def place(self) -> Tensor:
        """int64 (P,), where a place lies in (B, x, y, z)."""
        return self.clip * self.cells + self.cell

    def take(self, table: Tensor) -> Tensor:
        """A position table (x, y, z, C) -> the entries of the places (P, C).

        Raises:
            ValueError: the table is smaller than the grid.
        """
        x, y, z = self.grid
        if any(size < n for size, n in zip(table.shape, self.grid)):
            raise ValueError(
                f"token grid {self.grid} does not fit the learned positions of {tuple(table.shape[:3])}: "
                "model.position=rope has no tables"
            )
        return table[:x, :y, :z].flatten(0, 2).index_select(0, self.cell)

    def merge_into(self, coarse: np.ndarray) -> None:
        """Note where the places go in the next stage, of which `coarse` (B, x, y, z) says what exists."""
        number = np.cumsum(coarse.ravel()).reshape(coarse.shape) - 1
        x, y, z = self._xyz
        self.parent = self._tensor(number[self._clip, x // 2, y // 2, z // 2])
        self.eighth = self._tensor(x % 2 * 4 + y % 2 * 2 + z % 2)
        self.parents = int(coarse.sum())

    def _windows(
        self, window: tuple[int, ...], shifts: list[int], table: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of each place's window and its place in the table (P,), and how many places each window has (W,)."""
        axes = [_along(n, w, s) for n, w, s in zip(self.grid, window, shifts)]
        name, cell = self._clip, np.zeros(len(self), np.int64)
        for (label, inside), where, n, size in zip(axes, self._xyz, self.grid, table):
            name, cell = name * n + label[where], cell * size + inside[where]
        _, number, lengths = np.unique(name, return_inverse=True, return_counts=True)
        return number, cell, lengths

    def window_sizes(self, window: tuple[int, ...], shifted: bool, frames: int) -> tuple[tuple[int, int], ...]:
        """(windows, tokens of one) for each length of windows of x, y, z, t tokens; arguments as in `layout`."""
        key = (window, shifted, frames)
        if key not in self._lengths:
            shifts = [w // 2 if shifted else 0 for w in window]
            _, _, lengths = self._windows(window, shifts, self.grid)
            runs = axis_runs(frames, window[3], shifts[3])
            found = zip(*np.unique(lengths, return_counts=True))
            self._lengths[key] = tuple((int(m) * run.windows, int(n) * run.size) for n, m in found for run in runs)
        return self._lengths[key]

    def layout(
        self, window: tuple[int, ...], shifted: bool, frames: int, table: tuple[int, ...], multiple: int = 1
    ) -> Layout:
        """How an attention's windows take the tokens.

        Args:
            window: Tokens along x, y, z, t.
            shifted: By half a window on each axis longer than it.
            frames: T.
            table: Tokens x, y, z, t of the table of positions.
            multiple: Windows get empty slots up to a multiple of so many places; 1: none.
        """
        key = (window, shifted, frames, table, multiple)
        if key not in self._layouts:
            self._layouts[key] = self._lay_out(window, shifted, frames, table, multiple)
        return self._layouts[key]

    def _lay_out(
        self, window: tuple[int, ...], shifted: bool, frames: int, table: tuple[int, ...], multiple: int
    ) -> Layout:
        shifts = [w // 2 if shifted else 0 for w in window]
        number, cell, lengths = self._windows(window, shifts, table)
        # A multiple keeps no window longer than a full one.
        most = math.prod(min(w, n) for w, n in zip(window, self.grid))
        slots = np.minimum(-(-lengths // multiple) * multiple, max(most, 1))
        by_window = np.lexsort((np.arange(len(self)), number))
        first = np.cumsum(lengths) - lengths
        runs = axis_runs(frames, window[3], shifts[3])
        found, order = [], []
        for length in sorted(set(slots.tolist())):
            chosen = np.flatnonzero(slots == length)
            inside = np.arange(length) < lengths[chosen, None]
            places = by_window[np.where(inside, first[chosen, None] + np.arange(length), 0)]
            seen = None if inside.all() else self._tensor(inside)
            cells = None if most == 1 else self._tensor(np.where(inside, cell[places], 0))
            for run in runs:
                times = run.start + run.step * np.arange(run.windows)[:, None] + np.arange(run.size)
                rows = places[:, None, :, None] * frames + times[:, None, :]
                order.append(np.where(inside[:, None, :, None], rows, -1).ravel())
                found.append(Windows(len(chosen), length, run, cells, seen))
        taken = np.concatenate(order)
        slot = np.empty(len(self) * frames, np.int64)
        slot[taken[taken >= 0]] = np.flatnonzero(taken >= 0)
        return Layout(found, self._tensor(np.maximum(taken, 0)), self._tensor(slot))


def sets_of(present: np.ndarray, stages: int, device: torch.device) -> tuple[TokenSet, ...]:
    """The places of every stage, made anew.

    A clip without a place (padding of the last batch) keeps its first one, so that it is a clip like others.

    Args:
        present: bool (B, x, y, z), which patches have a brain voxel.
        stages: How many.
        device: Of the tables.
    """
    empty = ~present.any((1, 2, 3))
    if empty.any():
        present = present.copy()
        present[empty, 0, 0, 0] = True
    found = [TokenSet(present, device)]
    for _ in range(1, stages):
        pads = [(0, 0), *((0, n % 2) for n in present.shape[1:])]
        even = np.pad(present, pads)
        batch, x, y, z = even.shape
        present = np.asarray(even.reshape(batch, x // 2, 2, y // 2, 2, z // 2, 2).any((2, 4, 6)))
        found[-1].merge_into(present)
        found.append(TokenSet(present, device))
    return tuple(found)


def unpacked(packed: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Bits of `np.packbits`, which a cache can look up, as bool again."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=math.prod(shape))
    return bits.astype(bool).reshape(shape)


@lru_cache(maxsize=KEPT)
def _kept(packed: bytes, shape: tuple[int, ...], stages: int, device: torch.device) -> tuple[TokenSet, ...]:
    return sets_of(unpacked(packed, shape), stages, device)


def token_sets(brain: Tensor, patch: Sequence[int], stages: int) -> tuple[TokenSet, ...]:
    """The places of every stage, kept for when a batch comes again (`sets_of`).

    Args:
        brain: bool (B, X, Y, Z).
        patch: Voxels x, y, z (and frames, not looked at) of a patch.
        stages: How many.
    """
    return kept_sets(brain_tokens(brain, patch, 0).cpu().numpy(), stages, brain.device)


def kept_sets(present: np.ndarray, stages: int, device: torch.device) -> tuple[TokenSet, ...]:
    """As `sets_of`, kept for when the same come again."""
    return _kept(np.packbits(present).tobytes(), present.shape, stages, device)

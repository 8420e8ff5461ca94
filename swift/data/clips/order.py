"""The order of samples: sample = f(seed, global counter). No state but one integer, how many were consumed.

Training is one endless stream of counters. Counter g belongs to epoch g // N of the N clips and takes clip
permutation(seed, epoch)[g % N]. A global batch is a run of counters; rank r takes the r-th part of it. So the stream
is the same for any number of ranks and workers at equal global batch, nothing is repeated or lost, also where a batch
reaches over the end of an epoch, and going on in mid-epoch needs the counter alone.

A mixture of cohorts (`MixedOrder`) deals the counters to the cohorts in blocks, each of which holds every cohort's part
exactly; a cohort's n-th sample is then the n-th of its own order. It too is a function of seed and counter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from swift.utils.errors import UserError

Item = tuple[int, int]
"""Sample identity and clip number; clip PADDING: a row that only fills the batch."""
PADDING = -1
VAL_SEED = 0x5EED
UINT64 = (1 << 64) - 1
BLOCK = (1024, 65536)
"""Shortest and longest block of a mixture, in samples."""
SMALLEST_PART = 0.001
"""Of a cohort in a mixture: smaller ones could not be kept to within a hundredth of themselves."""
DEAL_SEED, COHORT_SEED = 0xC0405EED, 0x9E3779B97F4A7C15


def permutation(clips: int, seed: int, epoch: int) -> np.ndarray:
    """(clips,) int64, every number below `clips` once.

    Sorts Philox words: NumPy promises their values for all its versions, which it does not for `permutation`.
    """
    words = np.random.Philox(key=np.array([seed & UINT64, epoch & UINT64], np.uint64)).random_raw(clips)
    return np.argsort(words, kind="stable")


class Order:
    """Clip of every global counter.

    Args:
        clips: N, at least 1.
        seed: Any integer.
    """

    def __init__(self, clips: int, seed: int) -> None:
        if clips < 1:
            raise UserError("there is no training clip: the data have no scan, or the split leaves none to train on")
        self.clips, self.seed = clips, seed
        self._known: dict[int, np.ndarray] = {}

    def __call__(self, counters: np.ndarray) -> np.ndarray:
        """(n,) counters -> (n,) clip numbers."""
        counters = np.asarray(counters, np.int64)
        epochs, places = np.divmod(counters, self.clips)
        found = np.empty(len(counters), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._epoch(int(epoch))[places[here]]
        return found

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._known:
            if len(self._known) == 2:  # a batch over the end of an epoch needs two
                self._known.pop(min(self._known))
            self._known[epoch] = permutation(self.clips, self.seed, epoch)
        return self._known[epoch]


def quotas(weights: Sequence[float]) -> list[int]:
    """Samples of each cohort in a block.

    The shortest block that fits all weights to within 1e-6 of a sample (2 and 1: 684 and 342); else the longest,
    rounded to the largest remainders.

    Raises:
        UserError: a weight that is not above 0, or a part below SMALLEST_PART.
    """
    if not weights or any(not (w > 0 and math.isfinite(w)) for w in weights):
        raise UserError(f"weights of a mixture {list(weights)}: must be numbers above 0")
    share = np.asarray(weights, np.float64) / math.fsum(weights)
    if share.min() < SMALLEST_PART:
        raise UserError(f"weights of a mixture {list(weights)}: none may be below {SMALLEST_PART:.1%} of their sum")
    blocks = np.arange(BLOCK[0], BLOCK[1] + 1)
    wanted = share[:, None] * blocks
    fits = np.flatnonzero(np.abs(wanted - np.rint(wanted)).max(0) < 1e-6)
    if len(fits):
        return np.rint(wanted[:, fits[0]]).astype(int).tolist()
    whole = np.floor(wanted[:, -1]).astype(int)
    rest = np.argsort(whole - wanted[:, -1], kind="stable")
    whole[rest[: BLOCK[1] - int(whole.sum())]] += 1
    return whole.tolist()


class MixedOrder:
    """Clip of every global counter, drawn from several cohorts in given proportions.

    Args:
        clips: Clips of each cohort; those of the second are numbered after those of the first, and so on.
        weights: Part of the samples of each cohort, up to a common factor.
        seed: Any integer.

    Attributes:
        clips: Number of all clips.
        quota: Samples of each cohort in a block.
    """

    def __init__(self, clips: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(clips) == len(weights)
        self.orders = [Order(n, seed + (number + 1) * COHORT_SEED) for number, n in enumerate(clips)]
        self.quota, self.seed, self.clips = quotas(weights), seed, sum(clips)
        self._first = np.cumsum([0, *clips])
        self._block = sum(self.quota)
        self._known: tuple[int, np.ndarray, np.ndarray] = (-1, *np.empty((2, 0), np.int64))

    def __call__(self, counters: np.ndarray) -> np.ndarray:
        """(n,) counters -> (n,) clip numbers."""
        counters = np.asarray(counters, np.int64)
        blocks, places = np.divmod(counters, self._block)
        cohorts, turns = np.empty((2, len(counters)), np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            dealt, turn = self._dealt(int(block))
            cohorts[here], turns[here] = dealt[places[here]], turn[places[here]]
        found = np.empty(len(counters), np.int64)
        for cohort, order in enumerate(self.orders):
            here = cohorts == cohort
            found[here] = self._first[cohort] + order(blocks[here] * self.quota[cohort] + turns[here])
        return found

    def _dealt(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Cohort of every place in a block, and how many samples of that cohort the block has before it."""
        if self._known[0] != block:
            cohorts = np.repeat(np.arange(len(self.quota)), self.quota)
            cohorts = cohorts[permutation(self._block, self.seed ^ DEAL_SEED, block)]
            turns = np.empty_like(cohorts)
            for cohort, count in enumerate(self.quota):
                turns[cohorts == cohort] = np.arange(count)
            self._known = block, cohorts, turns
        return self._known[1:]


def _check(batch_size: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise UserError(f"data.batch_size={batch_size}: must be at least 1")
    assert 0 <= rank < world, (rank, world)


class TrainBatches:
    """Endless batches of one rank, for DataLoader(batch_sampler=...). Has no length.

    Args:
        order: Clip of every counter.
        batch_size: Clips of one rank.
        rank, world: This rank, number of ranks.
        start: Global counter to begin with: what all ranks together have consumed.
    """

    def __init__(self, order: Order | MixedOrder, batch_size: int, rank: int, world: int, start: int = 0) -> None:
        _check(batch_size, rank, world)
        assert start >= 0
        self.order, self.batch_size, self.rank, self.world, self.start = order, batch_size, rank, world, start

    def __iter__(self) -> Iterator[list[Item]]:
        first = self.start + self.rank * self.batch_size
        while True:
            counters = np.arange(first, first + self.batch_size, dtype=np.int64)
            yield list(zip(counters.tolist(), self.order(counters).tolist(), strict=True))
            first += self.batch_size * self.world

    def consumed_after(self, sample_id: int) -> int:
        """Global counter after the global batch that holds this sample."""
        size = self.batch_size * self.world
        return self.start + (1 + (sample_id - self.start) // size) * size


class ValBatches:
    """Every held-out clip once, in one fixed shuffled order (so that the first batches alone see all scans).

    All ranks have the same number of batches. Rows beyond the last clip are padding: identity >= `clips`, clip PADDING.
    """

    def __init__(self, clips: int, batch_size: int, rank: int, world: int) -> None:
        _check(batch_size, rank, world)
        self.clips, self.batch_size, self.rank, self.world = clips, batch_size, rank, world

    def __len__(self) -> int:
        return -(-self.clips // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[Item]]:
        order = permutation(self.clips, VAL_SEED, 0).tolist()
        for step in range(len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            slots = range(first, first + self.batch_size)
            yield [(order[s], order[s]) if s < self.clips else (s, PADDING) for s in slots]

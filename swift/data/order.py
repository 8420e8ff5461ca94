"""The order of samples: sample = f(seed, global counter). No state but one integer, how many were consumed.

Training is one endless stream of counters. Counter g belongs to epoch g // N of the N clips and takes clip
permutation(seed, epoch)[g % N]. A global batch is a run of counters; rank r takes the r-th part of it. So the stream
is the same for any number of ranks and workers at equal global batch, nothing is repeated or lost, also where a batch
reaches over the end of an epoch, and going on in mid-epoch needs the counter alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from swift.utils.errors import UserError

Item = tuple[int, int]
"""Sample identity and clip number; clip PADDING: a row that only fills the batch."""
PADDING = -1
VAL_SEED = 0x5EED
UINT64 = (1 << 64) - 1


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

    def __init__(self, order: Order, batch_size: int, rank: int, world: int, start: int = 0) -> None:
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

"""A layer over some rows at a time, on a CPU: what lies between two of its maps then stays in the cache.

Large tensors between maps cost more than the products: every one of them is fresh memory, which the system clears page
by page, and comes back from main memory. Elsewhere, and under torch.compile, all rows go at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 4 << 20
"""Of the widest tensor of a layer, for each thread: about what a core has in its own cache."""


def rows_at_once(x: Tensor, rows: int, width: int) -> int:
    """How many of `rows` rows a layer takes at a time.

    Args:
        x: Its input.
        rows: All.
        width: Channels of its widest tensor.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return rows
    return min(rows, max(1, torch.get_num_threads() * PIECE_BYTES // (width * x.element_size())))


def cut(x: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """(M, C) -> pieces of so many rows. One piece is x itself: the gradient of a split would be a copy."""
    return [x] if len(rows) == 1 else x.split(list(rows))


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The inverse of `cut`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)

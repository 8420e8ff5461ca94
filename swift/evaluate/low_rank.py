"""The rank of a low-rank Gaussian (`swift.models.low_rank`), chosen on training frames.

Legend: V voxels, n frames.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from swift.models.low_rank import Sketch
from swift.utils.errors import UserError

RANKS = (5, 10, 20, 40, 80, 160)
"""Candidates."""


def legal_ranks(frames: int, voxels: int, keep: int, ranks: Sequence[int] = RANKS) -> list[int]:
    """Those of `ranks` that so many training frames can carry.

    Raises:
        UserError: none.
    """
    most = min(frames - 1, voxels - 1, keep)
    found = [rank for rank in ranks if rank <= most]
    if not found:
        raise UserError(f"{frames} training frames of {voxels} voxels are fewer than {min(ranks)} components")
    return found


def choose_rank(
    sketch: Sketch, values: Tensor, visible: Tensor, counted: Tensor | None = None, ranks: Sequence[int] = RANKS
) -> tuple[int, float]:
    """The rank with the least error on frames that the sketch has not seen.

    Args:
        sketch: Of the first training frames.
        values: (V, n) later training frames.
        visible: bool (V, n), a mask as the one in use.
        counted: bool (V, n), where the error counts; None: wherever it is hidden.
        ranks: Candidates; those that the frames cannot carry are left out.

    Returns:
        The rank and its mean |error|.

    Raises:
        UserError: fewer training frames than components, whatever the candidate.
    """
    assert sketch.rows is not None, "no frame was added"
    counted = ~visible if counted is None else counted
    errors = {}
    for rank in legal_ranks(sketch.frames, sketch.rows.shape[1], len(sketch.rows), ranks):
        errors[rank] = float((sketch.fit(rank).predict(values, visible) - values).abs()[counted].mean())
    best = min(errors, key=lambda rank: errors[rank])
    return best, errors[best]

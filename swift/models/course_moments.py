"""What a clip's courses say of each other, and a brain map that follows from it.

A local feature's mean and spread over time cannot hold how alike two far regions are. Courses of spatial maps
(`swift.models.maps`) bring far regions together; the products of two of them over a clip are what connectomes are made
of. A few numbers are read from these products, and each is given a learned pattern on the predicted cells.

Shapes: B batch, T frames, N courses, M moments, K contrasts, R patterns, cx cy cz the predicted cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swift.models.init import FIRST_WEIGHT, NORMAL, ZERO, Init

EPSILON = 1e-6
PATTERNS = 8
"""R: as many numbers a contrast tell subjects apart."""
MOST_ALIKE = 0.99
"""Correlations beyond count as this one, whose Fisher z is finite."""


def count_of(courses: int) -> int:
    """M: pairs of courses, and each course's own."""
    return courses * (courses + 1) // 2


def course_moments(courses: Tensor) -> Tensor:
    """Fisher z of the correlation of each pair of courses, and the logarithm of each one's standard deviation.

    Args:
        courses: (B, T, N).

    Returns:
        (B, M): pairs (0, 1), (0, 2), ..., (1, 2), ..., then the N courses.
    """
    rest = courses - courses.mean(1, keepdim=True)
    spread = (rest.square().mean(1) + EPSILON).sqrt()
    unit = rest / spread.unsqueeze(1)
    products = unit.transpose(1, 2) @ unit / courses.shape[1]
    count = courses.shape[2]
    first, second = torch.triu_indices(count, count, offset=1, device=products.device)
    pairs = products[:, first, second].clamp(-MOST_ALIKE, MOST_ALIKE).atanh()
    return torch.cat([pairs, spread.log()], -1)


class MapOfMoments(nn.Module):
    """R learned patterns on the cells, each times a linear function of the moments for every contrast; first 0.

    Args:
        courses: N.
        outputs: K.
        cells: cx, cy, cz.
    """

    def __init__(self, courses: int, outputs: int, cells: Sequence[int]):
        super().__init__()
        self.outputs = outputs
        self.numbers = nn.Linear(count_of(courses), outputs * PATTERNS)
        setattr(self.numbers, FIRST_WEIGHT, ZERO)
        nn.init.zeros_(self.numbers.weight)
        self.patterns = nn.Parameter(torch.zeros(PATTERNS, *cells))

    def own_initial_values(self) -> dict[str, Init]:
        """How the patterns begin."""
        return {"patterns": NORMAL}

    def forward(self, moments: Tensor) -> Tensor:
        """(B, M) -> (B, K, cx, cy, cz) float32."""
        numbers = self.numbers(moments).unflatten(-1, (self.outputs, PATTERNS))
        return torch.einsum("bkr,rxyz->bkxyz", numbers, self.patterns).float()

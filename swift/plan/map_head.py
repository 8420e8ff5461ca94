"""What a dense head costs, read off the head that will train: its products, and what its backward pass keeps.

A clip has at each stage n places in space, and a token at every time step of each; cells are those predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from swift.models.course_moments import PATTERNS, MapOfMoments, count_of
from swift.models.map_heads import FINE_WIDTH, SUMMARIES, MapHead, UnetMapHead


@dataclass(frozen=True)
class Product:
    """A matrix product of one clip, (rows, inputs) times (inputs, outputs).

    Attributes:
        source: What its rows follow from, which decides about their gradient: head | stage N (from 0) | maps | data.
        weighed: Whether its weights are trained.
    """

    rows: int
    inputs: int
    outputs: int
    source: str = "head"
    weighed: bool = True


@dataclass(frozen=True)
class HeadSizes:
    """Of a dense head.

    Attributes:
        products: All of a clip.
        stream: Elements that norms and GELU keep.
        operands: Elements of operands that products keep.
        statistics: Numbers that norms keep beside their input.
        outputs: Elements of a clip's prediction.
        parameters: Of the head.
    """

    products: tuple[Product, ...]
    stream: int
    operands: int
    statistics: int
    outputs: int
    parameters: int


def head_sizes(head: MapHead, frames: int) -> HeadSizes:
    """Sizes of a head, which may be on the meta device.

    Args:
        head: Of the model.
        frames: Of a clip.
    """
    products: list[Product] = []
    stream = operands = statistics = 0
    cells, width = math.prod(head.cells), head.place.space.shape[-1]
    places = [math.prod(grid[:3]) for grid in head.grids]
    for stage, (grid, pooled) in enumerate(zip(head.grids, head.widths, strict=True)):
        n, tokens = places[stage], math.prod(grid)
        kind = head.pools[stage].kind
        channels = pooled // 2 if kind == "mean_std" else pooled
        if kind == "attention":
            products.append(Product(tokens, channels, 1, f"stage {stage}"))
            # Features are normalized for the query, weighed, and summed.
            stream += 2 * tokens * channels + tokens
            statistics += 2 * tokens
        elif kind == "mean_std":
            stream += tokens * channels + n * channels
        products.append(Product(n, pooled, width))
        stream, operands, statistics = stream + n * pooled, operands + n * pooled, statistics + 2 * n
    if isinstance(head, UnetMapHead):
        for n in places:
            products.append(Product(n, 27 * width, width))
            stream, operands, statistics = stream + 2 * n * width, operands + n * width, statistics + 2 * n
        products += [
            Product(places[0], width, FINE_WIDTH),
            Product(cells, SUMMARIES, FINE_WIDTH, "data"),
            Product(cells, 27 * FINE_WIDTH, FINE_WIDTH),
            Product(cells, FINE_WIDTH, head.outputs),
            # The summaries: the brain's mean course, and each cell's correlation with it.
            Product(1, cells, frames, "data", weighed=False),
            Product(cells, frames, 1, "data", weighed=False),
        ]
        operands += places[0] * width + cells * (SUMMARIES + 2 * FINE_WIDTH)
        stream, statistics = stream + 4 * cells * FINE_WIDTH, statistics + 4 * cells
    else:
        products.append(Product(places[0], width, head.outputs * math.prod(head.per_patch)))
        operands, statistics = operands + places[0] * width, statistics + 2 * places[0]
        stream += 2 * places[0] * width
    if head.of_courses is not None:
        products += _of_courses(head.of_courses, head.courses, frames, cells)
        operands += count_of(head.courses) + head.outputs * PATTERNS
    parameters = sum(parameter.numel() for parameter in head.parameters())
    return HeadSizes(tuple(products), stream, operands, statistics, head.outputs * cells, parameters)


def _of_courses(part: MapOfMoments, courses: int, frames: int, cells: int) -> list[Product]:
    linear: nn.Linear = part.numbers
    return [
        Product(courses, frames, courses, "maps", weighed=False),
        Product(1, linear.in_features, linear.out_features, "maps"),
        Product(part.outputs, PATTERNS, cells),
    ]


def has_gradient(source: str, adapt: str, stages: int) -> bool:
    """Whether what a product reads is trained: `Product.source` under task.adapt, with so many stages."""
    if source in ("head", "data"):
        return source == "head"
    if source == "maps":
        return adapt in ("scratch", "full")
    return adapt in ("scratch", "full", "lora") or (adapt == "last_block" and source == f"stage {stages - 1}")

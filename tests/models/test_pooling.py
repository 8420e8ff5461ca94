"""Brain tokens and the mean over them, against loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from swift.models.layers import tokens_along
from swift.models.pooling import brain_tokens, pool


@pytest.mark.parametrize("grid", [(12, 12, 12), (13, 10, 7)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_token_counts_where_its_cell_holds_a_brain_voxel(grid: tuple[int, int, int], stage: int) -> None:
    brain = torch.from_numpy(np.random.default_rng(stage).random((2, *grid)) > 0.98)
    found = brain_tokens(brain, (4, 3, 2, 2), stage)
    tokens = tuple(tokens_along(n, p) for n, p in zip(grid, (4, 3, 2)))
    for _ in range(stage):
        tokens = tuple((n + 1) // 2 for n in tokens)
    assert found.shape == (2, *tokens)
    x, y, z = (p * 2**stage for p in (4, 3, 2))
    for b, i, j, k in itertools.product(range(2), *map(range, tokens)):
        cell = brain[b, i * x : (i + 1) * x, j * y : (j + 1) * y, k * z : (k + 1) * z]
        assert bool(found[b, i, j, k]) == bool(cell.any())


def test_the_mean_is_over_brain_tokens_alone() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 2, 2, 4, 5))
    tokens = rng.random((2, 3, 2, 2)) > 0.4
    got = pool(torch.from_numpy(features), torch.from_numpy(tokens)).numpy()
    for b in range(2):
        np.testing.assert_allclose(got[b], features[b][tokens[b]].mean(0), rtol=1e-12)

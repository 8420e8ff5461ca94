"""The local ridge against simple kriging written as a loop over voxels."""

from __future__ import annotations

import itertools

import pytest
import torch

from swift.evaluate import local_ridge
from swift.evaluate.local_ridge import LocalRidge

GRID, FRAMES = (5, 4, 6), 7


def scan(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, n) values of a smooth field, and the places of its voxels: about two thirds of the grid."""
    rng = torch.Generator().manual_seed(seed)
    field = torch.randn(*GRID, FRAMES, generator=rng)
    for axis in range(4):
        field = field + 0.6 * field.roll(1, axis)
    index = (torch.rand(GRID, generator=torch.Generator().manual_seed(5)) < 0.65).flatten().nonzero()[:, 0]
    return field.reshape(-1, FRAMES)[index], index


def places(index: torch.Tensor) -> list[tuple[int, ...]]:
    grid = list(itertools.product(*(range(n) for n in GRID)))
    return [grid[i] for i in index.tolist()]


def test_the_covariance_is_the_mean_of_products_over_all_voxels() -> None:
    values, index = scan()
    fit = LocalRidge.of([values], [index], GRID)
    at = {place: row for row, place in enumerate(places(index))}
    power = float(values.double().square().sum())
    for offset in [(0, 0, 1), (1, -1, 0), (2, 0, -2), (4, 0, 0)]:
        total = 0.0
        for place, row in at.items():
            other = at.get(tuple(p + o for p, o in zip(place, offset)))
            total += 0.0 if other is None else float((values[row] * values[other]).double().sum())
        found = fit.covariance(torch.tensor([*offset, 0]))
        assert float(found) == pytest.approx(total / power, abs=1e-5)
    lagged = float((values[:, 2:] * values[:, :-2]).double().sum()) / power
    assert float(fit.covariance(torch.tensor([0, 0, 0, -2]))) == pytest.approx(lagged, abs=1e-5)
    # Of the autocorrelation of a finite signal: every matrix of it is positive semidefinite.
    offsets = torch.tensor(list(itertools.product(range(3), range(3), range(3), range(3))))
    matrix = fit.covariance(offsets[:, None] - offsets[None]).double()
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-4


@pytest.mark.parametrize("chunk", [1 << 18, 50])
def test_equals_kriging_voxel_by_voxel(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ridge, "CHUNK", chunk)
    values, index = scan()
    fit = LocalRidge.of([values], [index], GRID)
    visible = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    found = fit.predict(torch.where(visible, values, torch.nan), visible, index, GRID)
    at = {place: row for row, place in enumerate(places(index))}
    none = 0
    for place, row in at.items():
        for frame in range(FRAMES):
            if visible[row, frame]:
                assert found[row, frame] == 0
                continue
            seen = []
            for offset in fit._offsets.tolist():
                other = at.get(tuple(p + o for p, o in zip(place, offset[:3])))
                when = frame + offset[3]
                if other is not None and 0 <= when < FRAMES and visible[other, when]:
                    seen.append((offset, float(values[other, when])))
            seen = seen[: local_ridge.MOST]
            expected = 0.0
            if seen:
                offsets = torch.tensor([offset for offset, _ in seen])
                between = fit.covariance((offsets[:, None] - offsets[None]).clamp(-4, 4)).double()
                own = fit.covariance(offsets).double()
                weights = torch.linalg.solve(between + local_ridge.RIDGE * torch.eye(len(seen)).double(), own)
                expected = float(weights @ torch.tensor([value for _, value in seen]).double())
            none += not seen
            assert float(found[row, frame]) == pytest.approx(expected, abs=2e-4)
    assert none < 50


def test_neighbours_are_used_in_the_order_of_what_they_tell() -> None:
    values, index = scan()
    fit = LocalRidge.of([values], [index], GRID)
    strength = fit.covariance(fit._offsets).abs()
    assert torch.all(strength[1:] <= strength[:-1])
    assert [0, 0, 0, 0] not in fit._offsets.tolist()

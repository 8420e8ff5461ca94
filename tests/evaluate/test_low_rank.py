"""The low-rank Gaussian against the conditional mean of the whole Gaussian, in float64."""

from __future__ import annotations

import pytest
import torch

from swift.evaluate.low_rank import choose_rank, legal_ranks
from swift.models.low_rank import LowRank, Sketch
from swift.utils.errors import UserError

V, FRAMES = 30, 60


def frames(seed: int = 0, count: int = FRAMES) -> torch.Tensor:
    """(n, V) frames of five courses and noise, with the same maps for every seed."""
    maps = torch.randn(5, V, generator=torch.Generator().manual_seed(99)) * torch.tensor([3.0, 2, 2, 1, 1])[:, None]
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=rng) @ maps + 0.5 * torch.randn(count, V, generator=rng)


def fitted(rank: int, keep: int = 100) -> LowRank:
    sketch = Sketch(keep)
    for block in frames().split(17):
        sketch.add(block)
    return sketch.fit(rank)


def dense_covariance(rank: int) -> torch.Tensor:
    """Maximum likelihood of probabilistic PCA from the eigenvectors of the V x V second moment."""
    x = frames().double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[rank:].mean()
    wide = vectors[:, :rank] * (values[:rank] - noise).sqrt()
    return wide @ wide.T + noise * torch.eye(V).double()


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_equals_the_conditional_mean_of_the_dense_gaussian(rank: int) -> None:
    covariance = dense_covariance(rank)
    model = fitted(rank)
    own = model.basis.double() * model.variance.sqrt()
    found = own @ own.T + model.noise * torch.eye(V).double()
    torch.testing.assert_close(found, covariance, rtol=1e-4, atol=1e-4)
    values = frames(1, 6).T
    visible = torch.rand(V, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    predicted = model.predict(values, visible)
    for frame in range(6):
        seen, hidden = visible[:, frame], ~visible[:, frame]
        gain = covariance[hidden][:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
        expected = gain @ values[seen, frame].double()
        torch.testing.assert_close(predicted[hidden, frame].double(), expected, rtol=1e-3, atol=1e-4)


def test_nothing_visible_gives_zero_and_hidden_values_are_not_looked_at() -> None:
    model, values = fitted(4), frames(1, 3).T
    visible = torch.zeros(V, 3, dtype=torch.bool)
    assert model.predict(values, visible).abs().max() == 0
    visible[::3] = True
    other = torch.where(visible, values, torch.nan)
    assert torch.equal(model.predict(other, visible), model.predict(values, visible))


def test_blocks_change_nothing_and_a_small_sketch_keeps_what_is_strong() -> None:
    whole = Sketch(100)
    whole.add(frames())
    visible = torch.rand(V, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    values = frames(1, 8).T
    expected = whole.fit(4).predict(values, visible)
    torch.testing.assert_close(fitted(4).predict(values, visible), expected, rtol=1e-3, atol=1e-3)
    small = fitted(4, keep=12)
    assert small.noise == pytest.approx(whole.fit(4).noise, rel=0.05)
    assert float((small.predict(values, visible) - expected).abs().mean()) < 0.05 * float(expected.abs().mean())


def test_the_rank_that_made_the_frames_is_chosen() -> None:
    sketch = Sketch(100)
    sketch.add(frames())
    values = frames(1, 40).T
    visible = torch.rand(V, 40, generator=torch.Generator().manual_seed(3)) < 0.5
    ranks = (1, 3, 5, 20)
    rank, error = choose_rank(sketch, values, visible, ranks=ranks)
    errors = {r: float((sketch.fit(r).predict(values, visible) - values).abs()[~visible].mean()) for r in ranks}
    assert rank == 5
    assert error == pytest.approx(min(errors.values()))


def test_more_components_than_frames_is_one_line() -> None:
    sketch = Sketch(100)
    sketch.add(frames(0, 8))
    assert sketch.fit(7).rank == 7
    with pytest.raises(UserError, match=r"9 components: 8 training frames of 30 voxels carry at most 7"):
        sketch.fit(9)
    assert legal_ranks(25, 1000, 320) == [5, 10, 20]
    with pytest.raises(UserError, match="4 training frames of 1000 voxels are fewer than 5 components"):
        legal_ranks(4, 1000, 320)

"""The reconstructive-contrastive loss against a loop over subjects, its pairs, and its margins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swift.train.contrastive import distances, partners, reconstructive_contrastive, scheduled, squared


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """7 clips of 4 subjects, 2 contrasts, 5 cells; a subject lacks some cells."""
    rng = torch.Generator().manual_seed(seed)
    subject = torch.tensor([5, 2, 5, 9, 2, 5, 0])
    maps = {one: torch.randn(2, 5, generator=rng, dtype=torch.float64) for one in (0, 2, 5, 9)}
    maps[9][:, 3:] = torch.nan
    target = torch.stack([maps[int(one)] for one in subject])
    return torch.randn(7, 2, 5, generator=rng, dtype=torch.float64), target, subject


def test_both_distances_against_a_loop() -> None:
    out, target, subject = batch()
    people = [0, 2, 5, 9]
    partner = dict(zip(people, np.array(people)[partners(4, (0, 3))], strict=True))
    own, other = distances(out, target, subject, (0, 3))

    def mean_of(whose: dict[int, int]) -> float:
        per_subject = []
        for one in people:
            clips = [i for i in range(7) if subject[i] == one]
            wanted = target[int((subject == whose[one]).nonzero()[0, 0])].numpy()
            per_subject.append(np.mean([np.nanmean((out[i].numpy() - wanted) ** 2, axis=1).mean() for i in clips]))
        return float(np.mean(per_subject))

    assert own.item() == pytest.approx(mean_of({one: one for one in people}))
    assert other is not None
    assert other.item() == pytest.approx(mean_of(partner))


def test_first_clips_are_found_without_a_search_for_each_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: object) -> None:
        raise AssertionError("nonzero waits for the device, once a subject")

    out, target = torch.zeros(5, 1, 2), torch.arange(5.0)[:, None, None].expand(5, 1, 2)
    monkeypatch.setattr(torch.Tensor, "nonzero", search)
    _, other = distances(out, target, torch.tensor([7, 3, 7, 3, 3]), (0,))
    # Of two subjects each has the other: 7 gets clip 1 of 3 (error 1), 3 gets clip 0 of 7 (error 0).
    assert other is not None
    assert float(other) == 0.5


def test_two_clips_of_a_subject_are_never_a_negative_pair() -> None:
    """The released code pairs the clips of a batch: of equal maps then, whose distance it pushes apart."""
    for count in (2, 3, 5, 40):
        for step in range(50):
            found = partners(count, (0, step))
            assert sorted(found) == list(range(count))
            assert (found != np.arange(count)).all()
    out, target, subject = batch()
    out.requires_grad_(True)
    alone = subject == 5
    own, other = distances(out[alone], target[alone], subject[alone], (0, 0))
    assert other is None
    assert reconstructive_contrastive(own, other, 0.0, 1.0) == own


def test_the_order_of_clips_does_not_matter() -> None:
    out, target, subject = batch()
    order = torch.tensor([3, 6, 0, 5, 1, 2, 4])
    first, second = (
        distances(*some, (1, 2)) for some in ((out, target, subject), (out[order], target[order], subject[order]))
    )
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert a.item() == pytest.approx(b.item())


@pytest.mark.parametrize(
    ("own", "other", "a", "b", "loss"),
    [(0.8, 1.5, 0.5, 0.5, 0.3), (0.4, 0.6, 0.5, 0.5, 0.3), (0.8, 0.7, 0.5, 0.2, 0.6), (0.1, 2.0, 0.5, 0.5, 0.0)],
)
def test_the_loss_in_closed_form(own: float, other: float, a: float, b: float, loss: float) -> None:
    found = reconstructive_contrastive(torch.tensor(own), torch.tensor(other), a, b)
    assert found.item() == pytest.approx(loss)


def test_the_mean_has_the_error_one() -> None:
    """Normalized maps of many subjects: the training mean, 0, is as far from the own map as from others'."""
    target = torch.randn(200, 1, 300)
    own, other = distances(torch.zeros_like(target), target, torch.arange(200), (0,))
    assert own.item() == pytest.approx(1, abs=0.02)
    assert other is not None
    assert other.item() == pytest.approx(own.item(), abs=1e-5)


def test_cells_without_a_value_do_not_count() -> None:
    target = torch.tensor([[[1.0, torch.nan, 3.0]]])
    out = torch.tensor([[[2.0, 100.0, 5.0]]], requires_grad=True)
    value = squared(out, target)
    assert value.item() == pytest.approx((1 + 4) / 2)
    value.sum().backward()
    assert out.grad is not None
    assert out.grad[0, 0].tolist() == pytest.approx([1.0, 0.0, 2.0])


def test_margins_go_evenly_from_the_first_to_the_last_step() -> None:
    assert [scheduled([0.5, 0.0], step, 5) for step in range(6)] == pytest.approx([0.5, 0.375, 0.25, 0.125, 0, 0])
    assert scheduled([0.5, 0.1], 0, 1) == 0.5

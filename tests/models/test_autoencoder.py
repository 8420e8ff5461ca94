"""The masked autoencoder sees nothing of what is hidden, and its loss counts what it should."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from swift.models.autoencoder import LOSSES, MaskedAutoencoder, clip_sums, reconstruction_loss
from swift.models.masking import draw_mask, mask_voxels
from tests.models import cases

KINDS = sorted(LOSSES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(variant: str, shape: str, decoder: str = "local") -> tuple[MaskedAutoencoder, cases.Shape, Tensor, Tensor]:
    """Model, its case, a clip of two samples and a token mask."""
    case = cases.SHAPES[shape]
    torch.manual_seed(0)
    model = MaskedAutoencoder(cases.config(variant, case, decoder=decoder), case.grid, case.frames).eval()
    clip = torch.randn(2, 1, *case.grid, case.frames, generator=seeded(1))
    mask = draw_mask(0, torch.arange(2), (*case.grid, case.frames), case.patch, case.patch, 0.6, "random")
    return model, case, clip, mask


# --- what is hidden -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize(("variant", "shape"), [("v1", "padded"), ("joint", "divisible"), ("factorized", "padded")])
def test_hidden_voxels_cannot_influence_the_prediction(variant: str, shape: str, decoder: str) -> None:
    model, case, clip, mask = build(variant, shape, decoder)
    hidden = mask_voxels(mask, case.patch, (*case.grid, case.frames)).unsqueeze(1)
    with torch.no_grad():
        before = model(clip, mask)
        for other in (torch.randn_like(clip) * 100, torch.full_like(clip, math.nan), torch.zeros_like(clip)):
            assert torch.equal(model(torch.where(hidden, other, clip), mask), before)
        # A visible voxel does.
        assert not torch.equal(model(torch.where(hidden, clip, clip + 1), mask), before)


def test_hidden_voxels_get_no_gradient_and_visible_ones_do() -> None:
    model, case, clip, mask = build("factorized", "divisible")
    clip.requires_grad_(True)
    model(clip, mask).square().sum().backward()
    hidden = mask_voxels(mask, case.patch, (*case.grid, case.frames)).unsqueeze(1)
    assert torch.all(clip.grad[hidden] == 0)
    assert torch.all(clip.grad[~hidden] != 0)


def test_the_place_of_the_mask_does_influence_the_prediction() -> None:
    model, _, clip, mask = build("factorized", "divisible")
    other = mask.clone()
    other[0, 0, 0, 0, 0] ^= True
    with torch.no_grad():
        a, b = model(clip, mask), model(clip, other)
    assert not torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model, _, clip, mask = build("joint", "padded")
    with torch.no_grad():
        together = model(clip, mask)
        alone = torch.cat([model(clip[i : i + 1], mask[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_all_visible_and_all_hidden() -> None:
    model, _, clip, mask = build("factorized", "padded")
    with torch.no_grad():
        assert torch.isfinite(model(clip, torch.zeros_like(mask))).all()
        blind = model(clip, torch.ones_like(mask))
        assert torch.equal(blind, model(clip * 7, torch.ones_like(mask)))


def test_the_mask_token_is_learned() -> None:
    model, _, clip, mask = build("factorized", "divisible")
    model(clip, mask).square().sum().backward()
    assert model.mask_token.grad is not None
    assert torch.all(model.mask_token.grad != 0)


def test_a_clip_of_another_size_is_refused() -> None:
    model, _, clip, mask = build("factorized", "divisible")
    with pytest.raises(ValueError, match=r"clip of \(8, 8, 8, 3\).*built for \(8, 8, 8, 4\)"):
        model(clip[..., :3], mask[..., :3])


# --- the loss -----------------------------------------------------------------------------------------------------
def slow_loss(
    prediction: np.ndarray, target: np.ndarray, counted: np.ndarray, kind: str
) -> tuple[list[float], list[int]]:
    """Sum and number for each sample, voxel by voxel."""
    sums, numbers = [], []
    for sample in range(len(counted)):
        total, number = 0.0, 0
        for place in np.ndindex(*counted.shape[1:]):
            if not counted[(sample, *place)]:
                continue
            error = abs(float(prediction[(sample, 0, *place)]) - float(target[(sample, 0, *place)]))
            smooth = error**2 / 2 if error < 1 else error - 0.5
            total += {"l1": error, "l2": error**2, "smooth_l1": smooth}[kind]
            number += 1
        sums.append(total)
        numbers.append(number)
    return sums, numbers


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    shape = (3, 1, 4, 5, 3, 6)
    prediction, target = (torch.randn(shape, generator=seeded(seed)) * 1.5 for seed in (0, 1))
    counted = torch.rand(3, 4, 5, 3, 6, generator=seeded(2)) < torch.tensor([0.2, 0.7, 0.5]).view(3, 1, 1, 1, 1)
    return prediction, target, counted


@pytest.mark.parametrize("kind", KINDS)
def test_sums_equal_a_loop(kind: str) -> None:
    prediction, target, counted = loss_inputs()
    sums, numbers = clip_sums(prediction, target, counted, kind)
    slow_sums, slow_numbers = slow_loss(prediction.numpy(), target.numpy(), counted.numpy(), kind)
    assert numbers.tolist() == slow_numbers
    np.testing.assert_allclose(sums.numpy(), slow_sums, rtol=1e-6)
    loss = reconstruction_loss(prediction, target, counted, kind)
    # Every clip weighs the same.
    assert float(loss) == pytest.approx(np.mean(np.divide(slow_sums, slow_numbers)), rel=1e-6)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(kind: str) -> None:
    prediction, target, counted = loss_inputs()
    whole = reconstruction_loss(prediction, target, counted, kind)
    parts = [reconstruction_loss(prediction[i : i + 1], target[i : i + 1], counted[i : i + 1], kind) for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_nothing_counted_is_zero_and_a_padding_row_weighs_nothing() -> None:
    prediction, target, counted = loss_inputs()
    prediction.requires_grad_(True)
    nothing = reconstruction_loss(prediction, target, torch.zeros_like(counted), "l1")
    nothing.backward()
    assert nothing.item() == 0
    assert torch.all(prediction.grad == 0)
    padded = counted.clone()
    padded[1] = False
    kept = [0, 2]
    expected = reconstruction_loss(prediction[kept], target[kept], counted[kept], "l1")
    torch.testing.assert_close(reconstruction_loss(prediction, target, padded, "l1"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["target", "prediction", "both"])
def test_values_that_are_not_counted_poison_neither_loss_nor_gradient(kind: str, poison: float, where: str) -> None:
    prediction, target, counted = loss_inputs()
    outside = ~counted.unsqueeze(1)
    clean = reconstruction_loss(prediction, target, counted, kind)
    if where != "target":
        prediction = prediction.masked_fill(outside, poison)
    if where != "prediction":
        target = target.masked_fill(outside, poison)
    prediction.requires_grad_(True)
    loss = reconstruction_loss(prediction, target, counted, kind)
    loss.backward()
    assert torch.equal(loss.detach(), clean)
    assert torch.isfinite(prediction.grad).all()
    assert torch.all(prediction.grad[outside] == 0)


def test_a_counted_nan_is_not_hidden() -> None:
    prediction, target, counted = loss_inputs()
    place = tuple(counted.nonzero()[0].tolist())
    target[(place[0], 0, *place[1:])] = math.nan
    assert math.isnan(float(reconstruction_loss(prediction, target, counted, "l1")))


def test_low_precision_is_summed_in_float32() -> None:
    prediction = torch.zeros(1, 1, 32, 32, 32, 4, dtype=torch.bfloat16)
    target = torch.ones(1, 1, 32, 32, 32, 4)
    sums, numbers = clip_sums(prediction, target, torch.ones(1, 32, 32, 32, 4, dtype=torch.bool), "l1")
    assert sums.dtype == torch.float32
    assert sums.item() == numbers.item() == 131072


# --- it learns ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["v1", "joint", "factorized"])
def test_it_learns_a_clip_by_heart(variant: str) -> None:
    """Thirty steps on one smooth clip: the hidden voxels follow from the visible ones."""
    case = replace(cases.SHAPES["divisible"], patch=(2, 2, 2, 2))
    torch.manual_seed(0)
    model = MaskedAutoencoder(cases.config(variant, case), case.grid, case.frames)
    x, y, z, t = torch.meshgrid(*(torch.linspace(0, 3, n) for n in (*case.grid, case.frames)), indexing="ij")
    clip = (torch.sin(x + t) + torch.cos(y - 0.5 * z))[None, None]
    mask = draw_mask(0, torch.arange(1), clip.shape[2:], case.patch, case.patch, 0.5, "random")
    hidden = mask_voxels(mask, case.patch, clip.shape[2:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = reconstruction_loss(model(clip, mask), clip, hidden, "l1")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]

"""Spatial maps against a regression frame by frame, and the fill against kriging voxel by voxel, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from swift.models.autoencoder import MaskedAutoencoder, reconstruction_loss
from swift.models.maps import LinearPart, draw_maps, fill, read_courses
from swift.models.masking import draw_mask, mask_voxels
from tests.models import cases

GRID, FRAMES, PATCH, K = (5, 4, 6), 5, (2, 3, 2, 2), 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(B, X, Y, Z, T) smooth values, the token mask, and brains that differ."""
    x = torch.randn(2, *GRID, FRAMES, generator=seeded(seed), dtype=torch.float64)
    for axis in range(1, 5):
        x = x + 0.7 * x.roll(1, axis)
    mask = draw_mask(0, torch.arange(2), (*GRID, FRAMES), PATCH, PATCH, 0.6, "random")
    return x, mask, torch.rand(2, *GRID, generator=seeded(1)) < 0.7


def slow_courses(x: Tensor, mask: Tensor, brain: Tensor, maps: Tensor, noise: Tensor) -> Tensor:
    """A ridge regression a frame on the list of its visible voxels."""
    hidden = mask_voxels(mask, PATCH, (*GRID, FRAMES))
    rows = []
    for b in range(len(x)):
        for t in range(FRAMES):
            seen = (brain[b] & ~hidden[b, ..., t]).flatten()
            m = maps[b].flatten(1)[:, seen].T
            gram = m.T @ m + noise[b] * torch.eye(K, dtype=x.dtype)
            rows.append(torch.inverse(gram) @ m.T @ x[b, ..., t].flatten()[seen])
    return torch.stack(rows).view(len(x), FRAMES, K)


@pytest.mark.parametrize("shared", [True, False])
def test_courses_and_drawing_equal_a_regression_a_frame_with_gradients(shared: bool) -> None:
    x, mask, brain = clip()
    sets = 1 if shared else 2
    weight = torch.randn(2, *GRID, FRAMES, generator=seeded(3), dtype=torch.float64)
    grads, values = [], []
    for slow in (False, True):
        maps = torch.randn(sets, K, *GRID, generator=seeded(2), dtype=torch.float64).requires_grad_()
        log_noise = torch.full((sets,), 0.3, dtype=torch.float64, requires_grad=True)
        noise = log_noise.exp()
        if slow:
            courses = slow_courses(x, mask, brain, maps.expand(2, *maps.shape[1:]), noise.expand(2))
            drawn = torch.einsum("btk,bkxyz->bxyzt", courses, maps.expand(2, *maps.shape[1:]))
        else:
            courses = read_courses(x, mask, brain, maps, noise, PATCH)
            drawn = draw_maps(courses, maps)
        (drawn * weight).sum().backward()
        values.append((courses.detach(), drawn.detach()))
        grads.append((maps.grad, log_noise.grad))
    for fast, slow_one in zip((*values[0], *grads[0]), (*values[1], *grads[1])):
        torch.testing.assert_close(fast, slow_one, rtol=1e-9, atol=1e-9)


def slow_fill(rest: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
    """Simple kriging from the eight neighbours, voxel by voxel, of one clip (X, Y, Z, T)."""
    shape = rest.shape
    rho = []
    for axis in range(4):
        together = alone = 0.0
        for place in itertools.product(*(range(n) for n in shape)):
            other = tuple(p + (a == axis) for a, p in enumerate(place))
            if other[axis] < shape[axis] and seen[place] and seen[other]:
                together += float(rest[place] * rest[other])
                alone += float(rest[place] ** 2 + rest[other] ** 2) / 2
        rho.append(min(max(together / alone if alone else 0.0, 0.0), 0.95))
    out = torch.zeros_like(rest)
    for place in itertools.product(*(range(n) for n in shape)):
        steps, values = [], []
        for axis, sign in itertools.product(range(4), (1, -1)):
            other = tuple(p + sign * (a == axis) for a, p in enumerate(place))
            if 0 <= other[axis] < shape[axis] and seen[other]:
                steps.append([sign * (a == axis) for a in range(4)])
                values.append(float(rest[other]))
        if not (steps and wanted[place]):
            continue
        at = torch.tensor(steps)
        base = torch.tensor(rho, dtype=torch.float64)
        between = (base ** (at[:, None] - at[None]).abs()).prod(-1)
        own = (base ** at.abs()).prod(-1)
        out[place] = float(torch.linalg.solve(between, own) @ torch.tensor(values, dtype=torch.float64))
    return out


def test_the_fill_equals_kriging_voxel_by_voxel() -> None:
    x, mask, brain = clip(5)
    hidden = mask_voxels(mask, PATCH, (*GRID, FRAMES)) & brain.unsqueeze(-1)
    seen = brain.unsqueeze(-1) & ~hidden
    found = fill(torch.where(seen, x, math.nan), seen, hidden)
    for b in range(2):
        torch.testing.assert_close(found[b], slow_fill(x[b], seen[b], hidden[b]), rtol=1e-9, atol=1e-9)
    assert float(found.abs().max()) > 0.1
    # However the clip lies in memory.
    turned = x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert torch.equal(fill(turned, seen, hidden), found)


def test_frames_of_an_ar1_process_are_predicted_as_its_theory_says() -> None:
    """One voxel, no neighbour in space, every second frame hidden: the weight of both sides is rho / (1 + rho^2)."""
    rho, frames = 0.8, 8_000
    noise = torch.randn(frames, generator=seeded(0), dtype=torch.float64)
    series = torch.zeros(frames, dtype=torch.float64)
    for t in range(1, frames):
        series[t] = rho * series[t - 1] + math.sqrt(1 - rho**2) * noise[t]
    seen = torch.ones(1, 1, 1, 1, frames, dtype=torch.bool)
    seen[..., 10::4] = False
    found = fill(series.view(1, 1, 1, 1, -1), seen, ~seen)[0, 0, 0, 0]
    expected = rho / (1 + rho**2) * (series[9] + series[11])
    assert float(found[10]) == pytest.approx(float(expected), rel=0.05)


def build(**changes: object) -> tuple[MaskedAutoencoder, Tensor, Tensor, Tensor]:
    case = cases.SHAPES["padded"]
    torch.manual_seed(0)
    model = MaskedAutoencoder(cases.config("factorized", case, maps=4, **changes), case.grid, case.frames)
    x = torch.randn(2, 1, *case.grid, case.frames, generator=seeded(1))
    mask = draw_mask(0, torch.arange(2), x.shape[2:], case.patch, case.patch, 0.6, "random")
    return model, x, mask, torch.rand(2, *case.grid, generator=seeded(2)) < 0.8


@pytest.mark.parametrize("decoder", ["local", "linear"])
def test_the_prediction_begins_as_the_linear_one_and_hidden_voxels_do_not_count(decoder: str) -> None:
    model, x, mask, brain = build(maps_of="shared", decoder=decoder)
    assert isinstance(model.linear, LinearPart)
    before = model(x, mask, brain)
    assert torch.equal(before, model.linear(x, mask, brain))
    assert float(before.abs().max()) > 0
    hidden = mask_voxels(mask, model.linear.patch, x.shape[2:]).unsqueeze(1)
    with torch.no_grad():
        model.decoder.head.weight.normal_()
        before = model(x, mask, brain)
        for other in (torch.randn_like(x) * 100, torch.full_like(x, math.nan)):
            assert torch.equal(model(torch.where(hidden, other, x), mask, brain), before)
        # Voxels outside the brain are seen by the network, as without maps, and not by the maps.
        outside = torch.where(brain[:, None, ..., None], x, 7.0)
        assert torch.equal(model.linear(outside, mask, brain), model.linear(x, mask, brain))


def test_shared_maps_are_trained_and_a_scans_own_come_with_the_batch() -> None:
    model, x, mask, brain = build(maps_of="shared")
    hidden = mask_voxels(mask, (model.linear.patch), x.shape[2:]) & brain.unsqueeze(-1)
    reconstruction_loss(model(x, mask, brain), x, hidden, "l1").backward()
    assert model.linear.maps.grad is not None
    assert torch.all(model.linear.maps.grad[:, brain.any(0)].abs().sum(0) > 0)
    assert float(model.linear.maps.grad[:, ~brain.any(0)].abs().sum()) == 0
    own, *_ = build(maps_of="scan")
    assert set(own.state_dict()) == set(build(maps_of="scan")[0].state_dict())
    assert not any(name.startswith("linear") for name in own.state_dict())
    with pytest.raises(ValueError, match="maps belong to each scan, and this one has none"):
        own(x, mask, brain)
    maps, noise = torch.randn(2, 4, *x.shape[2:5], generator=seeded(4)), torch.tensor([0.5, 2.0])
    both = own(x, mask, brain, (maps, noise))
    alone = own(x[1:], mask[1:], brain[1:], (maps[1:], noise[1:]))
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)

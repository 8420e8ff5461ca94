"""Masks: exact, uniform, and a function of seed, sample and unit alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from swift.models.masking import MASK_KINDS, draw_mask, mask_voxels, unit_noise

CASES = [
    # volume, patch, unit: all divide; a unit of several patches; nothing divides; a unit of everything but one axis.
    ((12, 12, 12, 8), (3, 3, 3, 1), (3, 3, 3, 1)),
    ((12, 12, 12, 8), (3, 3, 3, 1), (6, 3, 6, 4)),
    ((11, 13, 9, 7), (2, 3, 2, 2), (4, 3, 6, 2)),
    ((11, 13, 9, 7), (2, 3, 2, 2), (12, 15, 2, 8)),
]


def sample_ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


# --- the noise ----------------------------------------------------------------------------------------------------
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix(state: np.ndarray) -> np.ndarray:
    """Output function of SplitMix64 (Steele, Lea, Flood 2014), in NumPy's unsigned integers."""
    z = state.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def slow_noise(seed: int, samples: list[int], units: int) -> np.ndarray:
    """uint64 (B, U): the stream of SplitMix64 whose state two rounds of it have made from seed and sample."""
    with np.errstate(over="ignore"):
        state = np.array(samples, np.int64).astype(np.uint64) + np.uint64(seed) * GOLDEN
        key = splitmix(splitmix(state) + GOLDEN)
        return splitmix(key[:, None] + np.arange(1, units + 1, dtype=np.uint64) * GOLDEN)


def test_the_independent_implementation_gives_the_published_values() -> None:
    with np.errstate(over="ignore"):
        first = splitmix(np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * GOLDEN)
    assert first.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 12345, 2**31, 2**32 - 1])
def test_noise_equals_an_independent_implementation(seed: int) -> None:
    samples = [0, 1, 2, 77, 2**31, 2**40 + 3, 2**62]
    noise = unit_noise(seed, sample_ids(*samples), 50)
    assert noise.dtype == torch.int64
    np.testing.assert_array_equal(noise.numpy().view(np.uint64), slow_noise(seed, samples, 50))


# --- exact --------------------------------------------------------------------------------------------------------
def slow_mask(
    seed: int,
    sample: int,
    volume: tuple[int, ...],
    patch: tuple[int, ...],
    unit: tuple[int, ...],
    ratio: float,
    kind: str,
) -> np.ndarray:
    """bool (X, Y, Z, T) tokens, by loops: a token has the fate of the unit that holds its first voxel."""
    units = [math.ceil(n / u) for n, u in zip(volume, unit, strict=True)]
    drawn = {"random": units, "tube": [*units[:3], 1]}.get(kind, [1, 1, 1, units[3]])
    count = math.prod(drawn)
    hide = min(max(round(ratio * count), 1), count - 1)
    if kind == "temporal":
        chosen = set(range(count - hide, count))
    else:
        signed = slow_noise(seed, [sample], count)[0].view(np.int64)
        chosen = set(np.argsort(signed, kind="stable")[:hide].tolist())
    tokens = [math.ceil(n / p) for n, p in zip(volume, patch, strict=True)]
    out = np.zeros(tokens, bool)
    for place in np.ndindex(*tokens):
        inside = [place[axis] * patch[axis] // unit[axis] for axis in range(4)]
        inside = [here if n > 1 else 0 for here, n in zip(inside, drawn, strict=True)]
        out[place] = int(np.ravel_multi_index(inside, drawn)) in chosen
    return out


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(("volume", "patch", "unit"), CASES)
@pytest.mark.parametrize("ratio", [0.2, 0.8])
def test_masks_equal_a_loop_over_tokens(
    kind: str, volume: tuple[int, ...], patch: tuple[int, ...], unit: tuple[int, ...], ratio: float
) -> None:
    units = [math.ceil(n / u) for n, u in zip(volume, unit, strict=True)]
    drawn = {"random": units, "tube": units[:3]}.get(kind, units[3:])
    if math.prod(drawn) < 2:
        with pytest.raises(ValueError, match="at least 2 units"):
            draw_mask(5, sample_ids(0), volume, patch, unit, ratio, kind)
        return
    mask = draw_mask(5, sample_ids(3, 4), volume, patch, unit, ratio, kind)
    assert mask.dtype == torch.bool
    for row, sample in zip(mask, (3, 4), strict=True):
        np.testing.assert_array_equal(row.numpy(), slow_mask(5, sample, volume, patch, unit, ratio, kind))


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99])
def test_the_ratio_is_exact_in_every_sample(ratio: float) -> None:
    volume, patch = (12, 12, 12, 10), (3, 3, 3, 1)
    mask = draw_mask(0, torch.arange(40), volume, patch, patch, ratio, "random")
    assert mask.flatten(1).sum(1).tolist() == [round(ratio * 640)] * 40
    mask = draw_mask(0, torch.arange(40), volume, patch, patch, ratio, "tube")
    assert mask.flatten(1).sum(1).tolist() == [min(max(round(ratio * 64), 1), 63) * 10] * 40
    mask = draw_mask(0, torch.arange(40), volume, patch, patch, ratio, "temporal")
    assert mask.flatten(1).sum(1).tolist() == [min(max(round(ratio * 10), 1), 9) * 64] * 40


def test_a_unit_is_hidden_or_seen_as_a_whole() -> None:
    mask = draw_mask(1, torch.arange(10), (12, 12, 12, 8), (3, 3, 3, 1), (6, 6, 6, 4), 0.5, "random")
    blocks = mask.view(10, 2, 2, 2, 2, 2, 2, 2, 4).permute(0, 1, 3, 5, 7, 2, 4, 6, 8).flatten(5)
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert blocks.any(-1).flatten(1).sum(1).tolist() == [8] * 10


def test_tubes_go_through_all_frames_and_temporal_hides_the_last() -> None:
    tube = draw_mask(1, torch.arange(6), (12, 12, 12, 8), (3, 3, 3, 1), (3, 3, 3, 4), 0.6, "tube")
    assert torch.equal(tube, tube[..., :1].expand_as(tube))
    assert tube[..., 0].flatten(1).sum(1).tolist() == [round(0.6 * 64)] * 6
    temporal = draw_mask(1, torch.arange(2), (12, 12, 12, 7), (3, 3, 3, 1), (3, 3, 3, 2), 0.5, "temporal")
    # 4 units of 2 frames, the last one cut to a frame: frames 4, 5 and 6 are hidden.
    assert temporal.flatten(1, 3).all(1).tolist() == [[False] * 4 + [True] * 3] * 2
    assert torch.equal(temporal.flatten(1, 3).all(1), temporal.flatten(1, 3).any(1))


# --- a function of seed, sample and unit alone --------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["random", "tube"])
def test_a_sample_has_its_mask_in_any_batch(kind: str) -> None:
    def draw(*samples: int, seed: int = 4) -> Tensor:
        return draw_mask(seed, sample_ids(*samples), (12, 9, 12, 6), (3, 3, 3, 2), (3, 3, 3, 2), 0.7, kind)

    alone = draw(17)
    for batch in ([17, 18], [3, 17], [17, 17, 17], [2**40, 5, 17, 8]):
        together = draw(*batch)
        for row, sample in zip(together, batch, strict=True):
            assert torch.equal(row, alone[0]) == (sample == 17)
    assert not torch.equal(draw(17, seed=5), alone)
    assert not torch.equal(draw(18, seed=4), alone)
    # seed + sample is no key: the neighbour of the next seed is another one.
    assert not torch.equal(draw(16, seed=5), alone)


def test_masks_of_samples_and_seeds_are_all_different() -> None:
    masks = [
        draw_mask(seed, torch.arange(500), (12, 12, 12, 4), (3, 3, 3, 1), (3, 3, 3, 1), 0.5, "random")
        for seed in range(4)
    ]
    packed = {tuple(np.packbits(row.numpy())) for mask in masks for row in mask}
    assert len(packed) == 2000


# --- uniform ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.2, 0.8])
def test_every_unit_is_hidden_as_often(ratio: float) -> None:
    samples = 20_000
    mask = draw_mask(0, torch.arange(samples), (4, 4, 4, 4), (1, 1, 1, 1), (2, 2, 1, 1), ratio, "random")
    units = mask[:, ::2, ::2].flatten(1)
    exact = round(ratio * 64) / 64
    deviation = (units.double().mean(0) - exact) / math.sqrt(exact * (1 - exact) / samples)
    # 64 units: the largest of 64 standard normal values is below 4.5 with probability 0.9996.
    assert deviation.abs().max() < 4.5
    assert 0.5 < deviation.std() < 1.5


def test_pairs_of_units_are_hidden_independently() -> None:
    """But for the exact number: of two units, both are hidden with probability k(k-1) / n(n-1)."""
    samples, count, hidden = 20_000, 24, 12
    mask = draw_mask(9, torch.arange(samples), (2, 3, 4, 1), (1, 1, 1, 1), (1, 1, 1, 1), 0.5, "random").flatten(1)
    both = (mask.double().T @ mask.double() / samples)[~torch.eye(count, dtype=torch.bool)]
    expected = hidden * (hidden - 1) / (count * (count - 1))
    assert ((both - expected) / math.sqrt(expected * (1 - expected) / samples)).abs().max() < 5


def test_consecutive_samples_are_not_correlated() -> None:
    mask = draw_mask(0, torch.arange(4001), (8, 8, 8, 1), (1, 1, 1, 1), (1, 1, 1, 1), 0.5, "random").flatten(1).double()
    agreement = (mask[1:] == mask[:-1]).double().mean()
    assert abs(float(agreement) - 0.5) < 5 * 0.5 / math.sqrt(4000 * 512)


# --- voxels -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("volume", "patch"), [((12, 12, 12, 8), (3, 3, 3, 1)), ((11, 13, 9, 7), (2, 3, 2, 2))])
def test_a_voxel_is_hidden_with_its_patch(volume: tuple[int, ...], patch: tuple[int, ...]) -> None:
    tokens = [math.ceil(n / p) for n, p in zip(volume, patch, strict=True)]
    mask = torch.rand(2, *tokens, generator=torch.Generator().manual_seed(0)) < 0.5
    voxels = mask_voxels(mask, patch, volume)
    assert voxels.shape == (2, *volume)
    x, y, z, t = np.ogrid[tuple(slice(n) for n in volume)]
    px, py, pz, pt = patch
    np.testing.assert_array_equal(voxels.numpy(), mask.numpy()[:, x // px, y // py, z // pz, t // pt])

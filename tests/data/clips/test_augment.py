"""Augmentation: one draw for all frames, a function of seed and sample, never in place, against slow references."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from swift.config.schema_data import AugmentConfig
from swift.data.clips.augment import Augment, is_on
from swift.data.module import ClipDataModule
from tests.data.stores import PLAIN, build
from tests.data.test_module import SETTINGS

torch.set_num_threads(2)
OFF: AugmentConfig = PLAIN["augment"]
GRID, FRAMES, BACKGROUND = (12, 14, 10), 4, -1.5
ALL = {"flip": 0.5, "affine": 0.8, "intensity": 0.7, "noise": 0.7}


def augment(seed: int = 3, **changes: float) -> Augment:
    return Augment(dataclasses.replace(OFF, **changes), seed, 2.0, BACKGROUND)


def batch(ids: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Dense clips as `to_dense` gives them: a permuted view, background outside of a box that stands for the brain."""
    g = torch.Generator().manual_seed(seed)
    memory = torch.randn((1, FRAMES, *GRID), generator=g).expand(len(ids), -1, -1, -1, -1).clone()
    brain = torch.zeros((len(ids), *GRID), dtype=torch.bool)
    brain[:, 2:8, 3:11, 2:7] = True
    memory = torch.where(brain[:, None], memory, torch.tensor(BACKGROUND))
    bold = memory.permute(0, 2, 3, 4, 1).unsqueeze(1)
    return {"bold": bold, "brain": brain, "sample_id": torch.tensor(ids), "scan": torch.arange(len(ids))}


def test_off_by_default() -> None:
    assert not is_on(OFF)
    assert is_on(dataclasses.replace(OFF, noise=0.1))
    plain = batch([0, 1])
    same = augment()(plain)
    assert all(torch.equal(same[name], plain[name]) for name in plain)


def test_a_sample_is_changed_alike_wherever_it_comes() -> None:
    together = augment(**ALL)(batch([4, 9, 11, 4]))
    assert torch.equal(together["bold"][0], together["bold"][3])
    assert not torch.equal(together["bold"][0], together["bold"][1])
    again = augment(**ALL)
    again(batch([77]))  # whatever came before
    for place, sample in ((2, 11), (0, 4), (1, 9)):
        alone = again(batch([sample]))
        assert torch.equal(alone["bold"][0], together["bold"][place])
        assert torch.equal(alone["brain"][0], together["brain"][place])
    assert not torch.equal(augment(seed=4, **ALL)(batch([4]))["bold"][0], together["bold"][0])


def test_never_in_place_and_the_background_stays() -> None:
    given = batch(list(range(12)))
    kept = {name: tensor.clone() for name, tensor in given.items()}
    got = augment(**ALL)(given)
    for name, tensor in kept.items():
        assert torch.equal(given[name], tensor)
    assert got["bold"].shape == given["bold"].shape
    assert got["bold"].permute(0, 1, 5, 2, 3, 4).is_contiguous()  # laid out as it came
    assert got["brain"].dtype == torch.bool
    assert not torch.equal(got["brain"], given["brain"])
    outside = ~got["brain"][:, None, ..., None].expand_as(got["bold"])
    assert (got["bold"][outside] == BACKGROUND).all()
    assert torch.equal(got["scan"], given["scan"])


def test_flip() -> None:
    plain, got = batch([1]), augment(flip=1.0)(batch([1]))
    assert torch.equal(got["bold"], plain["bold"].flip(2))
    assert torch.equal(got["brain"], plain["brain"].flip(1))
    some = augment(flip=0.5)(batch(list(range(200))))
    share = float((some["brain"][:, 2] != plain["brain"][:, 2]).any(-1).any(-1).float().mean())
    assert 0.4 < share < 0.6


def drawn_matrix(transform: Augment) -> np.ndarray:
    """(4, 4) map from places in the new volume to places in the old one, that the last affine had drawn."""
    space, _ = transform._made[torch.device("cpu")]
    grid = space.transforms[1].rand_affine.rand_affine_grid
    return np.asarray(grid.get_transformation_matrix(), np.float64)


def test_affine_against_scipy() -> None:
    """All frames and the mask, by another library, with the matrix that was drawn."""
    transform = augment(affine=1.0, rotate=20.0, shift=3.0, zoom=0.2)
    for sample in range(3):
        got = transform(batch([sample]))
        matrix = drawn_matrix(transform)
        centre = (np.array(GRID) - 1) / 2
        offset = centre + matrix[:3, 3] - matrix[:3, :3] @ centre
        plain = batch([sample])
        mask = affine_transform(plain["brain"][0].double().numpy(), matrix[:3, :3], offset, order=0)
        assert (got["brain"][0].numpy() != (mask > 0.5)).mean() < 0.005  # halves may be rounded either way
        both = torch.from_numpy(mask > 0.5) & got["brain"][0]
        assert both.sum() > 100
        for frame in range(FRAMES):
            volume = plain["bold"][0, 0, ..., frame].double().numpy()
            want = affine_transform(volume, matrix[:3, :3], offset, order=1, mode="nearest")
            np.testing.assert_allclose(got["bold"][0, 0, ..., frame][both], want[both.numpy()], atol=1e-4)


def test_affine_stays_within_its_limits() -> None:
    transform = augment(affine=1.0, rotate=10.0, shift=3.0, zoom=0.1)
    angles, shifts, zooms = [], [], []
    for sample in range(60):
        transform(batch([sample]))
        space, _ = transform._made[torch.device("cpu")]
        grid = space.transforms[1].rand_affine.rand_affine_grid
        angles += grid.rotate_params
        shifts += grid.translate_params
        zooms += grid.scale_params
    for values, limit in ((angles, np.deg2rad(10)), (shifts, 1.5)):  # 3 mm are 1.5 voxels of 2 mm
        assert max(map(abs, values)) <= limit
        assert max(map(abs, values)) > 0.9 * limit
    assert 0.9 <= min(zooms) < 0.92
    assert 1.08 < max(zooms) <= 1.1


def test_intensity_is_one_scale_and_one_offset() -> None:
    plain, got = batch(list(range(40))), augment(intensity=1.0)(batch(list(range(40))))
    slopes, offsets = [], []
    for place in range(40):
        x = plain["bold"][place, 0][plain["brain"][place]].flatten().double().numpy()
        y = got["bold"][place, 0][plain["brain"][place]].flatten().double().numpy()
        slope, offset = np.polyfit(x, y, 1)
        np.testing.assert_allclose(y, slope * x + offset, atol=1e-5)
        slopes.append(slope)
        offsets.append(offset)
    assert 0.9 <= min(slopes) < 0.93 < 1.07 < max(slopes) <= 1.1
    assert -0.1 <= min(offsets) < -0.07 < 0.07 < max(offsets) <= 0.1


def test_noise() -> None:
    plain, got = batch(list(range(60))), augment(noise=1.0, noise_std=0.5)(batch(list(range(60))))
    difference = got["bold"] - plain["bold"]
    stds = [float(difference[place, 0][plain["brain"][place]].std()) for place in range(60)]
    assert min(stds) < 0.05
    assert 0.45 < max(stds) < 0.55
    loud = difference[int(np.argmax(stds)), 0][plain["brain"][0]]
    correlation = np.corrcoef(loud.T.numpy())  # frames have their own noise
    assert np.abs(correlation - np.eye(FRAMES)).max() < 0.3
    none = augment(noise=0.3)(batch(list(range(200))))["bold"] == batch(list(range(200)))["bold"]
    assert 0.6 < float(none.flatten(1).all(1).float().mean()) < 0.8


@pytest.mark.parametrize("workers", [0, 1])
def test_in_the_data_module(tmp_path: Path, workers: int) -> None:
    """Training clips only, after the scatter, the same after a resume."""
    made = build(tmp_path / "store", [0, 1])

    def module(**changes: Any) -> ClipDataModule:
        settings = dataclasses.replace(SETTINGS, workers=workers, **changes)
        return ClipDataModule(settings, made, 7)

    on = dataclasses.replace(OFF, **ALL)
    data = module(augment=on)
    got = [data.dense(packed) for packed in islice(data.train_dataloader(), 4)]
    plain = [module().dense(packed) for packed in islice(module().train_dataloader(), 4)]
    want = Augment(on, 7, SETTINGS.spacing, SETTINGS.background)
    for one, other in zip(got, plain):
        expected = want(other)
        assert all(torch.equal(one[name], expected[name]) for name in expected)
    assert not torch.equal(got[0]["bold"], plain[0]["bold"])
    for one, other in zip(data.val_dataloader(), module().val_dataloader()):
        assert torch.equal(data.dense(one)["bold"], module().dense(other)["bold"])
    again = module(augment=on)
    again.load_state_dict({**data.state_dict(), "consumed": 8})
    resumed = again.dense(next(iter(again.train_dataloader())))
    assert torch.equal(resumed["bold"], got[2]["bold"])
    with pytest.raises(ValueError, match="the run had augment"):
        module().load_state_dict(data.state_dict())

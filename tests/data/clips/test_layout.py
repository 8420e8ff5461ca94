"""How SwiFT v1's arrays lie: mirrored, shifted, and filled with the scan's smallest value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from swift.data.clips.scatter import AS_KEPT, Layout, to_dense
from swift.data.module import ClipDataModule
from swift.data.store.reader import Store
from swift.data.store.spaces import v1_box
from swift.data.store.stats import least
from swift.utils.errors import UserError
from tests.small import settings

GRID = (4, 5, 3)


def of_floats(*values: np.ndarray) -> list[torch.Tensor]:
    """Bits of float32 as int32, as a table holds them."""
    return [torch.from_numpy(one.astype(np.float32).view(np.int32)) for one in values]


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 0, -2), (0, -5, 0)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_cell_goes_where_a_loop_puts_it(mirrored: bool, shift: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(size=GRID).astype(np.float32)
    expected, inside = np.full(GRID, -9.0, np.float32), np.zeros(GRID, bool)
    for x, y, z in np.ndindex(*GRID):
        there = np.subtract((x, y, z), shift)
        if (there >= 0).all() and (there < GRID).all():
            own = (GRID[0] - 1 - there[0] if mirrored else there[0], there[1], there[2])
            expected[own], inside[own] = volume[x, y, z], True
    packed = {
        "codes": torch.ones(60, dtype=torch.int16),
        "tables": [torch.stack([torch.arange(60, dtype=torch.int32), *of_floats(volume.ravel(), np.zeros(60))])],
        "meta": torch.tensor([[0, 0, 0, 1]]),
        "voxels": [60],
    }
    found = to_dense(packed, GRID, 1, torch.tensor([-9.0]), layout=Layout(mirrored, shift))
    np.testing.assert_array_equal(found["bold"][0, 0, ..., 0].numpy(), expected)
    np.testing.assert_array_equal(found["brain"][0].numpy(), inside)
    if not mirrored and shift == (0, 0, 0):
        assert torch.equal(found["bold"], to_dense(packed, GRID, 1, -9.0, layout=AS_KEPT)["bold"])


def test_training_clips_lie_as_v1_knows_them(store: Path) -> None:
    own = ("data.normalization=zscore_global", "data.layout=swift_v1")
    plain, like_v1 = (ClipDataModule(settings(*some).data, store, 0) for some in (own[:1], own))
    first, second = (next(iter(data.train_dataloader())) for data in (plain, like_v1))
    here, there = plain.dense(first), like_v1.dense(second)
    opened = Store(store)
    for row, (scan, start) in enumerate(zip(there["scan"].tolist(), there["start"].tolist())):
        values, mask = opened.values(scan).astype(np.float64), opened.mask(scan)
        clip = values[start : start + 8]
        scaled = (clip - values.mean()) / values.std()
        dense = np.full((8, *mask.shape), (values.min() - values.mean()) / values.std())
        dense[:, mask] = scaled
        # Where each voxel of v1's box lies in the store's, by world coordinates along each axis.
        first = v1_box(mask.shape, opened.spacing)
        at = [
            np.rint((first[axis] - opened.affine(scan)[axis, 3]) / opened.spacing).astype(int) + np.arange(size)
            for axis, size in enumerate(mask.shape)
        ]
        wide = np.pad(dense, [(0, 0), *[(12, 12)] * 3], constant_values=dense[0][~mask][0])
        brain = np.pad(mask, 12)
        x, y, z = np.ix_(*(places + 12 for places in at))
        expected = np.moveaxis(wide[:, x, y, z], 0, -1)[::-1]
        np.testing.assert_allclose(there["bold"][row, 0].numpy(), expected, atol=2e-3)
        np.testing.assert_array_equal(there["brain"][row].numpy(), brain[x, y, z][::-1])
    # The same clips in the same order.
    assert torch.equal(here["sample_id"], there["sample_id"])
    assert like_v1.contract() == plain.contract() | {"orientation": "LAS", "background": "minimum"}


def test_augmentation_keeps_the_scans_own_background(store: Path) -> None:
    own = ("data.normalization=zscore_global", "data.layout=swift_v1", "data.augment.flip=1.0")
    data = ClipDataModule(settings(*own).data, store, 0)
    batch = data.dense(next(iter(data.train_dataloader())))
    for row in range(len(batch["bold"])):
        outside = batch["bold"][row, 0][~batch["brain"][row]]
        assert (outside == batch["background"][row]).all()
        assert batch["background"][row] < -0.5
        assert batch["bold"][row, 0].min() >= batch["background"][row] - 1e-3


def test_a_smallest_value_needs_one_scale_for_the_scan() -> None:
    brain = {"global_min": 2.0, "global_mean": 8.0, "global_std": 3.0}
    assert [least(kind, brain) for kind in ("zscore_global", "minmax", "none")] == [-2.0, 0.0, 2.0]
    with pytest.raises(UserError, match=r"normalization zscore_voxel: .* needs zscore_global, minmax or none"):
        least("zscore_voxel", brain)
    with pytest.raises(UserError, match=r"data.normalization=zscore_voxel: data.layout=swift_v1 needs zscore_global"):
        settings("data.layout=swift_v1")

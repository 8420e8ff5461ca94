"""Maps from training frames: whose frames they are fitted to, what a run with them leaves, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from swift.config.compose import composed
from swift.data.labels.splits import Split, save_splits
from swift.data.store.spaces import OWN
from swift.models.low_rank import Sketch
from swift.parallel.setup import resolve
from swift.train.pretrain import PretrainModule
from swift.train.scan_maps import ScanMaps, shared_maps
from swift.train.wiring import build_data, build_module, tell
from swift.utils.errors import UserError
from tests.evaluate.test_linear_baselines import SMALL


def test_a_training_clip_gets_maps_without_its_own_frames() -> None:
    cfg = composed([*SMALL, "model.maps=6"])[0]
    data = build_data(cfg)
    made = ScanMaps(data, 6)
    scan, start = int(data.train_index.scan[1]), 24
    length = int(data.train_index.length[1])
    a, b = data.store.normalizer(scan, cfg.data.normalization)
    frames = torch.from_numpy(data.store.read(scan, 0, length) * a + b)
    for without, first in ((frames[[t for t in range(length) if not 24 <= t < 32]], start), (frames, -1)):
        sketch = Sketch(1000)
        sketch.add(without)
        expected = sketch.fit(6)
        index, maps, noise = made.of(scan, first)
        assert torch.equal(index, torch.from_numpy(data.store.indices(scan)).long())
        assert noise == pytest.approx(expected.noise, rel=1e-3)
        covariance = (expected.basis * expected.variance.float()) @ expected.basis.T
        torch.testing.assert_close(maps.T @ maps, covariance, rtol=1e-2, atol=1e-3)
    batch = data.dense(next(iter(data.val_dataloader())))
    module = build_module(resolve(cfg))
    assert isinstance(module, PretrainModule)
    tell(module, data)
    assert module.scan_maps is not None
    maps, noises = module.scan_maps(batch, False)
    assert float(maps[:, :, :, :, :][~batch["brain"].unsqueeze(1).expand_as(maps)].abs().max()) == 0
    index, own, noise = made.of(int(batch["scan"][0]), -1)
    torch.testing.assert_close(maps[0].flatten(1)[:, index], own)
    assert float(noises[0]) == pytest.approx(noise)
    # The untrained model says what the low-rank baseline with a fill says: less error than the brain mean by far.
    with torch.no_grad():
        prediction, mask = module.eval().reconstruct(batch)
    counted = module.counted_voxels(batch, mask)
    error = (prediction - batch["bold"])[:, 0][counted].abs().mean()
    assert error < 0.97 * batch["bold"][:, 0][counted].abs().mean()


def test_shared_maps_begin_as_those_of_the_training_subjects(tmp_path: Path) -> None:
    data = build_data(composed(SMALL)[0])
    subjects = sorted({scan.subject for scan in data.store.scans})
    path = tmp_path / "split.json"
    save_splits(path, [Split({"train": tuple(subjects[:-2]), "val": tuple(subjects[-2:]), "test": ()})])
    overrides = [*SMALL, "model.maps=6", f"data.split={path}"]
    cfg = composed([*overrides, "model.maps_of=shared"])[0]
    data = build_data(cfg)
    made = shared_maps(data, 6)
    rows = []
    for scan, first, length in zip(data.train_index.scan, data.train_index.first, data.train_index.length):
        a, b = data.store.normalizer(int(scan), cfg.data.normalization)
        wide = torch.zeros(int(length), 12**3)
        values = data.store.read(int(scan), int(first), int(first + length)) * a + b
        wide[:, torch.from_numpy(data.store.indices(int(scan))).long()] = torch.from_numpy(values)
        rows.append(wide)
    frames = torch.cat(rows).double()
    inside = frames.abs().sum(0) > 0
    frames = frames[:, inside]
    strength, vectors = torch.linalg.eigh(frames.T @ frames / len(frames))
    noise = float(strength[:-6].mean())
    expected = (vectors[:, -6:] * (strength[-6:] - noise)) @ vectors[:, -6:].T
    flat = made["maps"].flatten(1).double()
    assert float(flat[:, ~inside].abs().max()) == 0
    torch.testing.assert_close(flat[:, inside].T @ flat[:, inside], expected, rtol=1e-2, atol=2e-3)
    assert float(made["log_noise"].exp()) == pytest.approx(noise, rel=1e-2)
    # They are what an empty module begins with; a held-out subject has no maps of its own.
    module = build_module(resolve(cfg), empty=True)
    tell(module, data)
    assert np.array_equal(module.first_weights.tensors["model.linear.maps"], made["maps"])
    batch = data.dense(next(iter(data.val_dataloader())))
    with pytest.raises(UserError, match=r"maps belong to each scan, and .* has no training frames"):
        ScanMaps(data, 6)(batch, False)


def test_shared_maps_need_scans_of_one_space(monkeypatch: pytest.MonkeyPatch) -> None:
    data = build_data(composed(SMALL)[0])
    monkeypatch.setattr(data.store.stores[0], "placement", OWN)
    with pytest.raises(UserError, match="maps_of=shared compares scans voxel by voxel, but they are not in one space"):
        shared_maps(data, 6)

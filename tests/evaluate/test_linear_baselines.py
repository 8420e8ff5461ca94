"""The fitted baselines of a run: on whose frames they are fitted, what they say, and what is left out by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from swift.config.compose import composed
from swift.config.schema import Config
from swift.data.labels.splits import Split, save_splits
from swift.evaluate import linear_baselines
from swift.evaluate.linear_baselines import BOTH, LOCAL, OWN, SUBJECTS, fit_linear
from swift.evaluate.low_rank import RANKS
from swift.evaluate.reconstruction import compare
from swift.models.low_rank import Sketch
from swift.models.masking import mask_voxels
from swift.train.pretrain import PretrainModule
from swift.train.wiring import build_data

SMALL = ["data=synthetic", "data.grid=[12,12,12]", "data.spacing=16.0", "data.frames=8", "data.workers=0",
         "model.patch_size=[3,3,3,2]", "model.depths=[2,2]", "model.num_heads=[4,8]", "model.window=[2,2,2,2]",
         "model.decoder_dim=16", "data.batch_size=2", "run_dir=unused"]  # fmt: skip


def settings(*more: str) -> Config:
    return composed([*SMALL, *more])[0]


def split(tmp_path: Path, cfg: Config) -> str:
    """A split file with the last two subjects held out."""
    data = build_data(cfg)
    subjects = sorted({scan.subject for scan in data.store.scans})
    path = tmp_path / "split.json"
    save_splits(path, [Split({"train": tuple(subjects[:-2]), "val": tuple(subjects[-2:]), "test": ()})])
    return str(path)


def test_of_clips_held_out_in_time_each_scan_has_its_own() -> None:
    cfg = settings()
    data, module = build_data(cfg), PretrainModule(cfg).eval()
    linear = fit_linear(data, cfg, 2)
    assert linear.names == [OWN, LOCAL, OWN + BOTH]
    batch = data.dense(next(iter(data.val_dataloader())))
    held = set(batch["scan"].tolist())
    assert set(linear.models) == held
    assert sum(note.startswith(f"{OWN}: ") for note in linear.notes) == len(held)
    # Fitted to the training frames alone: the same from these, read by hand.
    scan = min(held)
    length = int(data.train_index.length[list(data.train_index.scan).index(scan)])
    a, b = data.store.normalizer(scan, cfg.data.normalization)
    sketch = Sketch(1000)
    sketch.add(torch.from_numpy(data.store.read(scan, 0, length) * a + b))
    low_rank = linear.models[scan].low_rank
    assert low_rank is not None
    assert low_rank.rank in RANKS
    expected = sketch.fit(low_rank.rank)
    assert low_rank.noise == pytest.approx(expected.noise, rel=1e-3)
    np.testing.assert_allclose(low_rank.variance.numpy(), expected.variance.numpy(), rtol=2e-2)
    # Scored like the others, and said in the summary.
    scans = [1.0] * len(data.store.scans)
    found = compare(cfg, [batch], scans, None, module.reconstruct, module.device, linear=linear)
    assert found["baseline_notes"] == linear.notes
    mask = module.draw_mask(batch)
    hidden = mask.repeat_interleave(3, 1).repeat_interleave(3, 2).repeat_interleave(3, 3).repeat_interleave(2, 4)
    prediction = linear.predict(batch["bold"], hidden, batch["brain"], batch["scan"], batch["valid"])
    other = torch.where(hidden.unsqueeze(1), torch.nan, batch["bold"])
    again = linear.predict(other, hidden, batch["brain"], batch["scan"], batch["valid"])
    for name in linear.names:
        assert found["baselines"][name] < found["baselines"]["brain mean"]
        assert torch.equal(prediction[name], again[name])
        assert prediction[name][:, 0][~batch["brain"]].abs().max() == 0
    json.dumps(found)


def test_of_held_out_subjects_one_is_fitted_to_the_training_subjects(tmp_path: Path) -> None:
    plain = settings()
    cfg = settings(f"data.split={split(tmp_path, plain)}")
    data, module = build_data(cfg), PretrainModule(cfg).eval()
    linear = fit_linear(data, cfg, len(data.val_index))
    assert linear.names == [SUBJECTS, LOCAL, SUBJECTS + BOTH]
    assert set(linear.models) == {-1}
    union = np.zeros(12**3, bool)
    for scan in data.train_index.scan:
        union[data.store.indices(int(scan))] = True
    assert np.array_equal(linear.models[-1].index, np.flatnonzero(union))
    # One clip by the conditional mean of the whole Gaussian over the grid, fitted to all training frames by hand.
    rows = []
    for scan, first, length in zip(data.train_index.scan, data.train_index.first, data.train_index.length):
        a, b = data.store.normalizer(int(scan), cfg.data.normalization)
        wide = torch.zeros(int(length), 12**3)
        wide[:, torch.from_numpy(data.store.indices(int(scan))).long()] = torch.from_numpy(
            data.store.read(int(scan), int(first), int(first + length)) * a + b
        )
        rows.append(wide[:, torch.from_numpy(union)].double())
    frames = torch.cat(rows)
    low_rank = linear.models[-1].low_rank
    assert low_rank is not None
    values, vectors = torch.linalg.eigh(frames.T @ frames / len(frames))
    noise = values[: -low_rank.rank].mean()
    loading = vectors[:, -low_rank.rank :] * (values[-low_rank.rank :] - noise).sqrt()
    covariance = loading @ loading.T + noise * torch.eye(len(values)).double()
    batch = data.dense(next(iter(data.val_dataloader())))
    masked = mask_voxels(module.draw_mask(batch), cfg.model.patch_size, (12, 12, 12, 8))
    found = linear.predict(batch["bold"], masked, batch["brain"], batch["scan"], batch["valid"])[SUBJECTS]
    inside = batch["brain"][0].flatten()[torch.from_numpy(union)]
    for frame in (0, 5):
        x = batch["bold"][0, 0, ..., frame].flatten()[torch.from_numpy(union)].double()
        seen = inside & ~masked[0, ..., frame].flatten()[torch.from_numpy(union)]
        expected = covariance[:, seen] @ torch.linalg.solve(covariance[seen][:, seen], x[seen])
        shown = found[0, 0, ..., frame].flatten()[torch.from_numpy(union)]
        hidden = inside & ~seen  # of a visible voxel the Gaussian says its own value
        torch.testing.assert_close(shown[hidden].double(), expected[hidden], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_fitted_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings()
    data = build_data(cfg)
    monkeypatch.setattr(linear_baselines, "LOCAL_VALUES", 10.0)
    linear = fit_linear(data, cfg, 3)
    assert linear.names == [OWN]
    assert "local ridge: left out, 3 clips of" in linear.notes[-1]
    monkeypatch.setattr(linear_baselines.psutil, "virtual_memory", lambda: type("M", (), {"available": 2**20}))
    linear = fit_linear(data, cfg, 3)
    assert linear.names == []
    assert "low-rank (own scan): left out, it would need" in linear.notes[0]


def test_too_few_training_frames_are_one_line() -> None:
    cfg = settings("data.max_frames=64")
    data = build_data(cfg)
    linear = fit_linear(data, cfg, 3)
    assert LOCAL in linear.names
    assert OWN not in linear.names
    assert any("training frames" in note and "fewer than 5 components" in note for note in linear.notes)

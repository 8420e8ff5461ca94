"""Batches: against a slow dense reference, for any workers and ranks, continued exactly, through a real Trainer."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from swift.config.schema_data import DataConfig
from swift.data.clips.ring import SLOTS, StaleBatch
from swift.data.labels.splits import Split, save_splits
from swift.data.module import ClipDataModule
from swift.data.store.reader import CorruptData, Store
from swift.utils.errors import UserError
from tests.data.stores import GRID, PLAIN, build, scan

torch.set_num_threads(2)
SETTINGS = DataConfig(
    name="store",
    path=None,
    grid=list(GRID),
    spacing=2.0,
    frames=5,
    frame_stride=1,
    clip_stride=3,
    normalization="zscore_voxel",
    background=-1.5,
    batch_size=4,
    workers=0,
    val_fraction=0.4,
    val_gap=2,
    split=None,
    verify=True,
    **PLAIN,
)
FRAMES = [24, 31, 24, 40]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("data") / "store", [0, 1, 2, 3], FRAMES, shard_bytes=15_000)


def module(made: Path, rank: int | None = None, world: int | None = None, **changes: Any) -> ClipDataModule:
    return ClipDataModule(dataclasses.replace(SETTINGS, **changes), made, 7, rank, world)


def take(data: ClipDataModule, count: int) -> list[dict[str, torch.Tensor]]:
    return [data.dense(packed) for packed in islice(data.train_dataloader(), count)]


def slow_clip(number: int, start: int, stride: int) -> np.ndarray:
    """(X, Y, Z, T) z-scored clip from the values that were ingested, no store involved."""
    _, mask, bold = scan(number, FRAMES[number])
    x = bold.astype(np.float64)
    deviation = x.std(0)
    deviation[1] = np.inf  # the constant voxel gives 0
    dense = np.full((*GRID, SETTINGS.frames), SETTINGS.background)
    dense[mask] = ((x - x.mean(0)) / deviation)[start : start + (SETTINGS.frames - 1) * stride + 1 : stride].T
    return dense


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_batches_against_a_slow_reference(made: Path, workers: int, stride: int) -> None:
    data = module(made, workers=workers, frame_stride=stride)
    for batch in take(data, 8):
        bold = batch["bold"]
        assert bold.shape == (4, 1, *GRID, 5)
        assert bold.dtype == torch.float32
        assert bold.permute(0, 1, 5, 2, 3, 4).is_contiguous()
        for row in range(4):
            number, start = int(batch["scan"][row]), int(batch["start"][row])
            np.testing.assert_allclose(bold[row, 0], slow_clip(number, start, stride), atol=5e-4)
            np.testing.assert_array_equal(batch["brain"][row], scan(number)[1])
            assert batch["valid"][row]


def test_workers_and_ranks_do_not_change_the_stream(made: Path) -> None:
    want = take(module(made, batch_size=8), 7)
    for workers, world in ((2, 1), (0, 4), (1, 2)):
        ranks = [take(module(made, r, world, workers=workers, batch_size=8 // world), 7) for r in range(world)]
        for step, batch in enumerate(want):
            for name, tensor in batch.items():
                assert torch.equal(torch.cat([rank[step][name] for rank in ranks]), tensor), (name, workers, world)
    ids = torch.cat([batch["sample_id"] for batch in want])
    assert ids.tolist() == list(range(56))


@pytest.mark.parametrize("workers", [0, 2])
def test_continuing_from_the_state(made: Path, workers: int) -> None:
    whole = take(module(made, workers=workers), 9)
    first = module(made, workers=workers)
    take(first, 4)
    state = first.state_dict()
    assert state["consumed"] == 16  # not what the workers have read ahead
    second = module(made)
    second.load_state_dict(state)
    for got, want in zip(take(second, 5), whole[4:]):
        assert all(torch.equal(got[name], want[name]) for name in want)
    for changes in ({"normalization": "robust"}, {"clip_stride": 1}, {"background": 0.0}):
        with pytest.raises(UserError, match="cannot go on exactly"):
            module(made, **changes).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_pads_and_loses_nothing(made: Path, workers: int) -> None:
    seen: list[int] = []
    for rank in range(3):
        data = module(made, rank, 3, workers=workers)
        batches = [data.dense(packed) for packed in data.val_dataloader()]
        assert data.consumed == 0
        for batch in batches:
            assert batch["bold"].shape[0] == 4
            for row in range(4):
                if batch["valid"][row]:
                    number, start = int(batch["scan"][row]), int(batch["start"][row])
                    np.testing.assert_allclose(batch["bold"][row, 0], slow_clip(number, start, 1), atol=5e-4)
                    seen.append(int(batch["sample_id"][row]))
                else:
                    assert (batch["bold"][row] == SETTINGS.background).all()
                    assert not batch["brain"][row].any()
                    assert (batch["scan"][row], batch["start"][row]) == (-1, -1)
    assert sorted(seen) == list(range(len(data.val_index)))
    assert len(seen) % 12 != 0  # there was something to pad
    assert module(made, val_fraction=0.0).val_dataloader() == []


def test_a_batch_kept_too_long_is_refused(made: Path) -> None:
    data = module(made)
    packed = list(islice(data.train_dataloader(), SLOTS + 1))
    data.dense(packed[1])
    with pytest.raises(StaleBatch, match="was overwritten by a later one"):
        data.dense(packed[0])


@pytest.mark.parametrize("kind", ["zscore_global", "percent", "minmax", "robust", "none"])
def test_every_normalization_and_type(made: Path, kind: str) -> None:
    data = ClipDataModule(dataclasses.replace(SETTINGS, normalization=kind), made, 7, dtype=torch.float64)
    (batch,) = take(data, 1)
    place, start = int(batch["scan"][0]), int(batch["start"][0])
    a, b = data.store.normalizer(place, kind)
    want = data.store.read(place, start, start + 5) * a + b
    got = batch["bold"][0, 0][batch["brain"][0]].T
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


def test_a_split_by_subject(made: Path, tmp_path: Path) -> None:
    parts = Split({"train": ("00", "03"), "val": ("02",), "test": ("01",)})
    save_splits(tmp_path / "s.json", [parts])
    data = module(made, split=str(tmp_path / "s.json"))
    assert {int(s) for batch in take(data, 12) for s in batch["scan"]} == {0, 3}
    assert {int(s) for p in data.val_dataloader() for s in data.dense(p)["scan"]} - {-1} == {2}
    assert data.state_dict()["split"] == parts.hash
    save_splits(tmp_path / "s.json", [Split({"train": ("77",), "val": ("02",), "test": ()})])
    with pytest.raises(UserError, match="no training clip"):
        module(made, split=str(tmp_path / "s.json"))


def test_mistakes_are_named(made: Path) -> None:
    for changes, message in [
        ({"grid": [5, 6, 8]}, r"data.grid=\[5, 6, 8\]"),
        ({"spacing": 3.0}, "data.spacing=3.0"),
        ({"normalization": "z"}, "data.normalization=z: legal are zscore_voxel"),
        ({"frames": 41}, r"scan sub-00_task-rest \(and 3 other scans\): 24 frames, fewer than a clip"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"workers": -1}, "data.workers=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            module(made, **changes)


def test_short_and_excluded_scans_are_left_out_by_name(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = module(made, frames=25, val_fraction=0.0)
    assert data.used == [1, 3]
    assert set(data.train_index.scan.tolist()) == {1, 3}
    assert data.seen_subjects() == ["01", "03"]
    assert data.left_out == {f"sub-{n:02d}_task-rest": "24 frames, a clip spans 25" for n in (0, 2)}
    told = "2 of 4 scans are shorter than a clip, which spans 25 frames, and left out: sub-00_task-rest (24 frames)"
    assert told in caplog.text
    data = module(made, exclude=["01", "sub-02_task-rest"])
    assert (data.used, data.left_out) == (
        [0, 3],
        dict.fromkeys(["sub-01_task-rest", "sub-02_task-rest"], "data.exclude"),
    )
    assert set(data.train_index.scan.tolist()) | set(data.val_index.scan.tolist()) == {0, 3}
    save_splits(tmp_path / "s.json", [Split({"train": ("00", "01"), "val": ("02", "03"), "test": ()})])
    data = module(made, exclude=["01", "03"], split=str(tmp_path / "s.json"))
    assert set(data.train_index.scan.tolist()) == {0}
    assert set(data.val_index.scan.tolist()) == {2}
    with pytest.raises(
        UserError, match=r"data.exclude: 'sub-2_task-rest' is neither .*; the nearest are sub-02_task-rest,"
    ):
        module(made, exclude=["sub-2_task-rest"])
    with pytest.raises(UserError, match=r"data.exclude=\['00', '01', '02', '03'\]: leaves no scan"):
        module(made, exclude=["00", "01", "02", "03"])


def test_corrupt_bytes_stop_the_run(tmp_path: Path) -> None:
    path = build(tmp_path / "store", [0], [24])
    store = Store(path)
    file = path / "shards" / store.scans[0].shard
    raw = bytearray(file.read_bytes())
    raw[store._layout(0).bold + 1] ^= 1  # frame 0
    file.write_bytes(raw)
    for workers in (0, 1):
        with pytest.raises(CorruptData, match=rf"^{file}: scan sub-00_task-rest, frame 0: ") as caught:
            take(module(path, workers=workers, val_fraction=0.0), 9)
        assert "\n" not in str(caught.value)
    assert take(module(path, val_fraction=0.0, verify=False), 9)


class Recorder(lightning.LightningModule):
    """Takes batches as the pre-training module does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_ids: list[list[int]] = []
        self.val_ids: list[int] = []
        self.consumed: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.train_ids.append(batch["sample_id"].tolist())
        self.consumed.append(self.trainer.datamodule.consumed)  # type: ignore[attr-defined]
        return self.weight * batch["bold"].mean()

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.val_ids += batch["sample_id"][batch["valid"]].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def run(made: Path, steps: int, workers: int, checkpoint: Path | None = None) -> tuple[Recorder, lightning.Trainer]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, data = Recorder(), module(made, workers=workers)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    return model, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_trainer_with_resume(made: Path, tmp_path: Path, workers: int) -> None:
    whole, _ = run(made, 12, workers)
    assert whole.train_ids == [list(range(4 * k, 4 * k + 4)) for k in range(12)]
    assert whole.consumed == list(range(4, 52, 4))
    held = len(module(made).val_index)
    assert sorted(whole.val_ids) == sorted(2 * list(range(held)))
    _, trainer = run(made, 7, workers)
    trainer.save_checkpoint(tmp_path / "seven.ckpt")
    rest, _ = run(made, 12, workers, tmp_path / "seven.ckpt")
    assert rest.train_ids == whole.train_ids[7:]
    saved = torch.load(tmp_path / "seven.ckpt", weights_only=True)
    state = saved["ClipDataModule"]
    assert state["consumed"] == 28
    assert state["contract"]["normalization"] == "zscore_voxel"


def test_the_same_batch_again_under_the_numbers_of_the_others(made: Path) -> None:
    usual, same = (module(made, workers=workers, repeat_batch=again) for workers, again in ((0, False), (2, True)))
    first = take(usual, 1)[0]
    loader = iter(same.train_dataloader())
    for step in range(30):  # beyond an epoch
        batch = same.dense(next(loader))
        for name in ("bold", "brain", "scan", "start"):
            assert torch.equal(batch[name], first[name])
        assert batch["sample_id"].tolist() == list(range(4 * step, 4 * step + 4))
        assert same.consumed == 4 * (step + 1)
    whole = [batch["start"].tolist() for batch in map(same.dense, same.val_dataloader())]
    assert whole == [batch["start"].tolist() for batch in map(usual.dense, usual.val_dataloader())]

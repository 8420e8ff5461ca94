"""Training on maps as a command does it: what a run leaves, how often the model runs, and one rank against two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import swift.train.wiring
from swift.evaluate.map_judge import SubjectMeans
from swift.evaluate.map_scores import correlations
from swift.evaluate.predictions import Predictions
from swift.models.heads import TargetModel
from swift.train import replay
from swift.train.map_task import MapModule
from swift.utils.errors import UserError
from tests.distributed import plants
from tests.maps import map_cohort, map_command, map_data, map_file
from tests.runs import start
from tests.small import metrics, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return map_cohort(tmp_path_factory.mktemp("maps"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path_factory.getbasetemp() / "map-cache"))


def test_a_run_leaves_maps_scores_and_a_summary_that_agree(folder: Path, tmp_path: Path) -> None:
    retest = f"task.target.retest={folder / 'retest'}"
    start(*map_command(folder, tmp_path / "run", retest))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    data = map_data(folder)
    names = data.subjects_of("test")
    assert summary["kind"] == "map"
    assert summary["n"] == {"train": 12, "val": 6, "test": 6}
    table = Predictions.load(tmp_path / "run" / "predictions" / "test.csv")
    assert table.subject.tolist() == names
    # The NIfTI files lie on the maps' own grid, here that of the store: scores follow from them alone.
    said, truth = [], []
    for name in names:
        image = nib.load(tmp_path / "run" / "predictions" / "maps" / f"{name}_contrast-coupling_map.nii.gz")
        own = nib.load(map_file(folder, int(name[4:])))
        np.testing.assert_array_equal(image.affine, own.affine)
        said.append(np.asarray(image.dataobj).ravel()[data.space.voxels])
        truth.append(np.asarray(own.dataobj).ravel()[data.space.voxels])
    known = np.isfinite(truth).all(0)
    a, b, mean = np.array(truth)[:, known], np.array(said)[:, known], data.mean[0, known]
    rest = np.diag(correlations(a - mean, b - mean))
    np.testing.assert_allclose(table.scores[:, table.classes.index("residual_r")], rest, atol=1e-5)
    assert summary["scores"]["test"]["residual_r"] == pytest.approx(rest.mean(), abs=1e-5)
    assert summary["scores"]["test"]["r"] == pytest.approx(np.diag(correlations(a, b)).mean(), abs=1e-5)
    assert 0.5 < summary["scores"]["test"]["ceiling_residual_r"] < 1
    logged = [record for record in metrics(tmp_path / "run") if "val/residual_r" in record]
    numbers = np.array([data.people.index(name) for name in data.subjects_of("val")])
    of_the_mean = np.nanmean(data.normalized(numbers) ** 2)
    assert logged[0]["val/loss"] == pytest.approx(of_the_mean, rel=0.05)  # hardly trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [["task.average=features"], ["task.loss=contrastive", "task.head=map_local"], ["task.adapt=linear"]]
)
def test_other_ways_to_train_run_too(folder: Path, tmp_path: Path, extra: list[str]) -> None:
    start(*map_command(folder, tmp_path / "run", "trainer.max_steps=2", "trainer.val_every=2", *extra))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert np.isfinite(summary["scores"]["test"]["residual_r"])


@pytest.mark.slow
def test_the_model_runs_once_a_step_and_once_a_clip(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code runs it twice a step, and leaves out the last, smaller batch of the test part."""
    calls: list[tuple[bool, int]] = []
    plain = TargetModel.forward

    def counting(self: TargetModel, x: Any, *rest: Any) -> Any:
        calls.append((self.training, len(x)))
        return plain(self, x, *rest)

    monkeypatch.setattr(TargetModel, "forward", counting)
    start(*map_command(folder, tmp_path / "run", "trainer.max_steps=3", "trainer.val_every=3", "data.batch_size=5"))
    assert calls.count((True, 5)) == 3
    assert sum(training for training, _ in calls) == 3
    data = map_data(folder)
    clips = {part: len(data.parts[part]) for part in ("val", "test")}
    assert clips["test"] % 5  # a batch is not full
    # A validation, and the judgement of both parts; rows that only fill a batch are no clips.
    rows = sum(size for training, size in calls if not training)
    assert rows >= 2 * clips["val"] + clips["test"]
    table = Predictions.load(tmp_path / "run" / "predictions" / "test.csv")
    assert table.subject.tolist() == data.subjects_of("test")


def test_means_over_clips_do_not_depend_on_who_saw_them() -> None:
    """The released code averages each rank's scores; a subject whose clips are split would count twice."""
    rng = np.random.default_rng(0)
    subject = rng.integers(0, 4, 30)
    scores = rng.normal(size=(30, 7)).astype(np.float32)
    whole = SubjectMeans()
    whole.add({"subject": subject, "scores": scores})
    pieces = SubjectMeans()
    for part in np.array_split(rng.permutation(30), 5):
        pieces.add({"subject": subject[part], "scores": scores[part]})
    np.testing.assert_array_equal(whole.gathered()[0], pieces.gathered()[0])
    np.testing.assert_allclose(whole.gathered()[1], pieces.gathered()[1], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(whole.gathered()[1][2], scores[subject == 2].mean(0, dtype=np.float64))


def test_one_clip_at_a_time_is_refused_for_a_contrast(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.batch_size=1 on 1 rank is one clip at a time, with nobody to tell"):
        start(*map_command(folder, tmp_path / "run", "task.loss=contrastive", "data.batch_size=1"))


def test_a_batch_of_one_subject_counts_its_error_alone_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    own = ["task=task_map", "task.map_step=2", "task.loss=contrastive", "data.split=somewhere"]
    module = MapModule(settings(*own))
    draw = torch.Generator().manual_seed(0)
    out, target = torch.randn(3, 1, 7, generator=draw), torch.randn(1, 1, 7, generator=draw).expand(3, -1, -1)
    alone = {"target": target, "subject": torch.tensor([4, 4, 4])}
    with caplog.at_level("WARNING"):
        losses = [float(module.map_loss(out, alone, 0)) for _ in range(2)]
    wanted = ((out - target) ** 2).mean().item() - 0.5  # the first margin
    assert losses == pytest.approx([wanted, wanted])
    said = [record.getMessage() for record in caplog.records if "one subject" in record.getMessage()]
    assert said == ["step 0: all clips are of one subject: nobody to tell it from, the error alone counts"]


@pytest.mark.parametrize("loss", ["l2", "contrastive"])
def test_clips_without_brain_do_not_count(loss: str) -> None:
    """With tokens=brain such a clip has an invented token, whose prediction nothing may be learned from."""
    module = MapModule(settings("task=task_map", "task.map_step=2", f"task.loss={loss}", "data.split=somewhere"))
    draw = torch.Generator().manual_seed(0)
    out, target = (torch.randn(4, 1, 7, generator=draw) for _ in range(2))
    batch = {"target": target, "subject": torch.tensor([4, 4, 6, 7])}
    kept = torch.tensor([True, False, True, True])
    rest = {name: value[kept] for name, value in batch.items()}
    out.requires_grad_()
    found = module.map_loss(out, batch, 0, kept)
    assert float(found) == pytest.approx(float(module.map_loss(out[kept], rest, 0)))
    found.backward()
    assert out.grad is not None
    assert out.grad[kept].abs().sum((1, 2)).all()
    assert not out.grad[1].any()
    nobody = module.map_loss(out, batch, 0, torch.zeros(4, dtype=torch.bool))
    assert float(nobody) == 0


def test_a_kept_batch_can_be_run_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = swift.train.wiring.build_callbacks
    planted = plants.Plants([(2, 0, "nan")])
    monkeypatch.setattr(swift.train.wiring, "build_callbacks", lambda *args: [planted, *original(*args)])
    start(*map_command(folder, tmp_path / "run", "trainer.max_steps=3", "trainer.accelerator=cpu"))
    (file,) = (tmp_path / "run" / "guard").glob("step-0000002/batch-rank-*.safetensors")
    done = replay.replay(file)
    assert done.exact
    assert done.same

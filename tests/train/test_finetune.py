"""The fine-tuning module: its loss, and that what is judged does not depend on batches, ranks or the order of clips."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swift.config.check import check
from swift.config.compose import typed
from swift.data.labels.splits import Split, load_split, save_splits
from swift.data.store.reader import StoreWriter
from swift.data.task_module import TargetDataModule, class_weights, cut_in_time
from swift.evaluate.judge import ClipRows, figures, predictions_of
from swift.evaluate.scores import choose_threshold, scores
from swift.models.maps import read_courses
from swift.parallel.checkpoint.read import TensorWeights
from swift.parallel.setup import resolve
from swift.train.finetune import FinetuneModule
from swift.train.scan_maps import shared_maps
from swift.train.wiring import build_data, build_module, give_maps, tell
from swift.utils.errors import UserError
from tests.cohort import cohort, task_command
from tests.data import stores
from tests.small import composed, settings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cohort(tmp_path_factory.mktemp("cohort"))


def data_of(folder: Path, *overrides: str, rank: int = 0, world: int = 1) -> TargetDataModule:
    cfg = typed(composed(*task_command(folder, Path("nowhere-run"), *overrides)))
    return TargetDataModule(cfg.data, cfg.task, folder / "store", cfg.seed, rank, world)


def both(folder: Path, *overrides: str) -> tuple[FinetuneModule, TargetDataModule]:
    cfg = typed(composed(*task_command(folder, Path("nowhere-run"), *overrides)))
    data, module = build_data(cfg), build_module(resolve(cfg))
    tell(module, data)
    assert isinstance(module, FinetuneModule)
    assert isinstance(data, TargetDataModule)
    return module.eval(), data


# --- the loss -----------------------------------------------------------------------------------------------------
def slow_loss(out: np.ndarray, target: np.ndarray, each: Any) -> float:
    """Clip by clip, label by label."""
    clips = []
    for row, labels in zip(out, target):
        known = [each(o, label) for o, label in zip(np.atleast_2d(row), np.atleast_1d(labels)) if np.isfinite(label)]
        if known:
            clips.append(np.mean(known))
    return float(np.mean(clips)) if clips else 0.0


@pytest.mark.parametrize("per", ["subject", "frame"])
def test_cross_entropy_with_weights_over_the_labels_there_are(per: str) -> None:
    module = FinetuneModule(settings(f"task={'task_rest' if per == 'frame' else 'sex'}"))
    module.target_info = {"class_weights": [0.5, 2.0]}
    rng = np.random.default_rng(0)
    shape = (5, 7) if per == "frame" else (5,)
    out, target = rng.normal(size=(*shape, 2)), rng.integers(0, 2, shape).astype(float)
    target[1] = np.nan
    if per == "frame":
        target[2, 3:] = np.nan
    found = module.loss(torch.tensor(out), torch.tensor(target))

    def each(o: np.ndarray, label: float) -> float:
        return [0.5, 2.0][int(label)] * float(np.log(np.exp(o).sum()) - o[int(label)])

    assert float(found) == pytest.approx(slow_loss(out, target, each), rel=1e-12)
    assert float(module.loss(torch.tensor(out), torch.full(shape, torch.nan))) == 0


@pytest.mark.parametrize(("kind", "power"), [("l2", 2), ("l1", 1)])
def test_a_regression_is_trained_on_scaled_labels(kind: str, power: int) -> None:
    module = FinetuneModule(settings("task=age", f"task.loss={kind}"))
    module.target_info = {"mean": 50.0, "std": 8.0}
    out, target = np.array([[0.5], [-1.0], [0.0]]), np.array([60.0, 40.0, np.nan])
    found = float(module.loss(torch.tensor(out), torch.tensor(target)))
    wanted = slow_loss(out, target, lambda o, label: abs(o[0] - (label - 50) / 8) ** power)
    assert found == pytest.approx(wanted, rel=1e-12)


def test_weights_of_classes() -> None:
    balanced = settings("task=sex", "task.class_weights=[1,3]").task
    np.testing.assert_allclose(class_weights(balanced, np.array([30, 10])), [40 / 60, 3 * 40 / 20])
    np.testing.assert_allclose(class_weights(settings("task=synthetic_sex").task, np.array([30, 10])), [1, 1])


# --- what is given to it ------------------------------------------------------------------------------------------
def test_batches_carry_the_labels_of_their_subjects_and_frames(folder: Path) -> None:
    from swift.data.synthetic import load_truth

    truth = load_truth(folder / "store")
    own = {f"sub-{row['subject']}": row for row in truth["subjects"]}
    data = data_of(folder, "task=synthetic_continuous")
    for packed in data.test_dataloader():
        batch = data.dense(packed)
        for scan, valid, target in zip(batch["scan"], batch["valid"], batch["target"]):
            label = float(own[data.store.scans[int(scan)].subject]["label_continuous"]) if valid else np.nan
            np.testing.assert_allclose(float(target), label, rtol=1e-6)
    frames = data_of(folder, "task=synthetic_frame", "data.frame_stride=2")
    for packed in islice(frames.train_dataloader(), 3):
        batch = frames.dense(packed)
        for scan, start, target in zip(batch["scan"], batch["start"], batch["target"]):
            course = truth["scans"][frames.store.scans[int(scan)].scan_id]["valence_bold"]
            np.testing.assert_allclose(target.numpy(), course[int(start) :: 2][:8], rtol=1e-6)


def test_the_scale_is_that_of_the_training_subjects(folder: Path) -> None:
    data = data_of(folder, "task=synthetic_continuous")
    train = [s.phenotypes["label_continuous"] for s in data.store.scans if s.subject in data.subjects_of("train")]
    assert len(train) == 12
    assert data.scaling.mean == pytest.approx(np.mean(np.array(train, float)))
    assert data.scaling.std == pytest.approx(np.std(np.array(train, float)))
    few = data_of(folder, "task=synthetic_continuous", "data.max_subjects=4")
    assert len(few.subjects_of("train")) == 4
    assert few.scaling != data.scaling
    assert few.subjects_of("test") == data.subjects_of("test")


def test_a_scan_is_cut_in_time_with_gaps() -> None:
    data = settings("data.val_gap=5", "data.val_fraction=0.25").data
    assert cut_in_time(156, 10, data, 0.5, "s") == [(0, 50), (55, 18), (78, 78)]
    with pytest.raises(UserError, match="scan s: 40 frames cannot be cut"):
        cut_in_time(40, 10, data, 0.5, "s")


def test_frames_of_one_scan_without_a_split(folder: Path) -> None:
    data = data_of(folder, "task=synthetic_frame", "data.split=null", "data.frames=4", "data.val_gap=2")
    assert data.parts["train"].length.tolist() == [4] * 24
    assert data.parts["test"].first.tolist() == [12] * 24
    assert set(data.subjects_of("train")) == set(data.subjects_of("test"))


def test_a_scan_too_short_to_be_cut_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = "onset\tduration\n" + "".join(f"{6 * n}\t2\n" for n in range(7))
    with StoreWriter(tmp_path / "s", stores.GRID, 2.0) as writer:
        for number, frames in enumerate((60, 20, 60)):
            header, mask, bold = stores.scan(number, frames)
            writer.add(dataclasses.replace(header, events=events), mask, bold)
    cfg = settings("task=task_rest", "data.frames=4", "data.val_gap=2", "data.grid=[5,6,7]", "data.spacing=2.0")
    data = TargetDataModule(cfg.data, cfg.task, tmp_path / "s", cfg.seed)
    assert all(set(index.scan.tolist()) == {0, 2} for index in data.parts.values())
    assert "1 of 3 scans are left out, too short to be cut in time: sub-01_task-rest" in caplog.text
    assert "20 frames cannot be cut" in data.left_out["sub-01_task-rest"]


def test_a_score_that_is_always_undefined_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    whole = load_split(str(folder / "split.json"))
    for count, well in ((1, False), (2, False), (3, True)):
        parts = whole.parts | {"val": whole.parts["val"][:count]}
        save_splits(tmp_path / "s.json", [Split(parts)])
        command = ["task=synthetic_continuous", "task.select=r", f"data.split={tmp_path}/s.json"]
        if well:
            assert len(data_of(folder, *command).subjects_of("val")) == 3
        else:
            with pytest.raises(UserError, match=rf"task.select=r: .* val part, {count} subjects .*task.select=mae"):
                data_of(folder, *command)
    save_splits(tmp_path / "s.json", [Split(whole.parts | {"val": whole.parts["val"][:1]})])
    data_of(folder, "task=synthetic_continuous", "task.select=mae", f"data.split={tmp_path}/s.json")


# --- judged once --------------------------------------------------------------------------------------------------
def rows_of_ranks(folder: Path, world: int, batch: int, *overrides: str) -> ClipRows:
    """The test part's rows of a fixed function of the clip, dealt to `world` ranks and put together again."""
    parts = []
    for rank in range(world):
        data = data_of(folder, f"data.batch_size={batch}", *overrides, rank=rank, world=world)
        for packed in data.test_dataloader():
            dense = data.dense(packed)
            inside = dense["bold"][:, 0, 5:7, 5:8, 5:8].double().flatten(1, 3).transpose(1, 2)
            scores = inside[..., :1] if "frame" in overrides[0] else inside[:, 0, :2].softmax(-1)
            rows = {"clip": dense["sample_id"], "scan": dense["scan"], "start": dense["start"], "scores": scores}
            rows["target"] = dense["target"].double()
            parts.append({name: value[dense["valid"]].numpy() for name, value in rows.items()})
    return ClipRows.joined(parts[::-1])


@pytest.mark.parametrize("name", ["synthetic_binary", "synthetic_frame"])
def test_ranks_change_nothing(folder: Path, name: str) -> None:
    overrides = [f"task={name}", "task.eval_stride=3"]
    data = data_of(folder, *overrides)
    alone = predictions_of(rows_of_ranks(folder, 1, 4, *overrides), data)
    units = 6 if name == "synthetic_binary" else 6 * 24
    assert len(alone) == units
    for world, batch in ((2, 4), (4, 4), (3, 5)):
        other = predictions_of(rows_of_ranks(folder, world, batch, *overrides), data)
        assert other.subject.tolist() == alone.subject.tolist()
        assert other.frame.tolist() == alone.frame.tolist()
        np.testing.assert_allclose(other.scores, alone.scores, rtol=0, atol=1e-12)
        for key, value in scores(alone).items():
            assert scores(other)[key] == pytest.approx(value, abs=1e-12)


def test_a_frame_is_the_mean_of_the_clips_that_hold_it(folder: Path) -> None:
    data = data_of(folder, "task=synthetic_frame", "task.eval_stride=3")
    rows = rows_of_ranks(folder, 1, 4, "task=synthetic_frame", "task.eval_stride=3")
    found = predictions_of(rows, data)
    said: dict[tuple[str, int], list[float]] = {}
    for scan, start, values in zip(rows.scan, rows.start, rows.scores[..., 0]):
        for step, value in enumerate(values):
            said.setdefault((data.store.scans[scan].scan_id, int(start) + step), []).append(float(value))
    assert max(map(len, said.values())) >= 3
    wanted = [np.mean(said[str(scan), int(frame)]) for scan, frame in zip(found.scan, found.frame)]
    np.testing.assert_allclose(found.scores[:, 0], wanted, rtol=1e-12)


def test_probabilities_are_averaged_and_softmaxed_once(folder: Path) -> None:
    """Known mistake 10: a softmax of averaged probabilities flattens every answer towards 1/2."""
    module, data = both(folder, "task=synthetic_binary")
    with torch.no_grad():
        module.model.head.linear.weight.mul_(100)
        parts = [module.predict(data.dense(packed)) for packed in data.test_dataloader()]
        logits: dict[str, list[torch.Tensor]] = {}
        for packed in data.test_dataloader():
            batch = data.dense(packed)
            for row, scan in enumerate(batch["scan"].tolist()):
                if batch["valid"][row]:
                    one = module.model(batch["bold"][row : row + 1], batch["brain"][row : row + 1])[0]
                    logits.setdefault(data.store.scans[scan].subject, []).append(one.double())
    found = predictions_of(ClipRows.joined(parts), data)
    for subject, probabilities in zip(found.subject, found.scores):
        clips = [np.exp(x.numpy()) / np.exp(x.numpy()).sum() for x in logits[str(subject)]]
        assert len(clips) == 3
        np.testing.assert_allclose(probabilities, np.mean(clips, 0), atol=1e-4)
    assert np.ptp(found.scores[:, 1]) > 1e-3


def test_figures_of_a_validation_use_its_own_threshold(folder: Path) -> None:
    """Known mistake 13 is one of the test set: nothing here looks at it."""
    module, data = both(folder, "task=synthetic_binary")
    with torch.no_grad():
        rows = ClipRows.joined([module.predict(data.dense(packed)) for packed in data.val_dataloader()])
    said = figures(data, "cross_entropy")(rows)
    predictions = predictions_of(rows, data)
    assert sorted(set(predictions.subject.tolist())) == data.subjects_of("val")
    assert said["balanced_accuracy"] == scores(predictions, choose_threshold(predictions))["balanced_accuracy"]
    own = predictions.scores[np.arange(6), predictions.target.astype(int)]
    assert said["loss"] == pytest.approx(-np.log(own).mean())


def test_regressions_are_said_in_the_label_s_own_unit(folder: Path) -> None:
    module, data = both(folder, "task=synthetic_continuous")
    packed = next(iter(data.test_dataloader()))
    batch = data.dense(packed)
    with torch.no_grad():
        out = module.model(batch["bold"], batch["brain"]).double().numpy()
        found = module.predict(batch)["scores"]
    np.testing.assert_allclose(found, out[batch["valid"].numpy()] * data.scaling.std + data.scaling.mean)


# --- what is refused ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task=synthetic_binary", "data.split=null"], r"one label a subject needs data\.split=FILE"),
        (["task=synthetic_site"], "class 'site3' has no subject in the train part"),
        (
            ["task=depression"],
            "the manifest has no such column; it has age, label_binary, label_continuous, label_null",
        ),
        (["task=age", "task.target.column=sex"], r"not a number in 24 rows \(sub-0001_task-rest \(line 2\): '[FM]'"),
        (["task=synthetic_binary", "data.max_subjects=1"], "has no subject in the train part"),
        (["task=age", "task.target.column=label_null", "data.max_subjects=1"], "constant, [01] for all 1 training"),
        (["task=synthetic_frame", "data.split=null"], "24 frames cannot be cut into training, validation and test"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        data_of(folder, *overrides)
    assert "\n" not in str(caught.value)


def test_test_subjects_that_the_weights_have_seen(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(folder, "task=synthetic_binary")
    data.check_seen(data.subjects_of("train"), "RUN")
    assert data.seen_subjects() == data.subjects_of("train")
    first = data.subjects_of("test")[0]
    with pytest.raises(UserError, match=f"^init=RUN: 1 test subjects were in pre-training: {first}.*allow_seen=true"):
        data.check_seen([first, "somebody"], "RUN")
    allowed = data_of(folder, "task=synthetic_binary", "task.allow_seen=true")
    allowed.check_seen([first], "RUN")
    assert f"task.allow_seen=true: 1 test subjects were in pre-training: {first}" in caplog.text
    data.check_seen(None, "old.ckpt")
    assert "does not say which subjects" in caplog.text


# --- courses of maps ----------------------------------------------------------------------------------------------
def test_courses_of_a_scans_own_maps_come_from_all_its_training_frames(folder: Path) -> None:
    own = ["data.split=null", "data.frames=4", "data.val_gap=1", "model.maps=4", "task.courses=true"]
    module, data = both(folder, "task=synthetic_frame", *own)
    assert module.scan_maps is not None
    batch = data.dense(next(iter(data.train_dataloader())))
    maps, noise = module.scan_maps(batch, training=False)
    with torch.no_grad():
        module.model.head.of_courses.weight.normal_(generator=torch.Generator().manual_seed(0))
        found = module.train().outputs(batch)
        courses = read_courses(batch["bold"][:, 0], torch.zeros(len(maps), 3, 3, 3, 2, dtype=torch.bool),
                               batch["brain"], maps, noise, (4, 4, 4, 2))  # fmt: skip
        plain = module.model.head(module.model.encoder(batch["bold"])[-1], batch["brain"], 4, torch.zeros_like(courses))
        torch.testing.assert_close(found, plain + courses @ module.model.head.of_courses.weight.T)
    assert float(courses.std()) > 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.maps=0"], "task.courses=True: needs maps"),
        (
            ["model.maps=4", "model.maps_of=scan"],
            "model.maps_of=scan: each scan's own maps are in an order of their own",
        ),
    ],
)
def test_courses_that_no_head_could_use_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(settings("task=synthetic_binary", "data.split=somewhere", "task.courses=true", *overrides))


def test_shared_maps_are_taken_with_the_encoder_and_refused_in_another_space(folder: Path, tmp_path: Path) -> None:
    shared = ["model.maps=4", "model.maps_of=shared"]
    task = ["task=synthetic_binary", "task.adapt=linear", "task.courses=true", *shared]
    cfg = typed(composed(*task_command(folder, tmp_path / "nowhere", *task, "init=null")))
    made = build_module(resolve(cfg), empty=True)
    data = build_data(cfg)
    tell(made, data)
    first = made.first_weights.tensors["model.linear.maps"]
    assert torch.equal(torch.as_tensor(first), shared_maps(data, 4)["maps"])
    # Weights of a pre-training in another space, then in none.
    names = {name: parameter for name, parameter in FinetuneModule(cfg).named_parameters() if ".head." not in name}
    weights = TensorWeights({name: parameter.detach() for name, parameter in names.items()})
    for place, wanted in (("another box", "another box"), ("own mask", "own mask"), ("", "not recorded")):
        module = build_module(resolve(cfg))
        module.first_weights, module.first_contract = weights, {"placement": place} if place else {}
        with pytest.raises(UserError, match=f"shared maps belong to scans of the space '{wanted}'"):
            give_maps(module, data)
    here = data.beside_contract()["placement"]
    module = build_module(resolve(cfg))
    module.first_weights, module.first_contract = weights, {"placement": here}
    give_maps(module, data)

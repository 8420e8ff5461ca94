"""`python -m swift.train task=...`, in process: what is taken from init=, what is left, what is judged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swift.config.compose import freeze, load_frozen, typed
from swift.data.store.reader import Store
from swift.data.task_module import TargetDataModule
from swift.evaluate.judge import ClipRows, predictions_of
from swift.evaluate.predictions import Predictions
from swift.evaluate.scores import choose_threshold, scores
from swift.inference.export import export, load
from swift.models.encoder import SwinEncoder
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.init_from import contract_differences
from swift.parallel.checkpoint.read import FileWeights
from swift.parallel.setup import resolve
from swift.train.finetune import FinetuneModule
from swift.train.init_weights import start_from
from swift.train.wiring import build_data, build_module
from swift.utils.errors import UserError
from tests.cohort import cohort, task_command
from tests.inference.test_embed_cli import embed, npz, reference
from tests.models.test_v1_import import CASE, CFG, v1_state
from tests.runs import QUIET, assert_same_run, start
from tests.small import command, composed

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def pretrained(folder: Path) -> Path:
    """Two steps of pre-training on the training subjects."""
    torch.set_num_threads(1)
    run = folder / "pretrained"
    start(*task_command(folder, run, "trainer.max_steps=2", "trainer.val_every=2", "trainer.val_batches=1"))
    return run


LORA = ["task.adapt=lora", "task.lora_rank=2", "task.lora_alpha=6"]


@pytest.fixture(scope="module")
def low_rank(folder: Path, pretrained: Path) -> Path:
    """Three steps of low-rank changes, fast enough to see them."""
    torch.set_num_threads(1)
    run = folder / "low_rank"
    tuned(folder, run, *LORA, f"init={pretrained}", "optimizer.lr=0.05", "trainer.max_steps=3")
    return run


def tuned(folder: Path, run: Path, *overrides: str, task: str = "synthetic_binary") -> dict[str, Any]:
    start(*task_command(folder, run, f"task={task}", *overrides))
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def said_of(folder: Path, weights: Path, part: str = "test") -> Predictions:
    """What an exported model says of a part of its split, worked out without the Trainer."""
    exported = load(weights)
    # The file names no path.
    places = replace(exported.config.data, path=str(folder / "store"), split=str(folder / "split.json"))
    data = build_data(replace(exported.config, data=places))
    assert isinstance(data, TargetDataModule)
    module = FinetuneModule(exported.config, empty=True)
    module.model = exported.model
    module.target_info = FileWeights(weights).metadata["target"]
    loader = data.test_dataloader() if part == "test" else data.val_dataloader()
    with torch.no_grad():
        rows = [module.eval().predict(data.dense(packed)) for packed in loader]
    return predictions_of(ClipRows.joined(rows), data)


# --- what a run leaves --------------------------------------------------------------------------------------------
def test_a_run_is_judged_by_every_test_subject_with_the_best_weights(
    folder: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    summary = tuned(folder, run, "task.adapt=lora", f"init={pretrained}", "optimizer.lr=0.05", "trainer.max_steps=9")
    split = json.loads((folder / "split.json").read_text())["splits"][0]
    found = {part: Predictions.load(run / "predictions" / f"{part}.csv") for part in ("val", "test")}
    for part, predictions in found.items():
        assert predictions.subject.tolist() == sorted(split[part])
        assert predictions.classes == ["0", "1"]
    # The printed numbers are those of the files, with validation's threshold.
    threshold = choose_threshold(found["val"])
    assert summary["threshold"] == threshold
    for part, predictions in found.items():
        assert summary["scores"][part] == pytest.approx(scores(predictions, threshold))
    out = capsys.readouterr().out
    assert f"threshold {threshold:.4f} on p(1), from validation" in out
    assert "12 train, 6 val, 6 test" in out
    # The weights are those that validation chose, low-rank changes included.
    best = checkpoint.best(run / "checkpoints")
    assert best is not None
    assert best.name == f"step-{summary['best_step']:07d}"
    export(run, tmp_path / "best.safetensors", which="best")
    again = said_of(folder, tmp_path / "best.safetensors")
    np.testing.assert_allclose(again.scores, found["test"].scores, rtol=0, atol=1e-12)
    assert (summary["adapt"], summary["init"]) == ("lora", str(pretrained))
    assert summary["n"] == {"train": 12, "val": 6, "test": 6}


def test_a_regression_and_frames_are_reported_in_their_own_unit(folder: Path, tmp_path: Path) -> None:
    summary = tuned(folder, tmp_path / "a", "trainer.max_steps=3", "optimizer.lr=1e-5", task="synthetic_continuous")
    found = Predictions.load(tmp_path / "a" / "predictions" / "test.csv")
    # Hardly trained: every answer lies near the mean of the training labels, in their unit.
    assert np.abs(found.scores[:, 0] - summary["scaling"]["mean"]).max() < summary["scaling"]["std"]
    assert 60 < summary["scaling"]["mean"] < 140
    tuned(folder, tmp_path / "b", "trainer.max_steps=3", task="synthetic_frame")
    found = Predictions.load(tmp_path / "b" / "predictions" / "test.csv")
    assert found.per == "frame"
    assert len(found) == 6 * 24


def test_patience_ends_a_run(folder: Path, tmp_path: Path) -> None:
    still = ["trainer.val_every=1", "trainer.max_steps=50", "optimizer.lr=1e-12", "task.select=auroc"]
    summary = tuned(folder, tmp_path / "run", *still, "task.patience=2")
    assert summary["steps"] == 3
    assert summary["best_step"] <= 3


@pytest.mark.parametrize("adapt", ["lora", pytest.param("last_block", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_exactly(
    folder: Path, pretrained: Path, tmp_path: Path, adapt: str, stop_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = [f"task.adapt={adapt}", f"init={pretrained}", "model.dropout=0.1", "task.patience=9", "trainer.val_every=2"]
    tuned(folder, tmp_path / "whole", *own)
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        tuned(folder, tmp_path / "cut", *own)
    monkeypatch.undo()
    start(f"resume={tmp_path / 'cut'}")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    for part in ("val", "test"):
        files = [tmp_path / run / "predictions" / f"{part}.csv" for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


# --- what is taken from init= -------------------------------------------------------------------------------------
def module_of(folder: Path, *overrides: str) -> FinetuneModule:
    cfg = typed(composed(*task_command(folder, Path("nowhere-run"), "task=synthetic_binary", *overrides)))
    module = build_module(resolve(cfg))
    assert isinstance(module, FinetuneModule)
    return module


def test_the_encoder_is_taken_and_the_rest_is_named(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    export(pretrained, file)
    with torch.no_grad():
        wanted = dict(load(file).model.named_parameters())
    for source in (pretrained, file, pretrained / "checkpoints" / "step-0000002"):
        module = module_of(folder, f"init={source}", "task.adapt=linear")
        fresh = {name: value.clone() for name, value in module.model.head.named_parameters()}
        said = start_from(module, str(source))
        assert "encoder taken: " in said
        assert "left out there: decoder, mask_token; new here: head" in said
        for name, value in module.model.encoder.named_parameters():
            assert torch.equal(value, wanted[f"encoder.{name}"]), name
        for name, value in module.model.head.named_parameters():
            assert torch.equal(value, fresh[name]), name
        assert module.seen_before is not None
        assert len(module.seen_before) == 12


def test_other_clips_than_in_pre_training(folder: Path, pretrained: Path) -> None:
    module = module_of(folder, f"init={pretrained}", "task.adapt=full", "data.frames=5", "data.grid=[10,14,12]")
    start_from(module, str(pretrained))
    here = {"grid": [10, 14, 12], "frames": 5, "orientation": "RAS", "tr": [2.0, 3.0]}
    changed = ["grid [12, 12, 12] -> [10, 14, 12]", "frames 8 -> 5", "TR 2 to 2 s -> 2 to 3 s"]
    assert contract_differences(module.first_contract, here) == changed
    out = module.model(torch.randn(1, 1, 10, 14, 12, 5), torch.ones(1, 10, 14, 12, dtype=torch.bool))
    assert torch.isfinite(out).all()


def test_low_rank_changes_are_added_where_they_cannot_be_kept(folder: Path, low_rank: Path) -> None:
    low = module_of(folder, f"init={low_rank}", *LORA)
    assert "the whole model of the same task" in start_from(low, str(low_rank))
    full = module_of(folder, f"init={low_rank}", "task.adapt=full")
    assert "low-rank changes of 12 tensors added" in start_from(full, str(low_rank))
    x = torch.randn(1, 1, 12, 12, 12, 8)
    torch.testing.assert_close(low.eval().model.encoder(x)[-1], full.eval().model.encoder(x)[-1])


def merged_encoder(run: Path) -> SwinEncoder:
    """W + scale * B A of every map, from the tensors of the last checkpoint alone, in an encoder that knows no LoRA."""
    path = checkpoint.finished(run / "checkpoints")[0]
    manifest = checkpoint.Manifest.read(path)
    reader = checkpoint.Reader(path, manifest)
    raw = {name: reader.whole("weight", name).double() for name in manifest.shapes if ".encoder." in name}
    plain = {name: value for name, value in raw.items() if ".lora_" not in name}
    changed = 0
    for name in raw:
        if ".lora_A." not in name:
            continue
        down, up = raw[name], raw[name.replace(".lora_A.", ".lora_B.")]
        plain[name.replace(".lora_A.default.", ".base_layer.")] += 6 / 2 * up @ down
        changed += 1
    assert changed == 12
    cfg = load_frozen(run, [])
    encoder = SwinEncoder(cfg.model, cfg.data.grid, cfg.data.frames)
    stripped = {name.removeprefix("model.encoder.").replace(".base_layer.", "."): v for name, v in plain.items()}
    encoder.load_state_dict({name: value.float() for name, value in stripped.items()})
    return encoder


def test_the_embedding_of_a_low_rank_run_is_that_of_the_merged_weights(
    folder: Path, pretrained: Path, low_rank: Path, tmp_path: Path
) -> None:
    store = folder / "store"
    scan_ids = [scan.scan_id for scan in Store(store).scans[:2]]
    export(low_rank, tmp_path / "low.safetensors")
    found = []
    for number, model in enumerate((low_rank, tmp_path / "low.safetensors", pretrained)):
        scans = [f"{store}:{scan_id}" for scan_id in scan_ids]
        embed(model, *scans, "--out", tmp_path / f"{number}.npz", "--layer", "all", "--per", "clip")
        found.append(npz(tmp_path / f"{number}.npz"))
    run, file, before = found
    encoder = merged_encoder(low_rank)
    by_hand = [reference(encoder, store, place, (0, 8, 16)) for place in (0, 1)]
    for layer in ("stage1", "stage2"):
        wanted = np.concatenate([scan[layer].mean(1) for scan in by_hand])
        np.testing.assert_allclose(run[layer], wanted, rtol=0, atol=5e-6)
        np.testing.assert_array_equal(file[layer], run[layer])
        # The changes show: sixty times what is allowed for rounding.
        assert np.abs(run[layer] - before[layer]).max() > 3e-4


def test_swift_v1_weights(folder: Path, tmp_path: Path) -> None:
    state = v1_state() | {"output_head.weight": torch.zeros(2, 3)}
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "v1.ckpt")
    cfg = typed(composed(*task_command(folder, Path("nowhere-run"), "task=synthetic_binary")))
    grid, frames = list(CASE.grid), CASE.frames
    task = replace(cfg.task, adapt="linear")
    module = build_module(resolve(replace(cfg, model=CFG, task=task, data=replace(cfg.data, grid=grid, frames=frames))))
    said = start_from(module, str(tmp_path / "v1.ckpt"))
    assert "left out: model.output_head.weight" in said
    torch.testing.assert_close(module.model.encoder.patch_embed.proj.weight, state["patch_embed.fc.weight"])
    assert module.seen_before is None


def test_another_architecture_is_one_line(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"another architecture: \d+ tensors differ \(model\.encoder\..*; \.\.\.\)"
    ) as e:
        tuned(folder, tmp_path / "run", "task.adapt=full", f"init={pretrained}", "model.embed_dim=24")
    assert "\n" not in str(e.value)
    assert str(e.value).count(" there, ") == 5
    with pytest.raises(UserError, match="neither a file nor a run"):
        tuned(folder, tmp_path / "run", "task.adapt=full", "init=/nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_test_subject_that_pre_training_saw(folder: Path, tmp_path: Path) -> None:
    start(*command(folder / "store", tmp_path / "all", QUIET, "trainer.max_steps=1", "trainer.val_every=1"))
    with pytest.raises(UserError, match="6 test subjects were in pre-training: sub-"):
        tuned(folder, tmp_path / "run", "task.adapt=linear", f"init={tmp_path / 'all'}")
    summary = tuned(
        folder, tmp_path / "run", "task.adapt=linear", f"init={tmp_path / 'all'}", "task.allow_seen=true",
        "trainer.max_steps=1", "trainer.val_every=1",
    )  # fmt: skip
    assert summary["units"]["test"] == 6
    # Who starts from that run knows of all of them.
    module = module_of(folder, f"init={tmp_path / 'run'}", "task.adapt=linear")
    start_from(module, str(tmp_path / "run"))
    assert module.seen_before is not None
    assert len(module.seen_before) == 24


def test_random_frozen_features_are_possible_and_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "swift"):
        tuned(folder, tmp_path / "run", "task.adapt=linear", "trainer.max_steps=1", "trainer.val_every=1")
    assert "task.adapt=linear without init=: the encoder stays at its random weights" in caplog.text


def test_frozen_settings_of_a_task_come_back(folder: Path, tmp_path: Path) -> None:
    cfg = typed(composed(*task_command(folder, tmp_path, "task=task_rest")))
    freeze(cfg, tmp_path / "config.yaml")
    assert load_frozen(tmp_path, []) == cfg

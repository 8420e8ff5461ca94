"""Runs that go on, to the last bit, after Ctrl-C and with the same command; resume= and init=."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swift.config.compose import load_frozen
from swift.inference.export import export
from swift.parallel.setup import resolve
from swift.train.init_weights import start_from
from swift.train.pretrain import PretrainModule
from swift.train.wiring import build_module
from swift.utils.errors import UserError
from tests.runs import QUIET, assert_same_run, restarts, start, state_of, weights
from tests.small import command, metrics, settings

pytestmark = pytest.mark.usefixtures("alone")


# --- going on -----------------------------------------------------------------------------------------------------
DROPS = ["model.dropout=0.1", "model.drop_path=0.2"]


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        ([], 4),
        (["trainer.accumulate=2", "data.batch_size=2"], 3),
        (DROPS, 5),
        (["data.workers=1", "task.loss=smooth_l1", "model/variant=v1", "model.depths=[1,2]"], 3),
        (["model.maps=4"], 4),
        (["model.maps=4", "model.maps_of=shared"], 4),
    ],
    ids=["plain", "accumulate", "dropout", "worker", "maps of each scan", "shared maps"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    store: Path, tmp_path: Path, stop_at: Callable[[int], None], options: list[str], stop: int
) -> None:
    whole = command(store, tmp_path / "whole", QUIET, *options)
    start(*whole)
    parts = command(store, tmp_path / "parts", QUIET, *options)
    stop_at(stop)
    with pytest.raises(KeyboardInterrupt):
        start(*parts)
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert [record["step"] for record in metrics(tmp_path / "parts")][-1] == (stop if stop > 3 else 3)
    stop_at(100)
    start(f"resume={tmp_path / 'parts'}")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    a, b = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts"))
    assert a == b
    assert restarts(tmp_path / "parts") == [3]


def test_the_same_command_goes_on_and_a_finished_run_stays_as_it_is(
    store: Path, tmp_path: Path, stop_at: Callable[[int], None], finished: Path
) -> None:
    again = command(store, tmp_path / "run", QUIET)
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        start(*again)
    stop_at(100)
    start(*again)
    assert_same_run(finished, tmp_path / "run")
    # Steps 4 and 5 stand in the event files of both starts, and TensorBoard shows them once.
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in shown.Scalars("val/l1")] == [3, 6]
    losses = [record["train/loss"] for record in metrics(tmp_path / "run") if "train/loss" in record]
    assert [event.value for event in shown.Scalars("train/loss")] == pytest.approx(losses)
    before = weights(tmp_path / "run"), metrics(tmp_path / "run")
    # What the command leaves open is what the run has settled, not another setting.
    start(*again, "trainer.log_every=null")
    assert metrics(tmp_path / "run") == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in weights(tmp_path / "run").items())


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    store: Path, tmp_path: Path, stop_at: Callable[[int], None], finished: Path
) -> None:
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        start(*command(store, tmp_path / "run", QUIET))
    with pytest.raises(UserError, match="has no checkpoint yet; repeat its first command with run_dir="):
        start(f"resume={tmp_path / 'run'}")
    stop_at(100)
    start(*command(store, tmp_path / "run", QUIET))
    assert_same_run(finished, tmp_path / "run")


def test_the_last_checkpoint_is_the_last_also_when_validation_gets_worse(
    store: Path, tmp_path: Path, stop_at: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse_every_time(self: PretrainModule, batch: Any, batch_idx: int) -> None:
        self.log("val/l1", float(self.global_step))
        self.log("step", float(self.global_step))

    overrides = command(store, tmp_path / "run", QUIET, "trainer.val_every=1", "trainer.keep_checkpoints=1")
    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "validation_step", worse_every_time)
        stop_at(4)
        with pytest.raises(KeyboardInterrupt):
            start(*overrides)
    stop_at(100)
    start(*overrides)
    assert restarts(tmp_path / "run") == [4]


def test_a_longer_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    start(f"resume={tmp_path / 'run'}", "trainer.max_steps=8", "trainer.val_every=2")
    assert [record["step"] for record in metrics(tmp_path / "run") if "train/loss" in record] == list(range(1, 9))
    frozen = load_frozen(tmp_path / "run", [])
    assert (frozen.trainer.max_steps, frozen.trainer.val_every, frozen.resume) == (8, 2, None)
    assert frozen.run_dir == str(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 8
    assert restarts(tmp_path / "run") == [6]
    start(f"resume={tmp_path / 'run'}", "trainer.max_steps=9", QUIET)
    assert restarts(tmp_path / "run") == [6, 8]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.frames=6", "cannot go on exactly"),
        ("seed=1", "cannot go on exactly: the run had seed 0, now it is 1"),
        ("data.normalization=percent", "cannot go on exactly"),
        ("data.path=/nowhere/at/all", "/nowhere/at/all"),
        ("model.embed_dim=24", "keeps its model"),
        ("task.mask_ratio=1.5", "(0, 1)"),
        ("optimizer=adamw", "only single values"),
        ("trainer.max_steps=3", "trainer.max_steps=3: the run has done 6 steps already"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(finished: Path, tmp_path: Path, override: str, says: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = state_of(run_dir)
    with pytest.raises(UserError) as caught:
        start(f"resume={run_dir}", override)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    after = state_of(run_dir)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # What a start leaves that is no part of the run: an empty file of events, the time it was last alive.
    assert {name.split("/")[0] for name in changed} <= {"tensorboard", "heartbeats"}


def test_another_configuration_in_that_folder_is_refused(finished: Path, store: Path) -> None:
    before = state_of(finished)
    with pytest.raises(UserError, match=r"other settings \(optimizer\.lr, task\.mask_ratio\): choose another run_dir"):
        start(*command(store, finished, "optimizer.lr=1e-4", "task.mask_ratio=0.5"))
    assert state_of(finished) == before


def test_the_folder_may_be_spelt_otherwise(finished: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parent)
    before = metrics(finished)
    start(*command(store, Path("./run")), QUIET.replace("false", "true"))
    assert metrics(finished) == before


# --- init ---------------------------------------------------------------------------------------------------------
def test_init_takes_the_weights_of_a_run(
    finished: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights(finished)
    torch.save({"state_dict": expected, "epoch": 0}, tmp_path / "lightning.ckpt")
    torch.save(expected, tmp_path / "bare.pt")
    for source in (finished, tmp_path / "lightning.ckpt", tmp_path / "bare.pt"):
        module = build_module(resolve(settings("seed=5")))
        assert not torch.equal(module.model.mask_token, expected["model.mask_token"])
        assert start_from(module, str(source)) == f"{len(expected)} tensors taken"
        for name, value in module.state_dict().items():
            assert torch.equal(value, expected[name]), name
    # In a run: one step at a rate of nothing moves nothing; and a run that goes on does not start over.
    still = ["optimizer.lr=1e-30", "optimizer.weight_decay=0", "trainer.max_steps=1", "trainer.val_every=1", QUIET]
    overrides = command(store, tmp_path / "run", f"init={finished}", *still)
    with caplog.at_level("INFO", logger="swift"):
        start(*overrides)
        taken = f"init={finished}: {len(expected)} tensors taken"
        assert caplog.text.count(taken) == 1
        start(*overrides)
        assert caplog.text.count(taken) == 1
    assert torch.equal(weights(tmp_path / "run")["model.mask_token"], expected["model.mask_token"])


def test_init_takes_a_v1_file(tmp_path: Path) -> None:
    v1 = ["model/variant=v1", "model.depths=[1,2]", "model.patch_size=[4,4,4,2]", "model.window=[2,2,2,2]"]
    module = build_module(resolve(settings(*v1)))
    tensors = {"model.patch_embed.fc.bias": torch.full((12,), 3.0), "output_head.weight": torch.ones(2)}
    torch.save({"state_dict": tensors}, tmp_path / "v1.ckpt")
    report = start_from(module, str(tmp_path / "v1.ckpt"))
    assert report.startswith("SwiFT v1 import: 1 tensors matched, 1 left out")
    assert torch.all(module.model.encoder.patch_embed.proj.bias == 3)


def test_init_refuses_what_does_not_fit(finished: Path, tmp_path: Path) -> None:
    torch.save({"nothing": torch.ones(1)}, tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("not weights")
    (tmp_path / "empty").mkdir()
    exported = tmp_path / "exported.safetensors"
    export(finished, exported)
    start_from(
        build_module(resolve(settings("model.attention_base_width=12"))), str(finished)
    )  # its own width: the same scale
    for source, overrides, says in [
        (finished, ["model.decoder_dim=20"], "tensors differ (model.decoder"),
        (finished, ["model.depths=[1,1]"], "there, nothing here"),
        (finished, ["model.attention_base_width=6"], "trained with model.attention_base_width=null, which divides"),
        (exported, ["model.attention_base_width=6"], "give model.attention_base_width=null"),
        (finished, ["model.depths=[1,3]"], "is nothing there, "),
        (tmp_path / "foreign.ckpt", [], "is it a SwiFT v1 checkpoint?"),
        (tmp_path / "text.ckpt", [], "cannot be read as plain weights"),
        (tmp_path / "empty", [], "neither a file nor a run with a checkpoint"),
        (tmp_path / "gone.ckpt", [], "neither a file nor a run with a checkpoint"),
    ]:
        with pytest.raises(UserError) as caught:
            start_from(build_module(resolve(settings(*overrides))), str(source))
        assert str(caught.value).startswith(f"init={source}: ")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_another_folder(
    store: Path, tmp_path: Path, stop_at: Callable[[int], None], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of its store was typed relative to the first folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "small").symlink_to(store)
    again = command(Path("small"), Path("run"), QUIET)
    monkeypatch.chdir(tmp_path / "here")
    stop_at(4)
    with pytest.raises(KeyboardInterrupt):
        start(*again)
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        start(*again)  # the same words in the same folder are the same settings
    stop_at(100)
    monkeypatch.chdir(tmp_path / "there")
    start("resume=../here/run")
    assert load_frozen(tmp_path / "here" / "run", []).data.path == str(tmp_path / "here" / "small")
    assert_same_run(finished, tmp_path / "here" / "run")

"""Bad numbers in a training on one device: what is left out, what is recorded, and that it can be run again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy

import swift.train.wiring
from swift.data.store.reader import Store
from swift.train import replay
from swift.train.callbacks import incident
from swift.train.callbacks.guard import precision_of
from swift.utils import jsonl
from tests.cohort import cohort, task_command
from tests.distributed import plants
from tests.runs import QUIET, start, weights
from tests.small import command

pytestmark = [pytest.mark.usefixtures("alone")]

TRAINING = [
    "data.batch_size=2",
    "trainer.max_steps=8",
    "trainer.val_every=8",
    "trainer.val_batches=1",
    "guard.window=4",
]


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Any:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_float32_matmul_precision(before[1])


def record(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((incident.step_folder(run_dir, step) / incident.RECORD).read_text())


def batch_file(run_dir: Path, step: int, rank: int = 0) -> Path:
    return incident.step_folder(run_dir, step) / incident.batch_name(rank)


def recorded_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / incident.FOLDER).glob("step-*"))


@pytest.fixture(scope="module")
def troubled(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with NaN in a clip, NaN in a gradient, Inf in a clip, and a spike."""
    run_dir = tmp_path_factory.mktemp("troubled")
    torch.set_num_threads(1)
    found = plants.train(store, run_dir, TRAINING, [(3, 0, "nan"), (4, 0, "gradient"), (6, 0, "inf"), (7, 0, "spike")])
    return run_dir, found


def test_the_steps_are_left_out_as_in_a_loop_that_does_not_step_there(
    troubled: tuple[Path, dict[str, Any]], store: Path
) -> None:
    expected = plants.reference(store, TRAINING, 1, [3, 4, 6, 7])
    found = plants.checkpointed(troubled[0], list(expected["tensors"]))
    assert found["steps"] == expected["steps"] == 4
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


def test_records_name_what_and_where(troubled: tuple[Path, dict[str, Any]], store: Path) -> None:
    run_dir, seen = troubled
    assert recorded_steps(run_dir) == [3, 4, 6, 7]
    kinds = {step: record(run_dir, step)["what"] for step in (3, 4, 6, 7)}
    assert kinds == {3: "loss is not finite", 4: "gradient is not finite", 6: "loss is not finite", 7: "loss spike"}
    opened = Store(store)
    for step in (3, 6):
        (said,) = record(run_dir, step)["ranks"]
        clip = said["clips"][-1]
        planted, info = seen["planted"][step], opened.scans[seen["planted"][step]["scan"]]
        assert (clip["sample"], clip["scan"], clip["subject"]) == (planted["sample_id"], info.scan_id, info.subject)
        assert clip["shard"] == info.shard
        assert clip["frames"] == {"first": planted["start"], "last": planted["start"] + 7, "step": 1}
        assert (clip["values"]["nan"], clip["values"]["inf"]) == ((1, 0) if step == 3 else (0, 1))
        # The store is sound; what the model got was not what it has.
        assert (clip["checksum"], clip["voxels_unlike_the_store"]) == ("ok", 1)
        assert said["clips"][0]["voxels_unlike_the_store"] == 0
        assert said["first"]["layer"] == "model.encoder.patch_embed.proj"
    (said,) = record(run_dir, 4)["ranks"]
    assert (said["first"]["pass"], said["first"]["layer"]) == ("backward", plants.LAYER)
    assert record(run_dir, 7)["loss"] > record(run_dir, 7)["window"]["loss"]["limit"]


def test_log_and_metrics_have_a_line_each(troubled: tuple[Path, dict[str, Any]]) -> None:
    run_dir, seen = troubled
    lines = [line for line in jsonl.read(run_dir / "metrics.jsonl") if "guard/what" in line]
    assert [(line["step"], line["guard/left_out"]) for line in lines] == [(3, 1), (4, 2), (6, 3), (7, 4)]
    said = [line for line in seen["warnings"] if "left out" in line]
    assert len(said) == 4
    assert said[0].startswith("step 3 left out: loss is not finite (loss nan, gradient norm nan): rank 0, shard ")
    assert plants.LAYER in said[1]


def test_schedule_and_order_go_on(troubled: tuple[Path, dict[str, Any]], store: Path, tmp_path: Path) -> None:
    run_dir, seen = troubled
    clean = plants.train(store, tmp_path, [*TRAINING, "guard.action=off"], [])
    assert seen["samples"] == clean["samples"]

    def rates(folder: Path) -> list[float]:
        return [line["train/lr"] for line in jsonl.read(folder / "metrics.jsonl") if "train/lr" in line]

    assert rates(run_dir) == rates(tmp_path)


@pytest.mark.parametrize("step", [3, 4, 6, 7])
def test_replay_gives_the_same_loss_and_names_the_same_layer(
    troubled: tuple[Path, dict[str, Any]],
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = swift.train.wiring.build_module

    def sabotaged(cfg: Any) -> Any:
        module = build(cfg)
        plants.sabotage(module)
        return module

    monkeypatch.setattr(swift.train.wiring, "build_module", sabotaged)
    run_dir, seen = troubled
    done = replay.replay(batch_file(run_dir, step))
    assert done.exact
    assert done.same
    loss = float(done.loss)
    assert loss == pytest.approx(seen["losses"][step], rel=0, abs=0, nan_ok=True)
    said = record(run_dir, step)["ranks"][0]["first"]
    assert (done.first is None) == (said is None) == (step == 7)
    if done.first:
        assert [done.first[key] for key in ("pass", "layer", "what")] == [
            said[key] for key in ("pass", "layer", "what")
        ]
    replay.main([str(batch_file(run_dir, step))])
    printed = capsys.readouterr().out
    assert f"step {step}, rank 0 of 1" in printed
    assert ": the same" in printed


def test_a_batch_comes_back_bit_for_bit_and_lies_in_memory_as_it_did(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    brain = torch.rand(2, 3, 4, 5, generator=draw) > 0.5
    frames = torch.where(brain[:, None], torch.randn(2, 6, 3, 4, 5, generator=draw), torch.tensor(-0.5))
    whole = frames.permute(0, 2, 3, 4, 1).unsqueeze(1)
    uneven = whole.clone(memory_format=torch.preserve_format)
    uneven[0, 0, 0, 0, 0, 0] = float("nan")
    uneven[1, 0, 2, 3, 4, 5] = 3.0
    for bold in (whole, uneven):
        batch = {"bold": bold, "brain": brain, "sample_id": torch.arange(2), "name": "x"}
        incident.write_batch(tmp_path / "b.safetensors", batch, torch.tensor(float("inf")), {"frames": 6})
        back, loss, facts = incident.read_batch(tmp_path / "b.safetensors")
        assert back["bold"].stride() == bold.stride()
        assert torch.equal(back["bold"].view(torch.int32), bold.view(torch.int32))
        assert torch.equal(back["brain"], brain)
        assert back["name"] == "x"
        assert (float(loss), facts) == (float("inf"), {"frames": 6})
    assert (tmp_path / "b.safetensors").stat().st_size > 0


@pytest.mark.parametrize("kind", ["none", "text", "foreign", "folder"])
def test_replay_ends_with_one_line_for_what_is_no_kept_batch(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.safetensors"
    if kind == "text":
        path.write_text("no tensors")
    elif kind == "foreign":
        save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(SystemExit) as stopped:
        replay.main([str(path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}")
    assert message.count("\n") == 1


def test_replay_says_that_weights_are_gone_or_not_those_of_the_step(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TRAINING, "guard.weights_mb=0", "trainer.max_steps=3", "trainer.checkpoint_every=1"]
    # In the background the checkpoint of step 2 may not be whole yet when the guard names the one before step 3.
    settings += ["trainer.keep_checkpoints=9", "trainer.checkpoint_background=false"]
    plants.train(store, tmp_path, settings, [(3, 0, "nan")])
    path = batch_file(tmp_path, 3)
    done = replay.replay(path)
    assert not done.exact
    # The step before was saved: by luck these are the weights of the step.
    assert done.weights.endswith("step-0000002")
    for saved in (tmp_path / "checkpoints").glob("step-*"):
        saved.rename(tmp_path / saved.name)
    with pytest.raises(SystemExit):
        replay.main([str(path)])
    assert "--weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        replay.main([str(path), "--weights", str(tmp_path / "nothing")])
    assert capsys.readouterr().err.startswith("error: weights ")
    assert replay.replay(path, tmp_path / "step-0000002").same


def test_a_task_with_a_target_is_guarded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cohort(tmp_path)
    original = swift.train.wiring.build_callbacks
    planted = plants.Plants([(2, 0, "nan")])
    monkeypatch.setattr(swift.train.wiring, "build_callbacks", lambda *args: [planted, *original(*args)])
    run_dir = tmp_path / "run"
    start(*task_command(folder, run_dir, "task=age", "trainer.max_steps=3", "trainer.accelerator=cpu"))
    (said,) = record(run_dir, 2)["ranks"]
    assert said["clips"][-1]["sample"] == planted.seen[2]["sample_id"]
    done = replay.replay(batch_file(run_dir, 2))
    assert done.exact
    assert done.same
    assert done.first["layer"] == said["first"]["layer"] == "model.encoder.patch_embed.proj"


def test_a_scans_own_maps_are_made_again_for_a_replay(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept batch does not hold them."""
    original = swift.train.wiring.build_callbacks
    planted = plants.Plants([(2, 0, "nan")])
    monkeypatch.setattr(swift.train.wiring, "build_callbacks", lambda *args: [planted, *original(*args)])
    start(*command(store, tmp_path / "run", QUIET, "model.maps=2", "trainer.max_steps=3", "trainer.accelerator=cpu"))
    done = replay.replay(batch_file(tmp_path / "run", 2))
    assert done.exact
    assert done.same


def test_a_bad_weight_ends_the_run_as_leaving_out_cannot_help(store: Path, tmp_path: Path) -> None:
    found = plants.train(store, tmp_path, TRAINING, [(4, 0, "weight")])
    assert found["error"].startswith(f"step 4: weight {plants.WEIGHT} has 1 values that are not finite")
    assert record(tmp_path, 4)["bad_weights"] == {plants.WEIGHT: 1}
    assert record(tmp_path, 4)["ranks"][0]["first"]["layer"] == plants.WEIGHT.removesuffix(".weight")


@pytest.mark.slow
def test_a_real_run_raises_no_alarm(store: Path, tmp_path: Path) -> None:
    settings = [
        "trainer.max_steps=1000",
        "trainer.val_every=1000",
        "trainer.val_batches=1",
        "trainer.log_every=100",
        "optimizer.warmup_steps=20",
    ]
    found = plants.train(store, tmp_path, settings, [])
    assert len(found["losses"]) == 1000
    assert not (tmp_path / incident.FOLDER).exists()
    assert not any("guard/what" in line for line in jsonl.read(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("kind", ["weight", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("nan", "spike"))])
def test_rollback_goes_on_from_the_last_good_checkpoint(kind: str, store: Path, tmp_path: Path) -> None:
    settings = [*TRAINING, "guard.action=rollback", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9"]
    found = plants.train(store, tmp_path / "a", settings, [(6, 0, kind)])
    assert found["error"] is None
    assert found["bad_weights"] == {}
    assert sorted(found["losses"]) == list(range(1, 9))
    assert any("those of step-0000004 again" in line for line in found["warnings"])
    # As a loop that takes neither the step after the checkpoint nor the bad one.
    expected = plants.reference(store, settings, 1, [5, 6])
    saved = plants.checkpointed(tmp_path / "a", list(expected["tensors"]))
    assert saved["steps"] == expected["steps"]
    for name, tensor in expected["tensors"].items():
        assert torch.equal(saved["tensors"][name], tensor), name


def test_rollback_without_a_checkpoint_and_stop_end_the_run(store: Path, tmp_path: Path) -> None:
    found = plants.train(store, tmp_path / "a", [*TRAINING, "guard.action=rollback"], [(2, 0, "nan")])
    assert "nothing to go back to" in found["error"]
    found = plants.train(store, tmp_path / "b", [*TRAINING, "guard.action=stop"], [(2, 0, "nan")])
    assert found["error"].startswith("step 2: loss is not finite, and guard.action=stop")


def test_a_verdict_read_a_step_late_is_answered_as_one_read_at_once(store: Path, tmp_path: Path) -> None:
    """Of a step that is logged the verdict is read at its end, else when the gradients of the next step are there."""
    trouble = [(2, 0, "nan"), (3, 0, "gradient"), (5, 0, "gradient"), (7, 0, "spike")]
    settings = [*TRAINING, "trainer.accumulate=2", "trainer.checkpoint_every=5"]
    made = []
    for every in (1, 100):
        run_dir = tmp_path / str(every)
        found = plants.train(store, run_dir, [*settings, f"trainer.log_every={every}"], trouble)
        assert (found["error"], recorded_steps(run_dir)) == (None, [2, 3, 5, 7])
        lines = [line for line in jsonl.read(run_dir / "metrics.jsonl") if "guard/what" in line]
        told = [{name: value for name, value in line.items() if name != "time"} for line in lines]
        made.append([found["losses"], *(record(run_dir, step) for step in recorded_steps(run_dir)), *told])
    for at_once, late in zip(*made, strict=True):
        assert json.dumps(at_once) == json.dumps(late)  # as text, in which NaN is NaN
    left, right = weights(tmp_path / "1"), weights(tmp_path / "100")
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_too_many_bad_steps_in_a_row_end_the_run_and_files_are_few(store: Path, tmp_path: Path) -> None:
    settings = [*TRAINING, "guard.limit=4", "guard.records=2", "guard.batches=1"]
    found = plants.train(store, tmp_path, settings, [(step, 0, "nan") for step in (2, 4, 5, 6, 7)])
    assert found["error"].startswith("step 7: 4 bad steps in a row (guard.limit=4)")
    assert recorded_steps(tmp_path) == [2, 4]
    assert batch_file(tmp_path, 2).exists()
    assert not batch_file(tmp_path, 4).exists()


def test_a_resumed_run_decides_as_one_that_was_not_interrupted(store: Path, tmp_path: Path) -> None:
    settings = [*TRAINING, "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9"]
    trouble = [(4, 0, "spike"), (5, 0, "spike"), (7, 0, "spike")]
    whole = plants.train(store, tmp_path / "a", settings, trouble)
    kinds = [line["guard/what"] for line in jsonl.read(tmp_path / "a/metrics.jsonl") if "guard/what" in line]
    assert kinds == ["loss spike"] * 3
    first = plants.train(store, tmp_path / "b", settings, trouble[:1])
    assert first["error"] is None
    for path in (tmp_path / "b/checkpoints").glob("step-*"):
        if path.name > "step-0000004":
            path.rename(tmp_path / path.name)
    second = plants.train(store, tmp_path / "b", settings, trouble)
    assert sorted(second["losses"]) == [5, 6, 7, 8]
    assert second["losses"] == {step: whole["losses"][step] for step in second["losses"]}
    left, right = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_micro_batches_that_are_not_held_are_read_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swift.train.callbacks.guard.HELD_BYTES", 0)
    settings = [*TRAINING, "trainer.accumulate=2", "trainer.max_steps=3", "data.augment.intensity=1.0"]
    found = plants.train(store, tmp_path, settings, [(2, 0, "nan")])
    (said,) = record(tmp_path, 2)["ranks"]
    # The store's clip is clean: the trouble was in memory, and what is read again cannot show it.
    assert (said["micro_batch"], said["read_again"], said["first"]) == (1, True, None)
    assert said["clips"][-1]["voxels_unlike_the_store"] == 0
    expected = plants.reference(store, settings, 1, [2])
    saved = plants.checkpointed(tmp_path, list(expected["tensors"]))
    assert found["error"] is None
    assert saved["steps"] == expected["steps"] == 2
    for name, tensor in expected["tensors"].items():
        torch.testing.assert_close(saved["tensors"][name], tensor, rtol=1e-5, atol=1e-7)


def test_fully_shard_in_bf16_is_recorded_as_what_it_is() -> None:
    for policy, told in ((torch.bfloat16, "bf16-mixed"), (None, "32-true")):
        strategy = SimpleNamespace(mixed=MixedPrecisionPolicy(param_dtype=policy))
        assert precision_of(SimpleNamespace(strategy=strategy, precision="32-true")) == told  # type: ignore[arg-type]
    assert precision_of(SimpleNamespace(strategy=object(), precision="bf16-mixed")) == "bf16-mixed"  # type: ignore[arg-type]

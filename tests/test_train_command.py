"""`python -m swift.train`, in process where that will do: what a run leaves, going on, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

import swift.build
from swift.build import build_module, start_from
from swift.config.compose import load_frozen, typed
from swift.modules.pretrain import PretrainModule
from swift.train import run, train, write_summary
from swift.utils.errors import UserError
from tests.small import command, composed, metrics, settings

ROOT = Path(swift.build.__file__).resolve().parents[1]
QUIET = "trainer.figures=false"


@pytest.fixture(autouse=True)
def one_thread_and_ctrl_c() -> Iterator[None]:
    """One thread, and Ctrl-C as before: Lightning ignores it after the first."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


def start(*overrides: str) -> None:
    """What the command does once Hydra has composed."""
    run(composed(*overrides), list(overrides), [])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    module = build_module(load_frozen(run_dir, []))
    start_from(module, str(run_dir))
    return module.state_dict()


def restarts(run_dir: Path) -> list[int]:
    """The steps at which the run went on."""
    content = json.loads((run_dir / "provenance.json").read_text())
    return [restart["step"] for restart in content["restarts"]]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights and metrics are equal to the last bit."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert metrics(a) == metrics(b)


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class StopAt(pl.Callback):
    """Ctrl-C while optimizer step `step` + 1 is under way."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the runs of this test stop in the step after this one."""
    original = swift.build.build_callbacks

    def stop(step: int) -> None:
        def build(*args: Any) -> list[pl.Callback]:
            return [*original(*args), StopAt(step)]

        monkeypatch.setattr(swift.build, "build_callbacks", build)

    return stop


# --- what a run leaves --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps; read only."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    torch.set_num_threads(1)
    start(*command(store, run_dir))
    return run_dir


def test_a_run_directory_holds_what_the_design_says(finished: Path, store: Path) -> None:
    files = {path.split(".tfevents")[0] for path in state_of(finished)}
    assert files >= {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "summary.json",
        "figures/loss.png",
        "figures/reconstruction.png",
        "figures/reconstruction.npz",
        "tensorboard/events.out",
    }
    assert any(path.startswith("checkpoints/") for path in files)
    assert load_frozen(finished, []) == typed(composed(*command(store, finished)))
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["overrides"] == command(store, finished)
    assert restarts(finished) == []
    for name in ("loss.png", "reconstruction.png"):
        assert (finished / "figures" / name).stat().st_size > 10_000


def test_metrics_have_steps_and_validations(finished: Path) -> None:
    records = metrics(finished)
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "val/l1" in record] == [3, 6]
    for record in records:
        wanted = {"val/loss", "val/l1"} if "val/l1" in record else {"train/loss", "train/lr", "train/grad_norm"}
        assert wanted <= record.keys()
        assert all(np.isfinite(record[key]) for key in wanted)


def test_the_summary_says_what_the_last_validation_says(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["model"] == "tiny"
    assert summary["parameters"] == sum(p.numel() for p in build_module(settings()).parameters())
    last = [record for record in metrics(finished) if "val/l1" in record][-1]
    assert summary["val_l1"] == pytest.approx(last["val/l1"], rel=1e-6)
    assert summary["beats"] == [name for name, value in summary["baselines"].items() if summary["val_l1"] < value]
    assert len(summary["baselines"]) == 4
    # Two scans, and of the last fifth of each two clips.
    assert summary["clips"] == 4


def test_the_printed_table_is_sorted_and_plain(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(*command(store, tmp_path / "run", QUIET, "trainer.max_steps=1"))
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert lines[0] == "held-out masked-voxel L1 after 1 steps, 4 clips (lower is better)"
    table = [line.replace("<- this run", "").split() for line in lines[1:6]]
    values = [float(row[-1]) for row in table]
    assert values == sorted(values)
    assert [line for line in lines if "<- this run" in line] == [line for line in lines if "model tiny" in line]
    assert {round(value, 4) for value in (*summary["baselines"].values(), summary["val_l1"])} == set(values)
    said = next(line for line in lines if line.startswith("beats: "))
    assert said == "beats: " + (", ".join(summary["beats"]) or "none of the baselines")
    assert lines[-1] == f"figures and checkpoints: {tmp_path / 'run'}"


def test_the_loss_falls_and_the_model_beats_the_mean(store: Path, tmp_path: Path) -> None:
    fast = ["trainer.max_steps=60", "trainer.val_every=30", "optimizer.lr=5e-3", "data.batch_size=2", QUIET]
    summary = train(typed(composed(*command(store, tmp_path / "run", *fast, "task.mask_ratio=0.5"))))
    losses = [record["train/loss"] for record in metrics(tmp_path / "run") if "train/loss" in record]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.97 * np.mean(losses[:5])
    assert "brain mean" in summary["beats"]


def test_a_diverged_run_is_said_in_strict_json(tmp_path: Path) -> None:
    summary = {"val_l1": float("nan"), "baselines": {"brain mean": 0.5, "other": float("nan")}, "steps": 3}
    write_summary(summary, tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"bare {name} in summary.json")

    content = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert content == {"val_l1": "NaN", "baselines": {"brain mean": 0.5, "other": "NaN"}, "steps": 3}


# --- going on -----------------------------------------------------------------------------------------------------
DROPS = ["model.dropout=0.1", "model.drop_path=0.2"]


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        ([], 4),
        (["trainer.accumulate=2", "data.batch_size=2"], 3),
        (DROPS, 5),
        (["data.workers=1", "task.loss=smooth_l1", "model/variant=v1", "model.depths=[1,2]"], 3),
    ],
    ids=["plain", "accumulate", "dropout", "worker"],
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
    again = command(store, tmp_path / "run")
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        start(*again)
    stop_at(100)
    start(*again)
    assert_same_run(finished, tmp_path / "run")
    before = weights(tmp_path / "run"), metrics(tmp_path / "run")
    start(*again)
    assert metrics(tmp_path / "run") == before[1]
    assert all(torch.equal(value, before[0][name]) for name, value in weights(tmp_path / "run").items())


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    store: Path, tmp_path: Path, stop_at: Callable[[int], None], finished: Path
) -> None:
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        start(*command(store, tmp_path / "run"))
    with pytest.raises(UserError, match="has no checkpoint yet; repeat its first command with run_dir="):
        start(f"resume={tmp_path / 'run'}")
    stop_at(100)
    start(*command(store, tmp_path / "run"))
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
        module = build_module(settings("seed=5"))
        assert not torch.equal(module.model.mask_token, expected["model.mask_token"])
        assert start_from(module, str(source)) == f"{len(expected)} tensors taken"
        for name, value in module.state_dict().items():
            assert torch.equal(value, expected[name]), name
    # In a run: one step at a rate of nothing moves nothing; and a run that goes on does not start over.
    still = ["optimizer.lr=1e-30", "optimizer.weight_decay=0", "trainer.max_steps=1", "trainer.val_every=1", QUIET]
    overrides = command(store, tmp_path / "run", f"init={finished}", *still)
    with caplog.at_level("INFO", logger="swift"):
        start(*overrides)
        assert caplog.text.count(f"init={finished}: ") == 1
        start(*overrides)
        assert caplog.text.count(f"init={finished}: ") == 1
    assert torch.equal(weights(tmp_path / "run")["model.mask_token"], expected["model.mask_token"])


def test_init_takes_a_v1_file(tmp_path: Path) -> None:
    v1 = ["model/variant=v1", "model.depths=[1,2]", "model.patch_size=[4,4,4,2]", "model.window=[2,2,2,2]"]
    module = build_module(settings(*v1))
    tensors = {"model.patch_embed.fc.bias": torch.full((12,), 3.0), "output_head.weight": torch.ones(2)}
    torch.save({"state_dict": tensors}, tmp_path / "v1.ckpt")
    report = start_from(module, str(tmp_path / "v1.ckpt"))
    assert report.startswith("SwiFT v1 import: 1 tensors matched, 1 left out")
    assert torch.all(module.model.encoder.patch_embed.proj.bias == 3)


def test_init_refuses_what_does_not_fit(finished: Path, tmp_path: Path) -> None:
    torch.save({"nothing": torch.ones(1)}, tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("not weights")
    (tmp_path / "empty").mkdir()
    for source, overrides, says in [
        (finished, ["model.decoder_dim=20"], "tensors differ (model.decoder"),
        (finished, ["model.depths=[1,1]"], "there, nothing here"),
        (finished, ["model.depths=[1,3]"], "is nothing there, "),
        (tmp_path / "foreign.ckpt", [], "is it a SwiFT v1 checkpoint?"),
        (tmp_path / "text.ckpt", [], "cannot be read as plain weights"),
        (tmp_path / "empty", [], "neither a file nor a run with a checkpoint"),
        (tmp_path / "gone.ckpt", [], "neither a file nor a run with a checkpoint"),
    ]:
        with pytest.raises(UserError) as caught:
            start_from(build_module(settings(*overrides)), str(source))
        assert str(caught.value).startswith(f"init={source}: ")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


# --- refused before anything starts -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task.mask_ratio=1.2"], r"task\.mask_ratio=1\.2: must lie inside \(0, 1\)"),
        (["task.mask_unit=[6,4,4,2]"], r"task\.mask_unit=\[6, 4, 4, 2\]: must be a multiple of model\.patch_size"),
        (["model.depths=[1,1,1,1]", "model.num_heads=[1,1,1,1]"], "down to one token before stage 4 of 4"),
        (["model.patch_size=[16,4,4,2]"], "must not be larger than a clip"),
        (["model.window=[2,2,2]"], r"model\.window=\[2, 2, 2\]"),
        (["data.grid=[24,24,24]"], r"data\.grid=\[24, 24, 24\].*has grid \[12, 12, 12\]"),
        (["data.frames=60"], "fewer than a clip"),
        (["data.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["+model.foo=1"], "no such setting"),
        (["init=/nowhere"], "init=/nowhere: neither a file nor a run with a checkpoint"),
        (["parallel=ddp", "parallel.nodes=2"], "parallel.nodes=2"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(store: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        start(*command(store, tmp_path / "run", *overrides))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_cannot_be_made(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"^run_dir={path} cannot be written"):
            start(*command(store, path, "data.path=/is/looked/at/later"))
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^trainer\.accelerator=gpu: torch sees no GPU here"):
        start(*command(store, tmp_path / "run", "trainer.accelerator=gpu"))


def test_a_model_larger_than_the_machine(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 8 * 2**30}))
    big = ["model=806m", "model.patch_size=[2,2,2,2]"]
    with pytest.raises(UserError, match=r"^model=806m needs \d\d GiB .* this machine has 8 GiB"):
        start(*(override for override in command(store, tmp_path / "run") if "model." not in override), *big)
    assert list(tmp_path.iterdir()) == []


# --- the command line itself --------------------------------------------------------------------------------------
def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m swift.train` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "swift.train", *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SWIFT_", "SLURM_"))}
    return outside | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_help_says_what_can_be_typed(tmp_path: Path) -> None:
    done = shell(tmp_path, "model=51m", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for row in (
        "python -m swift.train resume=RUN_DIR go on exactly where a run stopped",
        "model= 14b5, 1b2, 202m, 3b, 4b1, 51m, 7m, 806m, 8b8, tiny, v1",
        "model/variant= factorized, joint, v1",
        "parallel= ddp, fsdp, single, zero1, zero2, zero3, zero3_offload",
        "model.embed_dim=96 Width E of stage 1; stages have E, 2E, 4E, 8E.",
        "task.mask_ratio=0.8 Part of the mask units that is hidden, inside (0, 1).",
        "resume=null Run to go on with, exactly where it stopped.",
    ):
        assert row in rows
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "_common" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=51n"], ["Could not find 'model/51n'", "51m", "tiny"]),
        (["modle=51m"], ["Could not override 'modle'", "+modle=51m"]),
        (["task.mask_ration=0.5"], ["Could not override 'task.mask_ration'", "Key 'mask_ration' is not in struct"]),
        (["task.mask_ratio=1.2"], ["error: task.mask_ratio=1.2: must lie inside (0, 1)"]),
        (["task.mask_ratio"], ["Error parsing override 'task.mask_ratio'"]),
        (["model=51"], ["Config group override must be a string"]),
        (["model=51n", "--help"], ["Could not find 'model/51n'", "51m", "tiny"]),
        (["data.path=${nowhere}"], ["error: data.path: Interpolation key 'nowhere' not found"]),
        (["--nonsense"], ["unrecognized arguments: --nonsense"]),
        (["resume=nowhere"], ["error: nowhere is not a run directory: it has no config.yaml"]),
    ],
    ids=" ".join,
)
def test_a_mistyped_command_ends_with_2_and_no_traceback(tmp_path: Path, arguments: list[str], says: list[str]) -> None:
    done = shell(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    for part in says:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert ".py" not in done.stderr.replace("usage: train.py", "").replace("train.py: error", "")
    if done.stderr.startswith("error: "):
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(store: Path, tmp_path: Path, finished: Path) -> None:
    """kill -9 in the middle of step 5, then the same command on the command line."""
    again = command(store, tmp_path / "run")
    killer = (
        "import os, signal, sys; import swift.build; import lightning.pytorch as pl\n"
        "from swift.train import main\n"
        "class Kill(pl.Callback):\n"
        "    def on_before_optimizer_step(self, trainer, *args):\n"
        "        if trainer.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build = swift.build.build_callbacks\n"
        "swift.build.build_callbacks = lambda *args: [*build(*args), Kill()]\n"
        "main()\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", killer, *again], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 3, 4]
    done = shell(tmp_path, *again)
    assert done.returncode == 0, done.stderr
    # The lines of swift's own log reach the terminal, whatever Hydra does to logging.
    assert f"pretrain: model tiny, 29,072 parameters, run directory {tmp_path / 'run'}" in done.stderr
    assert "training from step 3 to step 6" in done.stderr
    assert "Warning" not in done.stderr
    assert "held-out masked-voxel L1 after 6 steps" in done.stdout
    assert restarts(tmp_path / "run") == [3]
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_is_130_and_says_how_to_go_on(store: Path, tmp_path: Path) -> None:
    endless = command(store, tmp_path / "run", "trainer.max_steps=1000000")
    process = subprocess.Popen(
        [sys.executable, "-m", "swift.train", *endless],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        said += process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert f"resume={tmp_path / 'run'}" in said
    assert said.rstrip().endswith("stopped")
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_sweep_makes_a_run_for_each_value(store: Path, tmp_path: Path) -> None:
    each = [part for part in command(store, Path("ignored"), QUIET, "trainer.max_steps=1") if "run_dir" not in part]
    done = shell(tmp_path, "-m", *each, "task.mask_ratio=0.4,0.6", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    for number, ratio in enumerate((0.4, 0.6)):
        run_dir = tmp_path / "sweep" / str(number)
        cfg = load_frozen(run_dir, [])
        assert (cfg.task.mask_ratio, cfg.run_dir) == (ratio, str(run_dir))
        assert (run_dir / "summary.json").exists()
    wrong = shell(tmp_path, "-m", *each, "task.mask_ratio=0.4,1.6", "hydra.sweep.dir=other")
    assert wrong.returncode == 2
    assert "error: task.mask_ratio=1.6" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_launcher_never_trains_here(tmp_path: Path) -> None:
    done = shell(tmp_path, "model=3b", "parallel=zero1", "+launcher=frontier")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: launcher=frontier: no account")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

"""`python -m swift.train`, in process where that will do: what a run leaves, what it refuses, and the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

import swift.train.wiring
from swift.config.compose import load_frozen, typed
from swift.data.store.writer import StoreWriter
from swift.parallel.ranks import Place
from swift.parallel.setup import resolve
from swift.train.__main__ import run
from swift.train.callbacks.signals import Heartbeat
from swift.train.run import train, write_summary
from swift.train.wiring import build_module
from swift.utils import jsonl
from swift.utils.errors import UserError
from tests.data import stores
from tests.forked import Forked, as_command
from tests.runs import QUIET, assert_same_run, environment, restarts, shell, shell_from_nothing, start, state_of
from tests.small import command, composed, metrics, settings

pytestmark = pytest.mark.usefixtures("alone")


# --- what a run leaves --------------------------------------------------------------------------------------------
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
    frozen, asked = load_frozen(finished, []), typed(composed(*command(store, finished)))
    assert asked.parallel.compile is None
    assert frozen == replace(asked, parallel=replace(asked.parallel, compile=False))
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
    stalls = [line for line in jsonl.read(finished / "metrics.jsonl") if "perf/save_stall_seconds" in line]
    assert [line["step"] for line in stalls] == [3, 6]
    assert all(line["perf/save_stall_seconds"] > 0 for line in stalls)


def test_the_summary_says_what_the_last_validation_says(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["model"] == "tiny"
    assert summary["parameters"] == sum(p.numel() for p in build_module(resolve(settings())).parameters())
    last = [record for record in metrics(finished) if "val/l1" in record][-1]
    assert summary["val_l1"] == pytest.approx(last["val/l1"], rel=1e-6)
    assert summary["beats"] == [name for name, value in summary["baselines"].items() if summary["val_l1"] < value]
    assert len(summary["baselines"]) == 7
    assert any("rank" in note for note in summary["baseline_notes"])
    # Two scans, and of the last fifth of each two clips.
    assert summary["clips"] == 4


def test_the_final_judgement_gives_signs_of_life(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a batch of held-out clips: a job that judges for long is not taken for one that hangs."""
    signs: list[int] = []
    monkeypatch.setattr(Heartbeat, "judging", lambda self, trainer: signs.append(trainer.global_step))
    start(*command(store, tmp_path / "run", QUIET, "trainer.max_steps=1"))
    assert signs == [1] * json.loads((tmp_path / "run" / "summary.json").read_text())["clips"]


def test_the_printed_table_is_sorted_and_plain(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(*command(store, tmp_path / "run", QUIET, "trainer.max_steps=1"))
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert lines[0] == "held-out masked-voxel L1 after 1 steps, 4 clips (lower is better)"
    table = [line.replace("<- this run", "").split() for line in lines[1:9]]
    values = [float(row[-1]) for row in table]
    assert values == sorted(values)
    assert [line for line in lines if "<- this run" in line] == [line for line in lines if "model tiny" in line]
    assert {round(value, 4) for value in (*summary["baselines"].values(), summary["val_l1"])} == set(values)
    said = next(line for line in lines if line.startswith("beats: "))
    assert said == "beats: " + (", ".join(summary["beats"]) or "none of the baselines")
    assert lines[-1] == f"figures and checkpoints: {tmp_path / 'run'}"


def test_one_step_without_a_logged_loss_still_ends_in_the_table(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    rare = ["trainer.max_steps=1", "trainer.log_every=5", "trainer.val_every=5", "trainer.figures=true"]
    start(*command(store, run, *rare))
    assert capsys.readouterr().out.startswith("held-out masked-voxel L1 after 1 steps")
    assert sorted(path.name for path in (run / "figures").glob("*.png")) == ["reconstruction.png"]


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
    with pytest.raises(UserError, match=r"^model=806m parallel=single: .* need \d\d GiB .* this machine has 8 GiB"):
        start(*(override for override in command(store, tmp_path / "run") if "model." not in override), *big)
    assert list(tmp_path.iterdir()) == []


# --- the command line itself --------------------------------------------------------------------------------------
def test_help_says_what_can_be_typed(tmp_path: Path) -> None:
    done = shell_from_nothing(tmp_path, "model=51m", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for row in (
        "python -m swift.train resume=RUN_DIR go on exactly where a run stopped",
        "model= 130b, 14b5, 1b2, 202m, 3b, 4b1, 51m, 7m, 806m, 8b8, tiny, v1",
        "model/variant= factorized, joint, v1",
        "parallel= ddp, fsdp, hsdp, single, zero1, zero2, zero3, zero3_offload",
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
        (["model=51n"], ["error: model=51n: no such choice; did you mean model=51m?", "tiny"]),
        (["modle=51m"], ["error: no setting modle; did you mean model?"]),
        (["task.mask_ration=0.5"], ["error: no setting task.mask_ration; did you mean task.mask_ratio?"]),
        (["task.mask_ratio=1.2"], ["error: task.mask_ratio=1.2: must lie inside (0, 1)"]),
        (["task.mask_ratio"], ["error: 'task.mask_ratio' is no setting: settings are NAME=VALUE"]),
        (["model=51"], ["error: model=51: no such choice; did you mean model=51m?"]),
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
    assert ".py" not in done.stderr
    if done.stderr.startswith("error: "):
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def dies_in_step_5(overrides: list[str]) -> None:
    """The command, which kills itself before the optimizer has stepped."""

    class Kill(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.global_step == 4:
                trainer.strategy.saver.finish()  # type: ignore[attr-defined]  # a busy machine may still be writing step 3
                os.kill(os.getpid(), signal.SIGKILL)

    build = swift.train.wiring.build_callbacks
    swift.train.wiring.build_callbacks = lambda *args: [*build(*args), Kill()]
    as_command("swift.train", *overrides)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(store: Path, tmp_path: Path, finished: Path) -> None:
    """kill -9 in the middle of step 5, then the same command on the command line."""
    again = command(store, tmp_path / "run", QUIET)
    killed = Forked(dies_in_step_5, again, cwd=tmp_path, env=environment())
    assert killed.wait() == -signal.SIGKILL
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 3, 4]
    done = shell_from_nothing(tmp_path, *again)
    assert done.returncode == 0, done.stderr
    # The lines of swift's own log reach the terminal, whatever Hydra does to logging.
    assert f"pretrain: model tiny, 29,072 parameters, run directory {tmp_path / 'run'}" in done.stderr
    assert "training from step 3 to step 6" in done.stderr
    assert "Warning" not in done.stderr
    assert "held-out masked-voxel L1 after 6 steps" in done.stdout
    assert restarts(tmp_path / "run") == [3]
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("val_every", "at", "says"), [(3, 4, "resume={run} goes on"), (999, 2, "resume={run} goes on from step")]
)
def test_ctrl_c_is_130_and_says_how_to_go_on(store: Path, tmp_path: Path, val_every: int, at: int, says: str) -> None:
    endless = command(store, tmp_path / "run", "trainer.max_steps=1000000", f"trainer.val_every={val_every}")
    process = Forked(as_command, "swift.train", *endless, cwd=tmp_path, env=environment())
    while process.alive():
        if any(int(step) >= at for step in re.findall(r"^step (\d+)", process.stderr, re.MULTILINE)):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    status, said = process.wait(120), process.stderr
    assert status == 130, said
    assert says.format(run=tmp_path / "run") in said
    assert said.rstrip().endswith("stopped")
    assert "Traceback" not in said


def test_scans_left_out_are_in_the_summary_and_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(tmp_path / "store", stores.GRID, 2.0) as writer:
        for number, frames in enumerate((60, 20, 60)):
            writer.add(*stores.scan(number, frames))
    given = ["data.grid=[5,6,7]", "data.spacing=2.0", "data.frames=22", "trainer.max_steps=1", QUIET]
    done = shell(tmp_path, *command(tmp_path / "store", tmp_path / "a", *given))
    assert done.returncode == 1, done.stderr
    assert f"1 scans were left out: {tmp_path}/a/summary.json names them" in done.stderr.splitlines()[-1]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["steps"] == 1
    assert (summary["scans_left_out"], list(summary["left_out"])) == (1, ["sub-01_task-rest"])
    # Meant; and as a rank of srun, which would end the others and be started again.
    overrides = command(tmp_path / "store", tmp_path / "b", *given, "data.exclude=[sub-01_task-rest]")
    assert run(composed(*overrides), overrides, []) == 0
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["left_out"] == {"sub-01_task-rest": "data.exclude"}
    overrides = command(tmp_path / "store", tmp_path / "c", *given)
    monkeypatch.setattr("swift.train.__main__.current_place", lambda: Place(0, 0, 1, 1, "slurm"))
    assert run(composed(*overrides), overrides, []) == 0


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

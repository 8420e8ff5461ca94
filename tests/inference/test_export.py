"""One file with weights, settings and contract: what is in it, what reads it, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from swift.config.derive import PATHS
from swift.data.store.reader import Store
from swift.inference.export import export, load, load_into, shareable
from swift.inference.export_cli import main
from swift.models.autoencoder import MaskedAutoencoder
from swift.parallel.checkpoint.read import FileWeights, find_checkpoint, subjects_file
from swift.parallel.setup import resolve
from swift.train.init_weights import start_from
from swift.train.wiring import build_module
from swift.utils.errors import UserError
from tests.forked import Forked
from tests.runs import environment, weights
from tests.small import settings


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export(finished, out)
    return out


def test_the_file_holds_weights_settings_and_contract(exported: Path, finished: Path) -> None:
    found = load(exported)
    expected = {name.removeprefix("model."): value for name, value in weights(finished).items()}
    state = found.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert found.step == 6
    assert found.config.model.embed_dim == 12
    assert found.contract["grid"] == [12, 12, 12]
    assert found.contract["normalization"] == "zscore_voxel"
    assert not found.model.training


def test_bf16_is_the_rounded_value_in_half_the_bytes(finished: Path, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    export(finished, out, "bf16")
    whole, half = load(exported).model.state_dict(), load(out).model.state_dict()
    assert all(torch.equal(half[name], value.bfloat16().float()) for name, value in whole.items())
    with safe_open(out, framework="pt") as file:
        assert file.get_tensor("mask_token").dtype == torch.bfloat16


READ = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "lightning", "mup"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from swift.inference.export import load
found = load(sys.argv[1])
mask = torch.zeros(1, *found.model.encoder.grids[0], dtype=torch.bool)
mask[..., 0] = True
out = found.model(torch.ones(1, 1, 12, 12, 12, 8), mask)
print(found.step, found.contract["frames"], tuple(out.shape), repr(float(out.detach().double().sum())))
"""


@pytest.mark.slow
def test_it_is_read_where_deepspeed_and_lightning_are_missing(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(exported)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load(exported)
    mask = torch.zeros(1, *found.model.encoder.grids[0], dtype=torch.bool)
    mask[..., 0] = True
    expected = float(found.model(torch.ones(1, 1, 12, 12, 12, 8), mask).detach().double().sum())
    *said, total = done.stdout.split()
    assert " ".join(said) == "6 8 (1, 1, 12, 12, 12, 8)"
    assert float(total) == pytest.approx(expected, rel=1e-5)


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    mark, path = tmp_path / "exploded", tmp_path / name
    torch.save({"state_dict": {"model.mask_token": torch.ones(3)}, "extra": Bomb(mark)}, path)
    with pytest.raises(UserError) as caught:
        start_from(build_module(resolve(settings())), str(path))
    assert str(caught.value).startswith(f"init={path}: ")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if path.suffix == ".safetensors":
        for read in (load, lambda path: load_into(torch.nn.Linear(1, 1), path)):
            with pytest.raises(UserError, match=r"pickled weights are refused, as they can run code; .* swift.export"):
                read(path)
        assert not mark.exists()


def test_what_it_is_not(exported: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=r"was not written by swift.export: its format is None, not swift-weights-2"):
        load(tmp_path / "foreign.safetensors")
    cfg = settings("model.depths=[1,1]")
    other = MaskedAutoencoder(cfg.model, cfg.data.grid, cfg.data.frames)
    with pytest.raises(UserError) as caught:
        load_into(other, exported)
    assert f"{exported} is of another model: 21 tensors differ" in str(caught.value)
    assert str(caught.value).count(" there, nothing here") == 5


def test_every_byte_is_under_the_checksum(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    start = whole.index(b'"xxh3":"') + 8
    zeros = whole[:start] + b"0" * 16 + whole[start + 16 :]
    assert whole[start : start + 16].decode() == xxhash.xxh3_64_hexdigest(zeros)
    broken = tmp_path / "broken.safetensors"
    for place in (8 + size, 8 + size + 5000, len(whole) - 1, whole.index(b"zscore_voxel"), start, start + 15):
        changed = bytearray(whole)
        changed[place] ^= 1
        broken.write_bytes(changed)
        for read in (load, FileWeights):
            with pytest.raises(UserError, match=r"is damaged: it has another checksum than swift.export"):
                read(broken)


def test_a_file_of_before_there_was_a_checksum(
    exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with safe_open(exported, framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "xxh3"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = tmp_path / "old.safetensors"
    save_file(tensors, old, metadata | {"format": "swift-weights-1"})
    assert load(old).step == 6
    assert f"{old} carries no checksum" in caplog.text


def test_what_is_shared_names_no_subject_and_no_path(finished: Path, exported: Path, store: Path) -> None:
    subjects = sorted({scan.subject for scan in Store(store).scans})
    text = exported.read_bytes()
    assert subjects
    for secret in (*subjects, str(store), str(finished), str(finished.parent), str(Path.home())):
        assert secret.encode() not in text, secret
    assert str(store) in (finished / "config.yaml").read_text()  # it was there to be kept
    assert FileWeights(exported).metadata["subject_count"] == len(subjects)
    listed = json.loads(subjects_file(exported).read_text())
    assert listed["subjects"] == subjects
    module = build_module(resolve(settings()))
    start_from(module, str(exported))
    assert module.seen_before == subjects


def test_every_setting_that_is_a_path_is_left_out() -> None:
    named = [f"{setting}=/somebody/{place}" for place, setting in enumerate(PATHS) if setting != "resume"]
    cohort = "data.mixture=[{path: /somebody/cohort, weight: 1}]"
    cfg = settings("task=task_map", "task.adapt=full", *named)
    mixed = settings(cohort, "data.path=null")
    for given in (cfg, mixed):
        config = dataclasses.asdict(given)
        before = json.dumps(config)
        assert "/somebody" in before
        assert "/somebody" not in json.dumps(shareable(config))
        assert json.dumps(config) == before  # the run's own settings stay


def test_the_list_of_subjects_belongs_to_its_file(exported: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    shutil.copy(exported, out)
    module = build_module(resolve(settings()))
    start_from(module, str(out))
    assert module.seen_before is None  # as the list did not come along
    export(finished, tmp_path / "half.safetensors", "bf16")
    shutil.copy(subjects_file(tmp_path / "half.safetensors"), subjects_file(out))
    with pytest.raises(UserError, match=r"model.subjects.json belongs to another file than model.safetensors"):
        load(out)
    subjects_file(out).write_text("[]")
    with pytest.raises(UserError, match=r"model.subjects.json is no list of training subjects"):
        load(out)
    out.unlink()
    with pytest.raises(UserError, match=r"model.subjects.json exists already"):
        export(finished, out)


def dies(run: Path, out: Path, how: str) -> None:
    """An export that ends when the file with the weights is to get its name."""
    put = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if str(target) == str(out):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return put(self, target)

    Path.replace = replace  # type: ignore[method-assign]
    export(run, out)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_an_export_that_ended_between_list_and_weights_is_done_again(
    how: str, finished: Path, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.safetensors"
    assert Forked(dies, finished, out, how, cwd=tmp_path, env=environment()).wait() != 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ([".model.safetensors.partial", "model.subjects.json"] if how == "kill" else [])
    export(finished, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "model.subjects.json"]
    assert out.read_bytes() == exported.read_bytes()
    assert subjects_file(out).read_text() == subjects_file(exported).read_text()


def test_a_damaged_checkpoint_is_named_and_no_other_one_taken(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    *_, before, newest = sorted((run / "checkpoints").glob("step-*"))
    weights_file = next(newest.glob("*.safetensors"))
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    broken = rf"{newest} is damaged \({weights_file.name} has another checksum\)"
    says = rf"{broken}; {before} is whole \(--which {before.name}\)"
    with pytest.raises(UserError, match=says):
        export(run, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=says):
        start_from(build_module(resolve(settings())), str(run))
    assert export(run, tmp_path / "a.safetensors", which=before.name)["checkpoint"] == str(before)
    assert find_checkpoint(before)[1].step == int(before.name[-7:])
    (newest / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json cannot be read\): which checkpoint is the best is not known"):
        find_checkpoint(run, "best")
    shutil.rmtree(newest)  # `latest` still names it
    with pytest.raises(UserError, match=rf"{newest} is damaged \(manifest.json cannot be read\); {before} is whole"):
        find_checkpoint(run)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}", "--out", "{tmp}/a.pt"], "must end in .safetensors"),
        (["{run}", "--out", "{file}"], "exists already"),
        (["{tmp}", "--out", "{tmp}/a.safetensors"], "holds no checkpoint of swift"),
        (
            ["{run}", "--out", "{tmp}/a.safetensors", "--which", "step-7"],
            "step-7 is damaged (manifest.json cannot be read)",
        ),
        (["{run}", "--out", "{tmp}/gone/a.safetensors"], "{tmp}/gone"),
    ],
)
def test_a_mistake_is_one_line(
    finished: Path,
    exported: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"run": finished, "file": exported, "tmp": tmp_path}
    with pytest.raises(SystemExit) as stop:
        main([argument.format(**names) for argument in arguments])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert says.format(**names) in err


def test_the_command_prints_what_it_wrote(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best.safetensors"
    main([str(finished), "--out", str(out), "--which", "best", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == str(out)
    assert said["bytes"] == out.stat().st_size
    assert said["parameters"] == sum(value.numel() for value in load(out).model.state_dict().values())

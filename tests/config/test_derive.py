"""What follows from what is there: grid of the store, model of init=, names that YAML or Hydra would misread."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from swift.config.compose import composed, freeze, load_frozen, typed
from swift.config.derive import quoted
from swift.utils.errors import UserError
from tests import small
from tests.data.stores import GRID, build
from tests.models.test_v1_import import v1_state


def test_grid_and_spacing_are_those_of_the_store(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [0])
    patch = ["model.patch_size=[2,2,2,1]"]
    cfg, _ = composed(["data=store", f"data.path={store}", *patch])
    assert (cfg.data.grid, cfg.data.spacing) == (list(GRID), 2.0)
    (store / "store.json").write_text(json.dumps({"grid": [4, 5, 6], "spacing": 3}))
    cfg, _ = composed(["data=store", f"data.mixture=[{{path: {store}}}]", *patch])
    assert (cfg.data.grid, cfg.data.spacing) == ([4, 5, 6], 3.0)
    cfg, _ = composed(["data=store", f"data.path={store}", "data.spacing=1.5", *patch])
    assert (cfg.data.grid, cfg.data.spacing) == ([4, 5, 6], 1.5)
    for broken in ("{", '{"grid": 3}', ""):
        (store / "store.json").write_text(broken)
        cfg, _ = composed(["data=store", f"data.path={store}"])
        assert (cfg.data.grid, cfg.data.spacing) == ([96, 96, 96], 2.0)
    cfg, _ = composed(["data=store", f"data.path={tmp_path}/none"])
    assert (cfg.data.grid, cfg.data.spacing) == ([96, 96, 96], 2.0)
    assert composed([])[0].data.grid == [48, 48, 48]


def run_of(folder: Path, *overrides: str) -> Path:
    """A run directory with nothing but its settings."""
    folder.mkdir(parents=True)
    freeze(typed(small.composed("model=7m", *overrides)), folder / "config.yaml")
    return folder


def test_the_model_is_that_of_init(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path / "run", "model.drop_path=0.25", "model.patch_size=[4,4,4,1]")
    there = load_frozen(run, []).model
    (run / "checkpoints" / "step_3").mkdir(parents=True)
    task = ["task=sex", "task.adapt=full", "data=store", "data.path=nowhere"]
    with caplog.at_level(logging.INFO, "swift"):
        for source in (run, run / "checkpoints", run / "checkpoints" / "step_3"):
            assert composed([*task, f"init={source}"])[0].model == there
    assert f"init={run}: model 7m, as there" in caplog.text
    changed = composed([*task, f"init={run}", "model.drop_path=0.1"])[0].model
    assert (changed.drop_path, changed.embed_dim) == (0.1, there.embed_dim)
    assert composed([*task, f"init={run}", "model=tiny"])[0].model.name == "tiny"
    assert composed([*task, f"init={tmp_path}/none"])[0].model.name == "tiny"
    # A frozen run keeps what it has.
    tree = small.composed(*task, f"init={run}")
    assert typed(tree).model.name == "tiny"


def test_the_model_of_an_exported_file(tmp_path: Path) -> None:
    model = OmegaConf.to_container(OmegaConf.load(run_of(tmp_path / "run") / "config.yaml"))["model"]  # type: ignore[call-overload,index]
    head = json.dumps({"__metadata__": {"config": json.dumps({"model": model})}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    overrides = ["task=sex", "task.adapt=full", "data=store", "data.path=nowhere", f"init={tmp_path}/m.safetensors"]
    assert composed(overrides)[0].model.name == "7m"
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 100)
    assert composed(overrides)[0].model.name == "tiny"


def test_the_input_is_that_of_swift_v1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = v1_state()
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "lightning.ckpt")
    torch.save(state, tmp_path / "bare.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({f"model.encoder.{name}": torch.ones(1) for name in ("norm", "patch_embed.proj")}, tmp_path / "own.pt")
    (tmp_path / "text.pt").write_text("patch_embed.fc.weight")
    task = ["model=v1", "task=sex", "task.adapt=full", "data=store", "data.path=nowhere"]

    def given(file: str, *typed_in: str) -> tuple[str, str]:
        data = composed([*task, f"init={tmp_path / file}", *typed_in])[0].data
        return data.layout, data.normalization

    with caplog.at_level(logging.INFO, "swift"):
        assert given("lightning.ckpt") == ("swift_v1", "zscore_global")
    assert "weights of SwiFT v1: data.layout=swift_v1 data.normalization=zscore_global, as it was" in caplog.text
    for file in ("bare.pt", "old.pt"):
        assert given(file) == ("swift_v1", "zscore_global")
    for file in ("own.pt", "text.pt", "none.pt"):
        assert given(file) == ("swift", "zscore_voxel")
    # What is typed stays; v1's layout is legal with its own normalization alone.
    assert given("bare.pt", "data.normalization=zscore_global") == ("swift_v1", "zscore_global")
    assert given("bare.pt", "data.layout=swift") == ("swift", "zscore_global")
    assert given("bare.pt", "data.normalization=percent") == ("swift", "percent")
    with pytest.raises(UserError, match="swift_v1 needs zscore_global"):
        given("bare.pt", "data.layout=swift_v1", "data.normalization=percent")
    # A frozen run keeps what it has.
    assert typed(small.composed(*task, f"init={tmp_path}/bare.pt")).data.layout == "swift"


def test_unquoted_yes_and_no(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    text = (
        "defaults: [_common, _target, _self_]\nname: ill\nloss: cross_entropy\ntarget:\n  kind: binary\n  column: ill\n"
        "  classes: [{}]\n"
    )
    for classes, good in (("no, yes", False), ('"no", "yes"', True), ('"True", "False"', True), ("0, 1", True)):
        (tmp_path / "task" / "ill.yaml").write_text(text.format(classes))
        if good:
            cfg, _ = composed(["task=ill"], tmp_path)
            assert cfg.task.target is not None
            assert cfg.task.target.classes == [name.strip(' "') for name in classes.split(",")]
        else:
            with pytest.raises(UserError, match=r"task\.target\.classes=\[False, True\]: YAML reads .* quote it"):
                composed(["task=ill"], tmp_path)
    with pytest.raises(UserError, match=r"task\.target\.column=True: YAML reads"):
        composed(["task=sex", "task.target.column=true"])
    with pytest.raises(UserError, match=r"--config-dir .*none: no such folder"):
        composed(["task=ill"], tmp_path / "none")


@pytest.mark.parametrize("name", ["lr=0.1,wd=0 (a)", "it's", "a;b & c", "ein Ordner", "größer", "a#b"])
def test_paths_need_no_quotes(name: str, tmp_path: Path) -> None:
    cfg, _ = composed(["data=store", f"data.path=/x/{name}/store", f"run_dir={tmp_path}/{name}"])
    assert cfg.data.path == f"/x/{name}/store"
    assert cfg.run_dir == f"{tmp_path}/{name}"


def test_what_is_quoted_already_stays() -> None:
    left = ["data.path='/a b'", "run_dir=runs/${model.name}", "init=null", "a.b=1,2", "-m", "data.path=/a\\=b", "x"]
    assert quoted([one for one in left if one != "-m"]) == [one for one in left if one != "-m"]
    sweep = ["-m", "data.path=/a,/b"]
    assert quoted(sweep) == sweep
    assert quoted(["data.path=/a,/b"]) == ["data.path='/a,/b'"]


def test_baselines_do_not_check_the_model() -> None:
    overrides = ["task=sex", "data=store", "data.path=x", "model.patch_size=[200,200,200,1]", "model.embed_dim=0"]
    with pytest.raises(UserError, match="embed_dim=0"):
        composed(overrides)
    assert composed(overrides, model=False)[0].task.name == "sex"


def test_maps_are_shared_where_subjects_are_held_out_and_as_typed_else() -> None:
    for overrides, wanted in (
        ([], "scan"),
        (["data.split=somewhere"], "shared"),
        (["data.split=somewhere", "model.maps_of=scan"], "scan"),
        (["model.maps_of=shared"], "shared"),
    ):
        assert composed(overrides)[0].model.maps_of == wanted

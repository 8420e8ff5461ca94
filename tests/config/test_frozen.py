"""Frozen settings of a run: they come back equal, and a resumed run changes what it may and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from swift.config.compose import as_begun, conf_dir, differences, freeze, load_frozen, typed, whole_paths, writable
from swift.utils.errors import UserError
from tests.small import composed


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("[!_]*.yaml"))


RUN = ["task.mask_unit=[12,6,6,2]", "seed=7", "data.path='a folder: with # signs'"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    freeze(typed(composed(f"run_dir={tmp_path}", *RUN)), tmp_path / "config.yaml")
    return tmp_path


def test_frozen_settings_come_back_equal(run_dir: Path) -> None:
    cfg = load_frozen(run_dir, [])
    assert cfg.task.mask_unit == [12, 6, 6, 2]
    # Absolute: a run that goes on may be started from another folder.
    assert cfg.data.path == str(Path("a folder: with # signs").absolute())
    typed_in = typed(composed(f"run_dir={run_dir}", *RUN))
    assert cfg == whole_paths(typed_in)
    assert differences(cfg, typed_in) == []
    freeze(cfg, run_dir / "config.yaml")
    assert load_frozen(run_dir, []) == cfg
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def test_every_path_is_frozen_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "task=task_rest",
        "task.adapt=full",
        "task.target.events=events",
        "data.split=split.json:3",
        "init=runs/before",
    ]
    words += ["data=store", "data.mixture=[{path: a}, {path: /b}]"]
    cfg = whole_paths(typed(composed("run_dir=runs/x", *words)))
    assert cfg.task.target is not None
    found = [cfg.task.target.events, cfg.data.split, cfg.init, *(cohort.path for cohort in cfg.data.mixture)]
    assert found == [f"{tmp_path}/events", f"{tmp_path}/split.json:3", f"{tmp_path}/runs/before", f"{tmp_path}/a", "/b"]
    assert cfg.data.path is None


def test_a_run_from_before_a_setting_is_read_as_it_ran(run_dir: Path) -> None:
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    del tree["guard"], tree["data"]["repeat_batch"], tree["trainer"]["phases_every"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    cfg = load_frozen(run_dir, [])
    assert (cfg.guard.action, cfg.data.repeat_batch, cfg.trainer.phases_every) == ("off", False, 0)
    del tree["data"]["frames"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"^data\.frames is missing"):
        load_frozen(run_dir, [])


@pytest.mark.parametrize("choice", choices("model"))
def test_every_size_freezes(choice: str, tmp_path: Path) -> None:
    cfg = typed(composed(f"model={choice}", "+launcher=frontier", "run_dir=x"))
    freeze(cfg, tmp_path / "config.yaml")
    assert load_frozen(tmp_path, []) == cfg


def test_frozen_settings_compose_with_hydra(run_dir: Path) -> None:
    """`--config-path RUN --config-name config` gives the same run: what a submitted job does."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(run_dir), version_base=None):
        tree = compose("config", ["trainer.max_steps=9"])
    assert typed(tree) == load_frozen(run_dir, ["trainer.max_steps=9"])


def test_values_of_a_resumed_run_can_be_changed(run_dir: Path) -> None:
    before = load_frozen(run_dir, [])
    after = load_frozen(
        run_dir, ["trainer.max_steps=900", "optimizer.betas=[0.8,0.9]", "data.path=/new/place", "task.mask_unit=null"]
    )
    assert differences(before, after) == ["data.path", "optimizer.betas", "task.mask_unit", "trainer.max_steps"]
    assert (after.trainer.max_steps, after.optimizer.betas, after.data.path) == (900, [0.8, 0.9], "/new/place")
    assert after.task.mask_unit is None


@pytest.mark.parametrize("name", choices("parallel"))
def test_a_resumed_run_may_be_spread_otherwise(run_dir: Path, name: str) -> None:
    after = load_frozen(run_dir, [f"parallel={name}"])
    assert after.parallel == typed(composed(f"parallel={name}")).parallel
    assert all(part.startswith("parallel.") for part in differences(load_frozen(run_dir, []), after))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=51m", "only single values"),
        ("model/variant=joint", "only single values"),
        ("optimizer=adamw", "only single values"),
        ("parallel=zero9", "must be one of ddp, fsdp, hsdp, single, zero1"),
        ("+launcher=frontier", "only single values"),
        ("~task.loss", "only single values"),
        ("model.embed_dim=48", "keeps its model"),
        ("run_dir=elsewhere", "its folder"),
        ("init=weights.ckpt", "its weights"),
        ("trainer.max_steps=many", "must be an integer"),
        ("trainer.foo=1", "no such setting"),
        ("task.mask_ratio=1.2", "(0, 1)"),
        ("task.mask_unit=[1", "task.mask_unit=[1"),
    ],
)
def test_a_resumed_run_refuses(run_dir: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_frozen(run_dir, [override])
    assert override.partition("=")[0].lstrip("+~") in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "not a run directory"),
        ("a: [1", "cannot be read"),
        ("- 1", "holds no settings"),
        ("seed: 1", "is missing"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_damaged_frozen_file_is_named(tmp_path: Path, content: str | bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says) as caught:
        load_frozen(tmp_path, [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settled", [(7, True), (2, False)])
def test_what_a_command_leaves_open_is_what_its_run_has_settled(run_dir: Path, settled: tuple[int, bool]) -> None:
    cfg = load_frozen(run_dir, [])
    assert (cfg.trainer.log_every, cfg.parallel.compile) == (None, None)  # as of a job that has not begun
    assert as_begun(cfg, run_dir) == as_begun(cfg, run_dir / "none") == cfg
    trainer, parallel = replace(cfg.trainer, log_every=settled[0]), replace(cfg.parallel, compile=settled[1])
    begun = replace(cfg, trainer=trainer, parallel=parallel)
    freeze(begun, run_dir / "config.yaml")
    assert as_begun(cfg, run_dir) == begun
    # What is typed is typed: another value is named as a difference.
    typed_in = replace(cfg, parallel=replace(cfg.parallel, compile=not settled[1]))
    assert differences(begun, as_begun(typed_in, run_dir)) == ["parallel.compile"]


def test_differences_are_named_to_the_last_level(run_dir: Path) -> None:
    cfg = load_frozen(run_dir, [])
    other = replace(cfg, seed=8, launcher={"name": "x"}, data=replace(cfg.data, frames=4, grid=[1, 2, 3]))
    assert differences(cfg, other) == ["data.frames", "data.grid", "launcher", "seed"]
    assert differences(cfg, cfg) == []


def test_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert writable(tmp_path)
    assert writable(tmp_path / "a" / "b")
    assert not writable(tmp_path / "file")
    assert not writable(tmp_path / "file" / "run")
    assert not writable(tmp_path / "nowhere" / "run")
    assert writable(Path("relative") / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]

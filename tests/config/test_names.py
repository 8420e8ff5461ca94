"""Names of settings: the legal ones are Hydra's own, wrong ones get one line with the nearest; paths just work."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.config.compose import composed, conf_dir
from swift.config.derive import quoted
from swift.config.names import group_choices, options_first, refuse_unknown, setting_names
from swift.utils.errors import UserError
from tests.small import composed as tree


def test_every_value_of_the_composed_settings_is_a_known_name() -> None:
    known = dict(setting_names())

    def check(node: dict, prefix: str) -> None:
        for name, value in node.items():
            assert prefix + name in known
            if isinstance(value, dict):
                check(value, f"{prefix}{name}.")

    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(tree("task=sex", "+launcher=slurm", "data=store", "data.path=x"))
    assert isinstance(plain, dict)
    check(plain, "")
    assert group_choices(conf_dir())["data"] == ["sample", "store", "synthetic"]
    assert "model/variant" in group_choices(conf_dir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["trainer.max_step=3"], "no setting trainer.max_step; did you mean trainer.max_steps?"),
        (["max_steps=3"], "no setting max_steps; did you mean trainer.max_steps?"),
        (["modle=51m"], "no setting modle; did you mean model?"),
        (["xyzzyx=1"], "no setting xyzzyx; swift-fmri train --help lists them"),
        (["model=51n"], "model=51n: no such choice; did you mean model=51m? There are "),
        (["-m", "model=7m,51n"], "model=51n: no such choice"),
        (["task.mask_ratio"], "'task.mask_ratio' is no setting: settings are NAME=VALUE"),
        (["~trainer.max_step"], "no setting trainer.max_step"),
    ],
)
def test_a_wrong_name_is_one_line(given: list[str], says: str) -> None:
    with pytest.raises(UserError) as raised:
        refuse_unknown(given, conf_dir())
    assert str(raised.value).startswith(says)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        ["--config-dir", "mine", "task=my_task"],
        ["hydra.searchpath=[file://mine]", "task=my_task"],
        ["+launcher=frontier", "launcher.nodes=2", "hydra.run.dir=x", "+model.foo=1"],
        ["model/variant=joint", "model.num_heads=[4,8]", "~init"],
        ["data.mixture=[{path: a, weight: 1}]", "data.augment.flip=0.5", "task.target.column=age", "nodes=3"],
    ],
)
def test_legal_names_pass(given: list[str]) -> None:
    refuse_unknown(given, conf_dir(), ["nodes"])
    if "--config-dir" in given or "hydra.searchpath" in given[0]:  # with files of one's own Hydra has the last word
        refuse_unknown([*given, "trainer.no_such=1"], conf_dir(), ["nodes"])
        return
    with pytest.raises(UserError, match="no_such"):
        refuse_unknown([*given, "trainer.no_such=1"], conf_dir(), ["nodes"])


def test_settings_stand_in_any_position() -> None:
    given = ["a=1", "--config-dir", "x y", "b=2", "-m", "c=3"]
    assert options_first(given) == ["--config-dir", "x y", "-m", "a=1", "b=2", "c=3"]


@pytest.mark.parametrize("name", ["a b", "x=y", "(1), [2]", "it's", "ä"])
def test_paths_with_anything_in_them_arrive(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, _ = composed([f"run_dir={tmp_path / name}"])
    assert cfg.run_dir == str(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg, _ = composed([f"run_dir=~/{name}"])
    assert cfg.run_dir == str(tmp_path / name)


def test_a_sweep_quotes_paths_without_comma(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quoted(["-m", "data.path=a b", "init=a,b c", "seed=1,2"]) == [
        "-m",
        "data.path='a b'",
        "init=a,b c",
        "seed=1,2",
    ]

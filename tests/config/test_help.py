"""--help: every setting with its value and meaning."""

from __future__ import annotations

import typing
from dataclasses import is_dataclass

from swift.config.help import groups_text, meanings, values_text
from swift.config.schema import Config
from tests.config.test_compose import settings_of
from tests.small import composed


def test_every_setting_has_a_meaning() -> None:
    texts = meanings()
    sections = {"Config"} | {hint.__name__ for hint in typing.get_type_hints(Config).values() if is_dataclass(hint)}
    for section in sections:
        silent = {key for key, text in texts[section].items() if len(text) < 8}
        assert silent - {hint.removesuffix("Config").lower() for hint in texts} == set()
    assert texts["DataConfig"]["spacing"] == "Isotropic voxel size, mm; null: that of the store, 2 where there is none."
    # Of several lines, one.
    assert texts["ModelConfig"]["last_stage"].endswith("| unshifted: windowed, never shifted.")


def test_help_lists_every_setting_with_its_value() -> None:
    text = values_text(composed("model=51m", "data=store", "data.path=a b", "task.mask_unit=[6,6,6,2]"))
    names = [line.split("=")[0].strip() for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    assert set(names) == set(settings_of(Config)) - {"launcher"}
    for part in (
        "model.embed_dim=96 ",
        "data.path=a b ",
        "task.mask_unit=[6,6,6,2] ",
        "trainer.figures=true ",
        "init=null ",
    ):
        assert f"  {part}" in text
    assert "model=          130b, 14b5, 1b2, 202m" in groups_text()
    assert "_common" not in groups_text()

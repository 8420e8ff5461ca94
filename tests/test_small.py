"""The short way to compose settings for tests, against Hydra's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from swift.config.compose import conf_dir
from tests.small import command, composed


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["parallel=zero2", "parallel.fp32_gradients=true", "model/variant=joint", "task.mask_ratio=0.4"],
        ["task=depression", "+launcher=local", "launcher.dry_run=true", "data.exclude=[a,b]", "init=x y"],
    ],
)
def test_settings_are_those_that_hydra_composes(extra: list[str]) -> None:
    words = command(Path("store"), Path("run"), *extra)
    with initialize_config_dir(str(conf_dir()), version_base=None):
        whole = compose("config", words)
    assert composed(*words) == whole
    assert composed(*words) == whole  # what is kept was not changed

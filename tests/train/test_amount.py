"""What a run is about to see, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from swift.train.amount import amount
from tests.small import settings


def data(scans: int, clips: int) -> Any:
    class Index:
        scan = np.arange(scans)

        def __len__(self) -> int:
            return clips

    return SimpleNamespace(
        train_index=Index(), store=SimpleNamespace(scans=[SimpleNamespace(subject=f"s{i // 2}") for i in range(scans)])
    )


def test_the_line_counts() -> None:
    cfg = settings("data.batch_size=3", "trainer.accumulate=2", "trainer.max_steps=10")
    line, warning = amount(cfg, data(4, 48), 2)
    assert line == ("training on 2 subjects, 4 scans, 48 clips (an epoch); 10 steps of 12 clips are 2.5 epochs")
    assert warning == ""


def test_the_demos_defaults_on_a_large_store_are_warned_of() -> None:
    cfg = settings("data.batch_size=1", "trainer.accumulate=1", "trainer.max_steps=100")
    assert cfg.model.name == "tiny"
    _, warning = amount(cfg, data(200, 10_000), 1)
    assert warning == (
        "a store of 200 scans, but model=tiny is the demo's and trainer.max_steps=100 shows it 1 % of the clips: an "
        "epoch is trainer.max_steps=10000, sizes: swift-fmri plan"
    )
    assert amount(cfg, data(199, 10_000), 1)[1] == ""
    larger = replace(cfg, model=replace(cfg.model, name="51m"))
    assert "model=" not in amount(larger, data(200, 10_000), 1)[1]
    assert amount(replace(larger, trainer=replace(cfg.trainer, max_steps=10_000)), data(200, 10_000), 1)[1] == ""

"""task.hidden=drop under every kind of strategy: the steps of one device, recomputed and resumed runs included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.ranks import run
from tests.distributed.strategies import exported, spread

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = ["task.hidden=drop", "task.mask_kind=tube", "model.patch_size=[2,2,2,2]", "trainer.max_steps=4"]
RUN += ["trainer.val_every=2", "trainer.checkpoint_every=2", "trainer.val_batches=1"]
"""27 units of 4x4x4 voxels, 5 of them visible."""


@pytest.fixture(scope="module")
def single(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    seen = run(jobs.train, 1, store, folder, [*RUN, "data.batch_size=4"])[0]
    return seen | {"weights": exported(folder).state_dict()}


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3", "fsdp"])
def test_a_resumed_run_with_recomputed_blocks_is_that_of_one_device(
    single: dict[str, Any], name: str, store: Path, tmp_path: Path
) -> None:
    options = [*RUN, *spread(name), "parallel.activation_checkpointing=block"]
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    for stop in (2, None):
        seen = run(jobs.train, 2, store, tmp_path, options, stop)[0]
        losses |= seen["losses"]
        norms |= seen["norms"]
    assert losses.keys() == single["losses"].keys()
    assert losses == pytest.approx(single["losses"], rel=1e-5)
    assert norms == pytest.approx(single["norms"], rel=1e-4)
    found = exported(tmp_path).state_dict()
    assert found.keys() == single["weights"].keys()
    for key, value in single["weights"].items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=5e-5, msg=key)


def test_a_resumed_run_is_the_same_to_the_last_bit(single: dict[str, Any], store: Path, tmp_path: Path) -> None:
    losses: dict[int, float] = {}
    for stop in (2, None):
        losses |= run(jobs.train, 1, store, tmp_path, [*RUN, "data.batch_size=4"], stop)[0]["losses"]
    assert losses == single["losses"]
    for key, value in exported(tmp_path).state_dict().items():
        assert torch.equal(value, single["weights"][key]), key

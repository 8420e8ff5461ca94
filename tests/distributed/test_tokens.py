"""Ranks whose clips have different numbers of tokens compute together what one device computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swift.config.compose import typed
from swift.models.token_sets import token_sets
from swift.train.wiring import build_data
from tests.distributed import jobs
from tests.distributed.ranks import run
from tests.distributed.strategies import WHOLE, exported, spread
from tests.small import command, composed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = ["trainer.max_steps=6", "trainer.val_every=6", "trainer.log_every=6", "trainer.val_batches=1"]
BRAIN = ["model.tokens=brain", "model.patch_size=[2,2,2,2]"]


@pytest.fixture(scope="module")
def single(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("single")
    seen = run(jobs.train, 1, store, folder, [*RUN, *BRAIN, *WHOLE])[0]
    return seen, exported(folder).state_dict()


@pytest.mark.parametrize("name", ["ddp", "zero1", "fsdp"])
def test_brain_tokens_on_two_ranks_are_those_of_one_device(
    single: tuple[dict, dict], name: str, store: Path, tmp_path: Path
) -> None:
    seen = run(jobs.train, 2, store, tmp_path, [*RUN, *BRAIN, *spread(name)])[0]
    assert seen["losses"] == pytest.approx(single[0]["losses"], rel=1e-5)
    assert seen["norms"] == pytest.approx(single[0]["norms"], rel=1e-4)
    for key, value in exported(tmp_path).state_dict().items():
        torch.testing.assert_close(value, single[1][key], rtol=1e-4, atol=5e-5, msg=key)


def test_the_clips_differ_in_tokens_and_leave_some_out(store: Path, tmp_path: Path) -> None:
    """Or the comparison above would show nothing."""
    cfg = typed(composed(*command(store, tmp_path, *BRAIN, *WHOLE)))
    data = build_data(cfg)
    data.setup("fit")
    brains = data.dense(next(iter(data.train_dataloader())))["brain"]
    counts = {len(token_sets(brain[None], cfg.model.patch_size, 1)[0]) for brain in brains}
    assert len(counts) > 1
    assert max(counts) < 6**3

"""Brain tokens and hidden patches left out under every kind of strategy: the steps of one device, a resumed run too.

Forward and backward passes are those of blocks that are made again. Ranks have clips of different brains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

RUN = ["model.patch_size=[2,2,2,2]", "trainer.max_steps=4", "trainer.val_every=4", "trainer.checkpoint_every=2"]
RUN += ["trainer.val_batches=1", "parallel.activation_checkpointing=block"]
MODES = {
    "brain": ["model.tokens=brain"],
    # 27 units of 4x4x4 voxels, 5 of them visible.
    "drop": ["task.hidden=drop", "task.mask_kind=tube"],
    # 1 of 4 time steps.
    "frames": ["task.hidden=drop", "task.mask_kind=frames"],
    "cohort": ["model.tokens=brain", "data.brain=cohort"],
}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
TABLE = [(mode, name) for mode in ("brain", "drop") for name in STRATEGIES]
TABLE += [("frames", "ddp"), ("frames", "zero3"), ("frames", "fsdp"), ("cohort", "ddp")]


def in_two_parts(ranks: int, store: Path, folder: Path, options: list[str]) -> dict[str, Any]:
    """What rank 0 saw of a run that was stopped after two steps and goes on, and the weights it ended with."""
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    for stop in (2, None):
        seen = run(jobs.train, ranks, store, folder, [*RUN, *options], stop)[0]
        losses |= seen["losses"]
        norms |= seen["norms"]
    return {"losses": losses, "norms": norms, "weights": exported(folder).state_dict()}


@pytest.fixture(scope="module")
def single(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each mode on one device, not interrupted."""
    found = {}
    for mode, options in MODES.items():
        folder = tmp_path_factory.mktemp(mode)
        seen = run(jobs.train, 1, store, folder, [*RUN, *options, *WHOLE])[0]
        found[mode] = seen | {"weights": exported(folder).state_dict()}
    return found


@pytest.mark.parametrize(("mode", "name"), TABLE)
def test_two_ranks_do_what_one_device_does(
    single: dict[str, dict[str, Any]], mode: str, name: str, store: Path, tmp_path: Path
) -> None:
    one, seen = single[mode], in_two_parts(2, store, tmp_path, [*MODES[mode], *spread(name)])
    assert seen["losses"].keys() == one["losses"].keys() == {1, 2, 3, 4}
    assert seen["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert seen["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert seen["weights"].keys() == one["weights"].keys()
    for key, value in one["weights"].items():
        torch.testing.assert_close(seen["weights"][key], value, rtol=1e-4, atol=5e-5, msg=key)


@pytest.mark.parametrize("mode", ["brain", "drop", "frames"])
def test_a_resumed_run_is_the_same_to_the_last_bit(
    single: dict[str, dict[str, Any]], mode: str, store: Path, tmp_path: Path
) -> None:
    seen = in_two_parts(1, store, tmp_path, [*MODES[mode], *WHOLE])
    assert seen["losses"] == single[mode]["losses"]
    for key, value in seen["weights"].items():
        assert torch.equal(value, single[mode]["weights"][key]), key


def test_the_clips_differ_in_tokens_and_leave_some_out(store: Path, tmp_path: Path) -> None:
    """Or the comparisons above would show nothing."""
    cfg = typed(composed(*command(store, tmp_path, *RUN, *MODES["brain"], *WHOLE)))
    data = build_data(cfg)
    data.setup("fit")
    brains = data.dense(next(iter(data.train_dataloader())))["brain"]
    counts = {len(token_sets(brain[None], cfg.model.patch_size, 1)[0]) for brain in brains}
    assert len(counts) > 1
    assert max(counts) < 6**3

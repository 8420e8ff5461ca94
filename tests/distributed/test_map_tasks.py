"""Maps on several ranks: the loss of the global batch, and scores of subjects however many ranks saw their clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from swift.evaluate.predictions import Predictions
from tests.distributed import tasks
from tests.distributed.ranks import run
from tests.maps import map_cohort

pytestmark = [pytest.mark.distributed]


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return map_cohort(tmp_path_factory.mktemp("maps"))


COURSES = ["model.maps=4", "task.courses=true"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        ("ddp", ["task.loss=contrastive"]),
        ("zero3", ["task.loss=contrastive", *COURSES]),
        ("fsdp", ["task.average=features", *COURSES]),
    ],
)
def test_two_ranks_train_and_judge_what_one_does(maps: Path, tmp_path: Path, strategy: str, extra: list[str]) -> None:
    """Tried with ddp, zero1, zero2, zero3 and fsdp; these are kept."""
    own = ["trainer.max_steps=4", "trainer.val_every=2", *extra]
    one = run(tasks.tune_maps, 1, maps, tmp_path / "one", [*own, "data.batch_size=4"])[0]
    two = run(tasks.tune_maps, 2, maps, tmp_path / "two", [*own, f"parallel={strategy}", "data.batch_size=2"])[0]
    assert two["best_step"] == one["best_step"]
    assert two["n"] == one["n"]
    tables = [Predictions.load(tmp_path / name / "predictions" / "test.csv") for name in ("one", "two")]
    assert tables[0].subject.tolist() == tables[1].subject.tolist()
    np.testing.assert_allclose(tables[1].scores, tables[0].scores, atol=2e-4)
    for name in ("residual_r", "r", "identification", "rank"):
        assert two["scores"]["val"][name] == pytest.approx(one["scores"]["val"][name], abs=2e-4)


def test_the_contrast_of_a_global_batch_is_that_of_one_rank() -> None:
    """The released code contrasts each rank's own clips."""
    loss, gradient = tasks.contrast(1, 0)
    for found, own in run(tasks.contrast_here, 2):
        assert found == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(own, gradient, rtol=1e-4, atol=1e-6)

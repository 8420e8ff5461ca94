"""Fine-tuning on several ranks: the same weights as on one, and the same figures however many ranks judge."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from swift.evaluate.predictions import Predictions
from tests.distributed import tasks
from tests.distributed.ranks import run

pytestmark = [pytest.mark.distributed]

STEPS = ["trainer.max_steps=4", "trainer.val_every=2"]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Trained by one rank."""
    run(tasks.tune, 1, folder, folder / "alone", [*STEPS, "data.batch_size=4"])
    return folder / "alone"


def scores_of(run_dir: Path, part: str) -> Predictions:
    return Predictions.load(run_dir / "predictions" / f"{part}.csv")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_judges_alike(alone: Path, tmp_path: Path, ranks: int) -> None:
    again = tmp_path / "again"
    shutil.copytree(alone, again)
    shutil.rmtree(again / "predictions")
    summary = run(tasks.judge_again, ranks, again, ["parallel=ddp"])[0]
    for part in ("val", "test"):
        one, many = scores_of(alone, part), scores_of(again, part)
        assert many.subject.tolist() == one.subject.tolist()
        np.testing.assert_allclose(many.scores, one.scores, rtol=0, atol=1e-12)
    assert summary["n"] == {"train": 12, "val": 6, "test": 6}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero1", "ddp"])
@pytest.mark.parametrize("adapt", ["lora", "scratch"])
def test_ranks_train_what_one_trains(folder: Path, alone: Path, tmp_path: Path, parallel: str, adapt: str) -> None:
    own = [f"task.adapt={adapt}", *STEPS] + ([f"init={alone}", "task.allow_seen=true"] if adapt == "lora" else [])
    one = run(tasks.tune, 1, folder, tmp_path / "one", [*own, "data.batch_size=4"])[0]
    two = run(tasks.tune, 2, folder, tmp_path / "two", [*own, f"parallel={parallel}", "data.batch_size=2"])[0]
    assert two["best_step"] == one["best_step"]
    for part in ("val", "test"):
        np.testing.assert_allclose(
            scores_of(tmp_path / "two", part).scores, scores_of(tmp_path / "one", part).scores, atol=2e-5
        )

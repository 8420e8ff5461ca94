"""Bad numbers on two ranks: both decide the same, the right rank is named, and the step is left out everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swift.data.store.reader import Store
from swift.train.callbacks import incident
from tests.distributed import plants
from tests.distributed.ranks import run
from tests.distributed.strategies import BF16, PARTS, STRATEGIES, TWO, slow_but, spread
from tests.runs import weights

pytestmark = [pytest.mark.distributed]

RUN = ["trainer.max_steps=8", "trainer.val_every=8", "trainer.val_batches=1", "guard.window=4"]
TROUBLE = [(3, 1, "nan"), (5, 0, "gradient"), (7, 1, "spike")]
LEFT_OUT = [step for step, _, _ in TROUBLE]


@pytest.fixture(scope="module")
def reference(store: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {tuple(how): plants.reference(store, [*RUN, *how], 2, LEFT_OUT) for how in (TWO, PARTS)}
    torch.set_num_threads(threads)
    return found


def record(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((incident.step_folder(run_dir, step) / incident.RECORD).read_text())


@pytest.mark.parametrize("name", slow_but(quick=("ddp", "zero1")))
def test_a_bad_step_is_left_out_on_all_ranks_and_the_right_one_is_named(
    name: str, store: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    how = STRATEGIES[name]
    ranks = run(plants.train, 2, store, tmp_path, [*RUN, *spread(name)], TROUBLE)
    assert [rank["error"] for rank in ranks] == [None, None]
    expected = reference[tuple(PARTS if how == PARTS else TWO)]
    found = plants.checkpointed(tmp_path, list(expected["tensors"]))
    assert found["steps"] == expected["steps"] == 5
    for key, tensor in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][key], tensor, rtol=1e-3, atol=1e-5, msg=key)

    opened = Store(store)
    for step, rank, kind in TROUBLE:
        said = record(tmp_path, step)
        what = {"nan": "loss is not finite", "gradient": "gradient is not finite", "spike": "loss spike"}
        assert said["what"] == what[kind]
        assert [one["rank"] for one in said["ranks"]] == [rank]
        (one,) = said["ranks"]
        planted = ranks[rank]["planted"][step]
        clip = one["clips"][-1]
        assert (clip["sample"], clip["frames"]["first"]) == (planted["sample_id"], planted["start"])
        assert clip["scan"] == opened.scans[planted["scan"]].scan_id
        assert one["micro_batch"] == (1 if how == PARTS else 0)
        assert (incident.step_folder(tmp_path, step) / incident.batch_name(rank)).exists()
    assert record(tmp_path, 3)["ranks"][0]["first"]["layer"] == "model.encoder.patch_embed.proj"
    first = record(tmp_path, 5)["ranks"][0]["first"]
    assert first["pass"] == "backward"
    # ZeRO 3 puts its own functions behind the output of a part: then it is the last part in it.
    assert first["layer"].startswith(plants.LAYER)


def test_the_batch_of_the_second_rank_can_be_run_again(store: Path, tmp_path: Path) -> None:
    settings = [*RUN, "trainer.max_steps=6", "parallel=zero1", *TWO]
    ranks = run(plants.train, 2, store, tmp_path, settings, [(4, 1, "spike")])
    losses = record(tmp_path, 4)["losses_of_ranks"]
    mean = (losses["0"][0] + losses["1"][0]) / 2
    assert mean == pytest.approx(ranks[0]["losses"][4], rel=1e-6)
    done = run(replayed, 1, incident.step_folder(tmp_path, 4) / incident.batch_name(1))[0]
    assert done == {"same": True, "exact": True, "loss": losses["1"][0], "rank": 1}


def replayed(path: Path) -> dict[str, Any]:
    """In a process of its own, as `python -m swift.replay`."""
    import os

    from swift.parallel.ranks import SETTINGS

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", SETTINGS):
        os.environ.pop(name, None)
    from swift.train.replay import replay

    done = replay(path)
    return {"same": done.same, "exact": done.exact, "loss": float(done.loss), "rank": done.facts["rank"]}


@pytest.mark.parametrize("name", slow_but(quick=("zero1",), names=("zero1", "fsdp")))
def test_a_bad_weight_is_rolled_back_on_all_ranks(name: str, store: Path, tmp_path: Path) -> None:
    settings = [*RUN, "guard.action=rollback", "trainer.checkpoint_every=2", f"parallel={name}", *TWO]
    ranks = run(plants.train, 2, store, tmp_path, settings, [(6, 0, "weight")])
    assert [rank["error"] for rank in ranks] == [None, None]
    assert [rank["bad_weights"] for rank in ranks] == [{}, {}]
    assert record(tmp_path, 6)["bad_weights"].keys() == {plants.WEIGHT}
    expected = plants.reference(store, settings, 2, [5, 6])
    found = plants.checkpointed(tmp_path, list(expected["tensors"]))
    assert found["steps"] == expected["steps"]
    for key, tensor in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][key], tensor, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3", "fsdp"])
def test_bf16_leaves_out_the_same_steps(name: str, store: Path, tmp_path: Path) -> None:
    settings = [*RUN, *spread(name), *BF16]
    ranks = run(plants.train, 2, store, tmp_path, settings, TROUBLE)
    assert [rank["error"] for rank in ranks] == [None, None]
    assert [one["rank"] for step in LEFT_OUT for one in record(tmp_path, step)["ranks"]] == [1, 0, 1]
    assert [record(tmp_path, step)["bad_weights"] for step in LEFT_OUT] == [{}, {}, {}]
    saved = plants.checkpointed(tmp_path, [f"weight/{plants.WEIGHT}"])
    assert saved["steps"] == 5
    assert bool(torch.isfinite(saved["tensors"][f"weight/{plants.WEIGHT}"]).all())


@pytest.mark.slow
def test_a_verdict_read_a_step_late_changes_no_bit(store: Path, tmp_path: Path) -> None:
    """With no weights kept beside the records nothing but the guard itself gives up whole weights of fsdp."""
    made = []
    for every in (1, 100):
        words = [*RUN, "trainer.max_steps=6", "parallel=fsdp", *TWO, "guard.weights_mb=0", f"trainer.log_every={every}"]
        ranks = run(plants.train, 2, store, tmp_path / str(every), words, TROUBLE[:2])
        assert [rank["error"] for rank in ranks] == [None, None]
        made.append(
            ([rank["losses"] for rank in ranks], [record(tmp_path / str(every), step) for step in LEFT_OUT[:2]])
        )
    assert str(made[0]) == str(made[1])  # as text, in which NaN is NaN
    left, right = weights(tmp_path / "1"), weights(tmp_path / "100")
    assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())

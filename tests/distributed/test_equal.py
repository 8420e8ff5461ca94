"""Every strategy computes what one device computes: losses, gradient norms, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import jobs
from tests.distributed.ranks import run
from tests.distributed.strategies import BF16, ON_FOUR, OPTIMIZERS, STRATEGIES, WHOLE, exported, spread

pytestmark = [pytest.mark.distributed]

FAST = ("ddp", "zero1", "zero3", "fsdp")
"""What every run of the suite tries; the others are among the slow tests."""
RUN = ["trainer.max_steps=20", "trainer.val_every=20", "trainer.log_every=20", "trainer.val_batches=1"]


def trained(store: Path, folder: Path, ranks: int, *overrides: str) -> dict[str, Any]:
    """What rank 0 saw, after 20 steps with a global batch of 4."""
    return run(jobs.train, ranks, store, folder, [*RUN, *overrides])[0]


@pytest.fixture(scope="module", params=["adamw", pytest.param("mup", marks=pytest.mark.slow)])
def single(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    overrides = OPTIMIZERS[request.param]
    seen = trained(store, folder, 1, *WHOLE, *overrides)
    return seen | {"weights": exported(folder).state_dict(), "overrides": overrides}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in (*STRATEGIES, "hsdp", "hpz")],
)
def test_twenty_steps_are_those_of_one_device(single: dict[str, Any], name: str, store: Path, tmp_path: Path) -> None:
    ranks, how = (4, ON_FOUR[name]) if name in ON_FOUR else (2, spread(name))
    seen = trained(store, tmp_path, ranks, *how, *single["overrides"])
    assert seen["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert seen["norms"] == pytest.approx(single["norms"], rel=1e-4)
    found = exported(tmp_path).state_dict()
    assert found.keys() == single["weights"].keys()
    for key, value in single["weights"].items():
        # An element whose gradient is rounding noise may go either way for a step or two.
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=5e-5, msg=key)


@pytest.fixture(scope="module")
def single_bf16(single: dict[str, Any], store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in bf16."""
    return trained(store, tmp_path_factory.mktemp("single-bf16"), 1, *WHOLE, *single["overrides"], *BF16)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_bf16_is_that_of_one_device_and_near_float32(
    single: dict[str, Any], single_bf16: dict[str, Any], name: str, store: Path, tmp_path: Path
) -> None:
    seen = trained(store, tmp_path, 2, *spread(name), *single["overrides"], *BF16)
    # Autocast keeps norms in float32, engines do not: losses of any two strategies differ by up to 5.4e-5, gradient
    # norms by up to 1.2e-2 (all pairs, adamw and mup).
    assert seen["losses"][1] == pytest.approx(single_bf16["losses"][1], rel=2e-5)
    assert seen["losses"] == pytest.approx(single_bf16["losses"], rel=2e-4)
    assert seen["norms"] == pytest.approx(single_bf16["norms"], rel=3e-2)
    assert seen["losses"] == pytest.approx(single["losses"], rel=2e-2)
    assert seen["losses"] != single["losses"]
    # The weights that are kept are the fp32 ones: not all of them happen to be bf16 numbers.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in exported(tmp_path).state_dict().values())


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The weights that one device begins with."""
    return run(jobs.initial, 1, store, tmp_path_factory.mktemp("whole"), [*OPTIMIZERS["mup"], "parallel=single"])[0]


@pytest.mark.parametrize("name", ["zero1", "zero3", "fsdp"])
def test_shards_begin_with_the_values_of_one_device(
    whole: dict[str, np.ndarray], name: str, store: Path, tmp_path: Path
) -> None:
    mup = OPTIMIZERS["mup"]
    for precision in ("32", "bf16"):
        parts = run(jobs.initial, 2, store, tmp_path, [*mup, f"parallel={name}", f"trainer.precision={precision}"])
        found = {key: np.zeros_like(value) for key, value in whole.items()}
        for part in parts:
            for key, (start, values) in part.items():
                found[key].reshape(-1)[start : start + values.size] = values
        for key, value in whole.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
        held = [sum(values.size for _, values in part.values()) for part in parts]
        assert max(held) < 0.6 * sum(value.size for value in whole.values())

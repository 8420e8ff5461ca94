"""Fine-tuning with frozen weights under the strategies: the steps of one device, what is frozen to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swift.config.compose import typed
from swift.inference.embedding import embed_batch
from swift.parallel.setup import resolve
from swift.train.init_weights import start_from
from swift.train.wiring import build_module
from tests.cohort import task_command
from tests.distributed import tasks
from tests.distributed.ranks import run
from tests.distributed.strategies import BF16, OPTIMIZERS, TWO, WHOLE, exported, stopped
from tests.small import GRID, composed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = ["trainer.max_steps=6", "trainer.val_every=6", "trainer.checkpoint_every=3", "optimizer.lr=0.01"]
CASES = {
    ("lora", "mup"): ("zero3", "fsdp"),
    ("last_block", "adamw"): ("zero2", "zero3"),
    ("attentive", "mup"): ("zero3",),
    ("linear", "adamw"): ("zero1",),
    ("full", "mup"): ("zero3",),
}
"""adapt, optimizer -> strategies."""


class Alone:
    """Runs on one device that those of two ranks are compared with; each is made once."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder, self.runs = folder, runs
        self._made: dict[Any, Any] = {}

    def pretrained(self, optimizer: str) -> Path:
        """Two steps of pre-training."""
        path = self.runs / optimizer
        if not path.exists():
            own = ["task=pretrain", "trainer.max_steps=2", "trainer.val_every=2", "trainer.val_batches=1"]
            run(tasks.steps, 1, self.folder, path, [*own, *OPTIMIZERS[optimizer]])
        return path

    def settings(self, adapt: str, optimizer: str) -> list[str]:
        """Of a fine-tuning."""
        own = ["task=synthetic_binary", f"task.adapt={adapt}", f"init={self.pretrained(optimizer)}"]
        return [*own, *RUN, *OPTIMIZERS[optimizer]]

    def tuned(self, adapt: str, optimizer: str) -> dict[str, Any]:
        """Figures of the fine-tuning, its model, and every parameter as it began."""
        key = adapt, optimizer
        if key not in self._made:
            own, run_dir = [*self.settings(*key), *WHOLE], self.runs / f"{adapt}-{optimizer}"
            seen = run(tasks.steps, 1, self.folder, run_dir, own)[0]
            module = build_module(resolve(typed(composed(*task_command(self.folder, run_dir, *own)))))
            start_from(module, str(self.pretrained(optimizer)))
            first = {name: parameter.detach() for name, parameter in module.model.named_parameters()}
            trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
            self._made[key] = seen | {"model": exported(run_dir), "first": first, "trained": trained}
        made: dict[str, Any] = self._made[key]
        return made


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(folder, tmp_path_factory.mktemp("alone"))


def embedding(model: Any) -> np.ndarray:
    """Of two noisy clips."""
    bold = torch.randn(2, 1, *GRID, 8, generator=torch.Generator().manual_seed(0))
    return embed_batch(model.encoder, bold, torch.ones(2, *GRID, dtype=torch.bool), [1])[0].numpy()


@pytest.mark.parametrize(
    ("adapt", "optimizer", "name"), [(*case, name) for case, names in CASES.items() for name in names]
)
def test_two_ranks_tune_as_one_device_does(
    alone: Alone, adapt: str, optimizer: str, name: str, folder: Path, tmp_path: Path
) -> None:
    one, own = alone.tuned(adapt, optimizer), [*alone.settings(adapt, optimizer), f"parallel={name}", *TWO]
    seen = run(tasks.steps, 2, folder, tmp_path / "whole", own)[0]
    assert seen["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert seen["norms"] == pytest.approx(one["norms"], rel=1e-4)
    model = exported(tmp_path / "whole")
    found = dict(model.named_parameters())
    assert found.keys() == one["first"].keys()
    for key, wanted in one["model"].named_parameters():
        assert torch.equal(found[key], one["first"][key]) == (key not in one["trained"]), key
        torch.testing.assert_close(found[key], wanted, rtol=1e-4, atol=5e-6, msg=key)
    np.testing.assert_allclose(embedding(model), embedding(one["model"]), rtol=0, atol=1e-5)

    again = run(tasks.steps, 2, folder, stopped(tmp_path / "whole", tmp_path / "cut", 3), own)[0]
    assert again["losses"] == {step: seen["losses"][step] for step in (4, 5, 6)}
    for key, value in exported(tmp_path / "cut").named_parameters():
        assert torch.equal(value, found[key]), key


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_frozen_weights_keep_their_digits_where_bf16_computes(
    alone: Alone, name: str, folder: Path, tmp_path: Path
) -> None:
    """Also after a resume, which reads what was saved."""
    before = dict(exported(alone.pretrained("adamw")).encoder.named_parameters())
    own = [*alone.settings("linear", "adamw"), f"parallel={name}", *TWO, *BF16]
    run(tasks.steps, 2, folder, tmp_path / "run", own, 3)
    run(tasks.steps, 2, folder, tmp_path / "run", own)
    for key, value in exported(tmp_path / "run").encoder.named_parameters():
        assert torch.equal(value, before[key]), key

"""A run with data.brain=cohort: its tokens are frozen into it, and whoever takes it up has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from swift.config.compose import load_frozen, typed
from swift.data.store.reader import Store
from swift.inference.export import export
from swift.inference.model import load_trained
from swift.utils.bits import from_text
from swift.utils.errors import UserError
from tests.runs import QUIET, start
from tests.small import command, composed

BRAIN = ["model.tokens=brain", "model.patch_size=[2,2,2,2]", "data.brain=cohort", QUIET]


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps; read only."""
    folder = tmp_path_factory.mktemp("cohort")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFT_CACHE", str(folder / "cache"))
        start(*command(store, folder / "run", *BRAIN, "trainer.max_steps=2", "trainer.val_every=2"))
    return folder / "run"


@pytest.mark.usefixtures("alone")
def test_the_union_is_frozen_into_the_run(store: Path, run: Path, tmp_path: Path) -> None:
    masks = [Store(store).mask(place) for place in range(2)]
    blocks = np.stack(masks).any(0).reshape(6, 2, 6, 2, 6, 2)
    cohort = load_frozen(run, []).model.cohort
    assert cohort is not None
    assert np.array_equal(from_text(cohort), blocks.any((1, 3, 5)))
    exported = tmp_path / "model.safetensors"
    export(run, exported)
    for path in (run, exported):
        trained = load_trained(path)
        assert trained.config.model.cohort == cohort
        own = [torch.from_numpy(mask)[None] for mask in masks]
        sets = [trained.encoder.token_sets(brain, torch.zeros(1, 1, 12, 12, 12, 8)) for brain in own]
        assert sets[0] is not None
        assert sets[0] is sets[1]
        assert len(sets[0][0]) == from_text(cohort).sum() < 6**3


def test_a_run_that_goes_on_keeps_it(run: Path) -> None:
    """It is refused on another grid, and is not given up."""
    with pytest.raises(UserError, match=r"data.grid=\[16, 12, 12\].*model.cohort was made for 6x6x6"):
        load_frozen(run, ["data.grid=[16,12,12]"])
    with pytest.raises(UserError, match=r"data\.brain=scan: a resumed run keeps the tokens"):
        load_frozen(run, ["data.brain=scan"])


def test_what_begins_with_its_weights_looks_at_its_own_stores(store: Path, run: Path, tmp_path: Path) -> None:
    for brain in ("scan", "cohort"):
        words = ["data=store", f"data.path={store}", f"run_dir={tmp_path}", f"init={run}", f"data.brain={brain}"]
        words += ["data.grid=[12,12,12]", "data.frames=8"]
        cfg = typed(composed(*words), words)
        assert (cfg.model.tokens, cfg.model.cohort) == ("brain", None)

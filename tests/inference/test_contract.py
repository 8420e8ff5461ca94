"""The input contract goes with every checkpoint: what a model must be fed can be read from its weights' file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from swift.data.module import ClipDataModule
from swift.data.store.spaces import MNI, OWN
from swift.inference.contract import Contract
from swift.inference.fit_scan import Fitting, find_scans, fit
from swift.train.pretrain import PretrainModule
from tests import small
from tests.data import scans

CONTRACT = {
    "grid": [12, 12, 12],
    "spacing": 4.0,
    "orientation": "RAS",
    "frames": 8,
    "frame_stride": 1,
    "clip_stride": 4,
    "normalization": "robust",
    "background": -2.0,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.small_store(tmp_path_factory.mktemp("contract") / "store")


def trained(store: Path) -> tuple[pl.Trainer, PretrainModule]:
    """One step of a small model."""
    cfg = small.settings("data.normalization=robust", "data.background=-2.0", "trainer.log_every=5")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PretrainModule(cfg)
    trainer.fit(module, datamodule=ClipDataModule(cfg.data, store, cfg.seed))
    return trainer, module


def told(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The contract as the frozen settings in a checkpoint tell it."""
    return {"orientation": "RAS"} | {
        name: checkpoint["config"]["data"][name] for name in CONTRACT if name != "orientation"
    }


@pytest.mark.filterwarnings("ignore")
def test_every_checkpoint_has_it(store: Path, tmp_path: Path) -> None:
    trainer, module = trained(store)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    full = torch.load(tmp_path / "full.ckpt", weights_only=True)
    assert full["ClipDataModule"]["contract"] == CONTRACT
    assert told(full) == CONTRACT
    assert told(torch.load(tmp_path / "weights.ckpt", weights_only=True)) == CONTRACT  # without the trainer's state too
    del module.cfg
    with pytest.raises(AttributeError):
        trainer.save_checkpoint(tmp_path / "without.ckpt")
    assert not (tmp_path / "without.ckpt").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_run_writes_it(store: Path, tmp_path: Path) -> None:
    """The checkpoints of `python -m swift.train`."""
    from swift.config.compose import typed
    from swift.parallel.checkpoint.files import Manifest, candidates
    from swift.train.run import train

    changes = ["data.normalization=robust", "data.background=-2.0", "trainer.max_steps=2", "trainer.figures=false"]
    cfg = typed(small.composed(*small.command(store, tmp_path / "run", *changes)))
    train(cfg)
    saved = candidates(tmp_path / "run" / "checkpoints")
    assert saved
    for path in saved:
        state = Manifest.read(path).state
        assert state["ClipDataModule"]["contract"] == CONTRACT
        assert told(state) == CONTRACT


@pytest.mark.parametrize("trained_on", [MNI, OWN, ""])
@pytest.mark.parametrize("space", ["MNI152NLin6Asym", "T1w"])
def test_another_placement_than_that_of_training_is_noted(trained_on: str, space: str, tmp_path: Path) -> None:
    path = scans.save(tmp_path / f"sub-1_space-{space}_bold.nii.gz", scans.bold(8))
    scans.save(tmp_path / f"sub-1_space-{space}_bold_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    contract = Contract.of({**CONTRACT, "grid": [24, 24, 24], "placement": trained_on}, "test")
    fitted = fit(find_scans([path], contract)[0], contract, Fitting())
    here = MNI if space.startswith("MNI") else OWN
    assert (fitted.space, fitted.placement) == (space, here)
    noted = f"grid placed by {here}, but the model was trained on {trained_on}" in fitted.notes
    assert noted == (trained_on not in ("", here))
    assert sum("but the model was trained on" in note for note in fitted.notes) == noted

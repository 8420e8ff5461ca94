"""Trouble planted in a training at given steps, what a guard should make of it, and a plain loop to compare with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from swift.config.compose import CHECKPOINTS, typed
from swift.data.module import ClipDataModule
from swift.models.autoencoder import reconstruction_loss
from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.setup import resolve
from swift.train.optim import lr_factor
from swift.train.wiring import build_data, build_module
from swift.utils.errors import UserError
from tests.distributed import jobs
from tests.small import command, composed

MARK = 77.0
"""In a corner of a clip: the gradient of this batch is to become NaN."""
LAYER = "model.encoder.stages.0.blocks.0"
WEIGHT = "model.encoder.patch_embed.proj.weight"


class Plants(pl.Callback):
    """Before optimizer step `step` (counted from 1), on rank `rank`: trouble of some kind in its last micro-batch.

    Args:
        plants: (step, rank, kind): nan | inf | gradient | spike | weight.
    """

    def __init__(self, plants: list[tuple[int, int, str]]) -> None:
        self.plants = plants
        self.seen: dict[int, dict[str, Any]] = {}
        """Step -> the clip that was spoilt."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        accumulate = trainer.accumulate_grad_batches
        for step, rank, kind in self.plants:
            if batch_idx != step * accumulate - 1:
                continue
            if kind == "weight":
                spoil_weight(trainer.strategy)
            elif rank == trainer.global_rank:
                spoil(batch["bold"], kind)
                names = ("sample_id", "scan", "start")
                self.seen[step] = {name: int(batch[name][-1]) for name in names}


def spoil(bold: torch.Tensor, kind: str) -> None:
    """Change a batch in place: its last clip, or all of it."""
    if kind == "spike":
        bold.mul_(1000.0)
    elif kind == "gradient":
        bold[-1, 0, 0, 0, 0, 0] = MARK
    else:
        bold[-1, 0, 6, 6, 6, 3] = float(kind)


def spoil_weight(strategy: Any) -> None:
    for piece in strategy.pieces(moments=False):
        if piece.name == WEIGHT and piece.start == 0:
            piece.tensors["weight"][0] = float("nan")
    strategy.refresh()


def sabotage(module: pl.LightningModule) -> None:
    """From now on the gradient at the output of LAYER is NaN for batches with a mark."""
    marked = False

    def look(part: Any, inputs: Any) -> None:
        nonlocal marked
        marked = bool((inputs[0] == MARK).any())

    def spoil_gradient(part: Any, inputs: Any, output: torch.Tensor) -> None:
        if marked and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    module.model.register_forward_pre_hook(look)
    module.get_submodule(LAYER).register_forward_hook(spoil_gradient)


def train(store: Path, run_dir: Path, overrides: list[str], plants: list[tuple[int, int, str]]) -> dict[str, Any]:
    """Train with trouble, going on from a checkpoint if there is one; what this rank saw."""
    said = jobs.Lines()
    logging.getLogger("swift").addHandler(said)
    module, data, trainer = jobs.build(store, run_dir, overrides)
    sabotage(module)
    planted, recorder = Plants(plants), jobs.Recorder()
    trainer.callbacks[:0] = [planted, recorder]
    folder = run_dir / CHECKPOINTS
    error = None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=folder if checkpoint.exists(folder) else None, weights_only=True)
    except UserError as raised:
        error = str(raised)
    finally:
        logging.getLogger("swift").removeHandler(said)
    bad = trainer.strategy.bad_weights() if error is None else None
    seen = {"losses": recorder.losses, "samples": recorder.samples, "norms": recorder.norms, "planted": planted.seen}
    return seen | {"warnings": said.lines, "error": error, "bad_weights": bad}


def reference(store: Path, overrides: list[str], ranks: int, left_out: list[int]) -> dict[str, Any]:
    """A plain loop over the same batches that does not step at some: weights, moments and Adam's count at its end."""
    cfg = typed(composed(*command(store, Path("nowhere"), "trainer.accelerator=cpu", *overrides)))
    module = build_module(resolve(cfg))
    optimizer = module.configure_optimizers()["optimizer"]
    loaders = []
    for rank in range(ranks):
        data = build_data(cfg) if ranks == 1 else ClipDataModule(cfg.data, store, cfg.seed, rank, ranks)
        loaders.append((data, iter(data.train_dataloader())))
    accumulate = cfg.trainer.accumulate
    for step in range(cfg.trainer.max_steps):
        optimizer.zero_grad()
        for data, loader in loaders:
            for _ in range(accumulate):
                batch = data.dense(next(loader))
                prediction, mask = module.reconstruct(batch)
                counted = module.counted_voxels(batch, mask)
                loss = reconstruction_loss(prediction, batch["bold"], counted, cfg.task.loss)
                (loss / accumulate / ranks).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.clip_norm)
        factor = lr_factor(step, cfg.optimizer.warmup_steps, cfg.trainer.max_steps, cfg.optimizer.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = cfg.optimizer.lr * factor
        if step + 1 not in left_out:
            optimizer.step()
    named = {name: parameter for name, parameter in module.named_parameters() if parameter in optimizer.state}
    found = {f"weight/{name}": parameter.detach() for name, parameter in named.items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        found |= {f"{kind}/{name}": optimizer.state[parameter][kind] for name, parameter in named.items()}
    steps = max(int(state["step"]) for state in optimizer.state.values())
    return {"tensors": found, "steps": steps}


def checkpointed(run_dir: Path, names: list[str]) -> dict[str, Any]:
    """The same of the last checkpoint of a run."""
    path = checkpoint.finished(run_dir / CHECKPOINTS)[0]
    manifest = checkpoint.Manifest.read(path)
    reader = checkpoint.Reader(path, manifest)
    tensors = {name: reader.whole(*name.split("/", 1)) for name in names}
    return {"tensors": tensors, "steps": manifest.optimizer_steps}

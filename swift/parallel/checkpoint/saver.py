"""How a running training saves and goes on: each rank writes what it holds, in the background, and rank 0 commits.

What a save costs a step: one agreement of all ranks, and a copy of this rank's states to host memory (12 bytes a
parameter, divided by the ranks; ZeRO has no other cost, and nothing is gathered). On a GPU the copy goes to page-locked
memory, kept from save to save, on a stream of its own beside the next forward and backward passes; the optimizer step
after them waits for it, on the device. Files are written by a thread while training goes on; only a save that comes
before the last one is on the disk has to wait for it.

No generator is saved: order, masks and dropout are functions of the seed and of counters.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint.files import Damaged, Manifest, Piece, Reader, tensor_key
from swift.parallel.checkpoint.write import Entry, Written, write_safetensors, write_text
from swift.utils import device
from swift.utils.errors import UserError

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
STALL = "perf/save_stall_seconds"
"""Metric: how long training stood still for a save."""


def gather(value: Any, world: int) -> list[Any]:
    """The value of every rank, in order of rank; all of the `world` ranks call it together."""
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        rank, world: Of this process.
        keep: Checkpoints to keep beside the best.
        background: Write while training goes on.
        timeout: Seconds that rank 0 waits for the files of the others.
    """

    def __init__(self, rank: int, world: int, keep: int, background: bool, timeout: float) -> None:
        self.rank, self.world, self.keep, self.background, self.timeout = rank, world, keep, background, timeout
        self.where = torch.device("cpu")
        """The device of this rank."""
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        self._copy: device.HostCopy | None = None
        self._buffers: dict[str, Tensor] = {}

    def save(self, folder: Path, pieces: Sequence[Piece], draft: Manifest) -> None:
        """Write a checkpoint; all ranks call it together.

        Args:
            folder: Of the run's checkpoints.
            pieces: What this rank holds; those it owns are written.
            draft: The manifest, without files and ranges.

        Raises:
            UserError: an earlier save has failed, or this one cannot be written, on any rank.
        """
        self.finish()
        fresh = self._begin(folder)
        # A copy, as the next step changes the live tensors.
        owned = [piece for piece in pieces if piece.owned]
        live = {tensor_key(kind, piece.name): tensor for piece in owned for kind, tensor in piece.tensors.items()}
        copy = self._copy = device.HostCopy(live, self.where, self._buffers)
        ranges = {tensor_key(kind, piece.name): [piece.start, piece.stop] for piece in owned for kind in piece.tensors}
        self._thread = threading.Thread(
            target=self._guarded, args=(folder, fresh, copy, ranges, draft), name="checkpoint"
        )
        self._thread.start()
        if not self.background:
            self.finish()

    def before_step(self) -> None:
        """To be called before the states are changed: lets the device wait for a copy of them that is under way."""
        if self._copy is not None:
            self._copy.hold()
            self._copy = None

    def settle(self) -> None:
        """Wait until this rank's part of the last save is on the disk; unlike `finish` it asks no other rank."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Wait until the last save is on the disk; all ranks call it together.

        Raises:
            UserError: it has failed, on any rank.
        """
        self.settle()
        self._agree_on_errors()

    def _agree_on_errors(self) -> None:
        error, self._error = self._error, None
        messages = gather(None if error is None else str(error), self.world)
        if first := next((message for message in messages if message), None):
            raise UserError(first)

    def _begin(self, folder: Path) -> Path:
        fresh = ""
        if self.rank == 0:
            try:
                fresh = checkpoint.begin(folder).name
            except UserError as error:
                self._error = error
        self._agree_on_errors()
        return folder / str(gather(fresh, self.world)[0])

    def _guarded(self, folder: Path, fresh: Path, copy: device.HostCopy, *rest: Any) -> None:
        try:
            self._write(folder, fresh, copy.wait(), *rest)
        except UserError as error:
            self._error = error
        except OSError as error:
            self._error = UserError(f"checkpoint {fresh} cannot be written ({error.strerror or error})")
        except Exception as error:  # of a thread: nobody else would hear of it
            self._error = UserError(f"checkpoint {fresh} was not written ({type(error).__name__}: {error})")
        if self._error is not None and self.rank == 0:
            # The room is needed, above all if it ran out.
            shutil.rmtree(fresh, ignore_errors=True)

    def _write(
        self, folder: Path, fresh: Path, copies: dict[str, Tensor], ranges: dict[str, list[int]], draft: Manifest
    ) -> None:
        """The file of this rank and a note about it; on rank 0 the rest of the checkpoint."""
        note: dict[str, Any]
        try:
            entries = [Entry(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in copies.items()]  # type: ignore[misc]
            written = write_safetensors(fresh / _file(self.rank), entries, {"step": str(draft.step)})
            note = {"written": written, "ranges": ranges}
        except UserError as error:
            note = {"error": str(error)}
        if self.rank:
            write_text(fresh / f"{_file(self.rank)}.json", json.dumps(note))
            return
        notes = [note, *(self._note_of(fresh, rank) for rank in range(1, self.world))]
        if failed := next((note["error"] for note in notes if "error" in note), None):
            raise UserError(failed)
        draft.files = {_file(rank): Written(*note["written"]) for rank, note in enumerate(notes)}
        draft.ranges = {_file(rank): note["ranges"] for rank, note in enumerate(notes)}
        checkpoint.commit(folder, fresh, draft)
        checkpoint.prune(folder, self.keep)

    def _note_of(self, fresh: Path, rank: int) -> dict[str, Any]:
        """What another rank says about its file: through the folder, as collectives belong to the training thread."""
        path = fresh / f"{_file(rank)}.json"
        until = time.monotonic() + self.timeout
        while not path.exists():
            if time.monotonic() > until:
                raise UserError(f"checkpoint {fresh}: rank {rank} has not written its part in {self.timeout:.0f} s")
            time.sleep(_POLL_SECONDS)
        note: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return note


def restore(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    pieces: Callable[[int], Sequence[Piece]],
    rank: int,
    world: int,
) -> tuple[Path, Manifest]:
    """Load the latest checkpoint that is whole; all ranks call it together.

    Args:
        folder: Of the run's checkpoints.
        shapes: Of the parameters of the model.
        pieces: Makes what this rank holds, with Adam's count set.
        rank, world: Of this process.

    Returns:
        The checkpoint that was taken and its manifest.

    Raises:
        UserError: none is whole, or it is of another model.
    """
    names = gather([path.name for path in checkpoint.candidates(folder)] if rank == 0 else [], world)[0]
    for place, name in enumerate(names):
        manifest, trouble = read_verified(folder / name, rank, world)
        if trouble is None:
            assert manifest is not None
            checkpoint.compare_shapes(folder / name, manifest.shapes, shapes)
            try:
                Reader(folder / name, manifest).fill(pieces(manifest.optimizer_steps))
            except Damaged as error:  # its files are what they were: it never was of this run
                raise UserError(f"{folder / name} cannot be gone on from: {error}") from error
            return folder / name, manifest
        if rank == 0:
            then = f"going on from {names[place + 1]}" if place + 1 < len(names) else "and there is none before it"
            log.warning("checkpoint %s is damaged (%s): %s", name, trouble, then)
    raise UserError(f"{folder}: no checkpoint there can be read")


def read_verified(path: Path, rank: int, world: int) -> tuple[Manifest | None, str | None]:
    """The manifest of a checkpoint, and what is damaged in it if anything; the ranks share the work and agree.

    Raises:
        UserError: written by a later version of swift.
    """
    manifest, trouble, refused = None, None, None
    try:
        manifest = Manifest.read(path)
        checkpoint.verify(path, manifest, rank, world)
    except Damaged as error:
        trouble = str(error)
    except UserError as error:
        refused = str(error)
    answers = gather((trouble, refused), world)
    if first := next((refused for _, refused in answers if refused), None):
        raise UserError(first)
    return manifest, next((trouble for trouble, _ in answers if trouble), None)


class SaveCheckpoints(pl.Callback):
    """Saves at validations, every so many optimizer steps, and at the end of training.

    Args:
        folder: Of the run's checkpoints.
        saver: Of the strategy.
        every: Optimizer steps; 0: at validations only.
        monitor: Metric of a validation by which checkpoints are compared, lower is better.
    """

    def __init__(self, folder: Path, saver: Saver, every: int, monitor: str = "val/l1") -> None:
        self.folder, self.saver, self.every, self.monitor = folder, saver, every, monitor
        self.saved = -1
        """Optimizer step of the last save."""
        self._score: float | None = None
        self._data: Any = None
        self._consumed: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What a resumed run starts from is saved already."""
        self.saved = trainer.global_step if trainer.global_step else -1
        self._data = trainer.datamodule  # type: ignore[attr-defined]  # set at run time
        self._consumed = getattr(self._data, "consumed", None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note how far the data have been used, and save between validations."""
        self._consumed = getattr(self._data, "consumed", None)
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self.every or trainer.global_step % self.every:
            return
        if not self._validates(trainer):
            self._save(trainer, None)

    def on_before_optimizer_step(self, *_: Any) -> None:
        """The copy of a save must not see what this step changes."""
        self.saver.before_step()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save with the score of this validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer, trainer.callback_metrics.get(self.monitor))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step, and wait until it is on the disk."""
        if self.saved != trainer.global_step:
            self._save(trainer, None)
        self.saver.finish()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the score; count the samples of finished steps, also when the next batch has been fetched already."""
        checkpoint["score"] = self._score
        if self._consumed is not None:
            checkpoint[type(self._data).__qualname__]["consumed"] = self._consumed

    def _validates(self, trainer: pl.Trainer) -> bool:
        """Whether a validation follows this batch, after which the checkpoint is saved with its score."""
        loop = trainer.fit_loop.epoch_loop
        assert isinstance(trainer.val_check_batch, int)
        return sum(trainer.num_val_batches) > 0 and (loop.batch_idx + 1) % trainer.val_check_batch == 0

    def _save(self, trainer: pl.Trainer, metric: Any) -> None:
        value = None if metric is None else float(metric)
        self._score = value if value is not None and math.isfinite(value) else None
        self.saved = trainer.global_step
        began = time.monotonic()
        trainer.save_checkpoint(self.folder)
        stall = {STALL: time.monotonic() - began}
        for logger in trainer.loggers:
            logger.log_metrics(stall, step=trainer.global_step)

"""Steps whose numbers are bad: left out on all ranks alike, with a record of what and where it was.

The decision is made when the gradient norm of an optimizer step is there and nothing has been changed yet
(`swift.parallel.step_gate`), from the mean loss and the norm over all ranks: one all-reduce of four numbers. A step
that is left out changes no weight, no moment and no count of Adam. Step number, learning rate and next batch are what
they would have been.

The device compares these numbers with limits that the host has made from the steps before, and the host reads them when
the passes of the next step have been launched and its weights are not changed yet: so nobody waits, and a bad step is
looked at with the weights it had. Where anything depends on the verdict (a log line, a checkpoint, a validation, the
end; guard.action=stop or rollback; DeepSpeed, which asks the host) it is read at the end of the step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from swift.config.schema import Config
from swift.parallel.checkpoint.saver import gather
from swift.plan.memory import HELD_BYTES
from swift.train.callbacks import incident
from swift.train.callbacks.log import JsonlLogger
from swift.train.callbacks.nonfinite import Trace, describe
from swift.train.callbacks.spike import GRADIENT, NEW_LEVEL, Verdict, Watch
from swift.utils import device
from swift.utils.errors import UserError

log = logging.getLogger(__name__)

ROWS, CLIPS = ("sample_id", "scan", "start", "valid"), ("bold", "brain")
"""Entries of a batch: where its clips come from, and the clips themselves."""
Aside = Callable[[], AbstractContextManager[None]]
"""Makes a context for further passes, in which gradients are put aside or given up."""


@dataclass
class Micro:
    """A micro-batch of the step under way.

    Attributes:
        number: Of the batch, as Lightning counts.
        batch: As the training step gets it; without its clips where too much would be held.
        whole: Whether it has them.
        loss: Divided by the micro-batches of a step.
    """

    number: int
    batch: dict[str, Any]
    whole: bool
    loss: Tensor | None = None


@dataclass
class Pending:
    """A step whose numbers are on their way to the host.

    Attributes:
        copy: numbers (5,): sums over ranks of loss, norm, losses and norms that are not finite; whether the device has
            left the step out.
        warm: Whether its warm-up was over.
        micros: Its micro-batches.
    """

    copy: device.HostCopy
    warm: bool
    micros: list[Micro]


class Guard(pl.Callback):
    """Leaves out bad optimizer steps, or ends or rolls back the run there; see `swift.config.schema.GuardConfig`.

    Must come before the callback that saves checkpoints. Its state is in them.

    Args:
        cfg: Of the run.
        run_dir: Folder of the run.
        checkpoints: Folder to roll back from.
    """

    def __init__(self, cfg: Config, run_dir: Path, checkpoints: Path) -> None:
        self.cfg, self.guard, self.run_dir, self.checkpoints = cfg, cfg.guard, run_dir, checkpoints
        self.watch = Watch(self.guard.window, self.guard.spike, self.guard.patience)
        self.records = self.batches = 0
        """Written so far."""
        self._micros: list[Micro] = []
        self._pending: Pending | None = None
        self._looking = False

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on."""
        assert self._pending is None, "a step is judged before it is saved"
        return {"watch": self.watch.state_dict(), "records": self.records, "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Decide like the run that was saved."""
        self.watch.load_state_dict(state_dict["watch"])
        self.records, self.batches = state_dict["records"], state_dict["batches"]

    # ------------------------------------------------------------------------------------------ in every step
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide about every step from now on."""
        strategy: Any = trainer.strategy
        strategy.skip_steps_by(lambda norm: self._is_bad(trainer, pl_module, norm))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold the batch until the step is judged."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._micros = []
        held = sum(_bytes(micro.batch) for micro in self._micros)
        whole = not self._micros or held + _bytes(batch) <= HELD_BYTES or not all(name in batch for name in ROWS)
        kept = batch if whole else {name: value for name, value in batch.items() if name not in CLIPS}
        self._micros.append(Micro(batch_idx, kept, whole))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss; nothing waits for it."""
        if not self._looking:
            self._micros[-1].loss = loss.detach()

    def _is_bad(self, trainer: pl.Trainer, module: pl.LightningModule, norm: Tensor) -> Tensor:
        """Whether to leave the step out, a bool () on the device; all ranks come to the same answer."""
        if self._looking:
            return torch.tensor(True)
        strategy: Any = trainer.strategy
        if self._pending is not None:
            self._settle(trainer, module, strategy.kept_gradients)
        where = trainer.strategy.root_device
        losses = [micro.loss for micro in self._micros if micro.loss is not None]
        values = torch.stack([torch.stack(losses).float().sum().to(where), norm.detach().float().to(where)])
        good = torch.isfinite(values)
        sums = torch.cat([torch.where(good, values, 0.0), (~good).float()])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        warm = trainer.global_step >= self.cfg.optimizer.warmup_steps
        limits = self.watch.limits(warm)
        means = sums[:2].double() / trainer.world_size  # as the host divides and compares
        over = (means[0] > limits["loss"]) | (means[1] > limits["norm"])
        bad: Tensor = over | (sums[2:] > 0).any() | ~torch.isfinite(sums).all()
        self._pending = Pending(
            device.HostCopy({"numbers": torch.cat([sums, bad.float()[None]])}, where, {}), warm, self._micros
        )
        return bad

    def settle(self, trainer: pl.Trainer) -> None:
        """Judge the last step now, if it is not judged yet; all ranks together, and before the next step's passes."""
        strategy: Any = trainer.strategy
        if self._pending is not None:
            self._settle(trainer, trainer.lightning_module, strategy.without_gradients)

    def _settle(self, trainer: pl.Trainer, module: pl.LightningModule, aside: Aside) -> None:
        """Judge the pending step and answer if it was bad, `aside` around further passes. The weights are its own."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        loss, size, bad_losses, bad_norms, left_out = pending.copy.wait()["numbers"].tolist()
        verdict = self.watch.decide(
            float("nan") if bad_losses else loss / trainer.world_size,
            float("nan") if bad_norms else size / trainer.world_size,
            pending.warm,
        )
        assert verdict.bad == bool(left_out), "the device and the host decide the same"
        if verdict.kind == NEW_LEVEL and trainer.is_global_zero:
            log.warning(
                "step %d: loss %.4g, gradient norm %.4g, after %d spikes in a row: taken for the new level",
                *(trainer.global_step, verdict.loss, verdict.norm, self.guard.patience),
            )
        if verdict.bad:
            current, self._micros = self._micros, pending.micros
            self._answer(trainer, module, verdict, aside)
            self._micros = current

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last micro-batch of a step: judge it now if anything depends on it, else when the next is there."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._asked_now(trainer, batch_idx):
            self.settle(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No step follows."""
        self.settle(trainer)

    def _asked_now(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Whether something at the end of this step depends on its verdict, or waits for the device anyway."""
        strategy, step, cfg = trainer.strategy, trainer.global_step, self.cfg.trainer
        return (
            self.guard.action != "skip"
            or not strategy.asks_late  # type: ignore[attr-defined]  # of swift's strategies
            or step % (cfg.log_every or 1) == 0
            or (cfg.checkpoint_every > 0 and step % cfg.checkpoint_every == 0)
            or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0  # infinite where nothing is validated
            or step >= trainer.max_steps
        )

    # ------------------------------------------------------------------------------------------ after a bad step
    def _answer(self, trainer: pl.Trainer, module: pl.LightningModule, verdict: Verdict, aside: Aside) -> None:
        strategy: Any = trainer.strategy
        step = trainer.global_step
        weights = strategy.bad_weights()
        keep = self.records < self.guard.records and self.batches < self.guard.batches
        found = {}
        if keep and not verdict.spike:
            with aside():
                found = self._look_again(trainer, module, verdict.kind == GRADIENT)
        losses = [float("nan") if micro.loss is None else float(micro.loss) for micro in self._micros]
        mine = {"rank": trainer.global_rank, "losses": losses, "found": found, "bad_weights": weights}
        ranks = gather(mine, trainer.world_size)
        chosen = incident.suspects(ranks, verdict)
        details = None
        if trainer.global_rank in chosen and self.records < self.guard.records:
            details = self._details(trainer, chosen[trainer.global_rank], found)
        reports = [report for report in gather(details, trainer.world_size) if report is not None]
        bad_weights = {name: count for rank in ranks for name, count in rank["bad_weights"].items()}
        place = incident.step_folder(self.run_dir, step)
        reason = self._keep(trainer, place, chosen, found) if keep else None
        if self.records < self.guard.records:
            self.records += 1
            if trainer.is_global_zero:
                record = self._record(step, verdict, ranks, reports, bad_weights) | {"batch_kept": reason}
                incident.write_record(place / incident.RECORD, record)
        self._log_step(trainer, step, verdict, reports, bad_weights, place)
        self._act(trainer, step, verdict, bad_weights)

    def _look_again(self, trainer: pl.Trainer, module: pl.LightningModule, backward: bool) -> dict[int, Any]:
        """Run the micro-batches of the step again, with hooks: micro-batch -> what came first. All ranks together."""
        strategy: Any = trainer.strategy
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        found: dict[int, Any] = {}
        self._looking = True
        progress.completed -= 1  # the step is over, but dropout was drawn by the number it had
        before = dict(vars(module))  # a training step may note something in its module
        vars(module).update({name: lambda *args, **kwargs: None for name in ("log", "log_dict")})
        try:
            for place, micro in enumerate(self._micros):
                batch = self._batch(trainer, micro)
                grad, eager = torch.set_grad_enabled(backward), torch.compiler.set_stance("force_eager")
                with device.kept_random(strategy.root_device), grad, eager, Trace(module) as trace:
                    output = strategy.training_step(batch, micro.number)
                    loss = output["loss"] if isinstance(output, Mapping) else output
                    if backward:
                        strategy.backward(loss / trainer.accumulate_grad_batches, None)
                if backward:
                    strategy.discard()
                if trace.first is not None:
                    found[place] = trace.first
                elif not bool(torch.isfinite(loss.detach())):
                    found[place] = {"pass": "forward", "layer": "loss", "what": "output", **describe(loss)}
        finally:
            self._looking = False
            progress.completed += 1
            vars(module).clear()
            vars(module).update(before)
        return found

    def _batch(self, trainer: pl.Trainer, micro: Micro) -> dict[str, Any]:
        """The batch of a micro-batch, its clips read again where they were not held."""
        if micro.whole:
            return micro.batch
        rows = list(zip(*(micro.batch[name].long().tolist() for name in ROWS)))
        dense = incident.read_again(trainer.datamodule, rows)  # type: ignore[attr-defined]
        return micro.batch | {name: dense[name].to(trainer.strategy.root_device) for name in CLIPS}

    def _details(self, trainer: pl.Trainer, place: int, found: dict[int, Any]) -> dict[str, Any]:
        """The report of this rank about its micro-batch `place`."""
        micro = self._micros[place]
        batch = self._batch(trainer, micro)
        data = getattr(trainer, "datamodule", None)
        return {
            "rank": trainer.global_rank,
            "micro_batch": place,
            "loss": float("nan") if micro.loss is None else float(micro.loss) * trainer.accumulate_grad_batches,
            "first": found.get(place),
            "input": describe(batch["bold"]) if "bold" in batch else None,
            "clips": incident.clips_of(data, batch) if data is not None else [],
            "batch": incident.batch_name(trainer.global_rank),
            "read_again": not micro.whole,
        }

    def _keep(self, trainer: pl.Trainer, place: Path, chosen: dict[int, int], found: dict[int, Any]) -> str:
        """Write the batches of the chosen ranks and, where small, the weights; returns which weights belong to them."""
        self.batches += 1
        strategy: Any = trainer.strategy
        module = trainer.lightning_module
        size = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()) * 4 / 1e6
        saved = sorted(path.name for path in self.checkpoints.glob("step-*"))
        weights = incident.WEIGHTS if size <= self.guard.weights_mb else None
        if weights:
            strategy.save_weights(place / weights, trainer.global_step, {"config": asdict(self.cfg)})
        rank = trainer.global_rank
        if rank in chosen:
            micro = self._micros[chosen[rank]]
            before = str(Path("..") / ".." / self.checkpoints.name / saved[-1]) if saved else None
            facts = self._facts(trainer, micro) | {"weights": weights, "checkpoint": before}
            facts["first"] = found.get(chosen[rank])
            loss = micro.loss if micro.loss is not None else torch.tensor(float("nan"))
            incident.write_batch(place / incident.batch_name(rank), self._batch(trainer, micro), loss, facts)
        return "with the weights of the step" if weights else f"without weights; the checkpoint before: {saved[-1:]}"

    def _facts(self, trainer: pl.Trainer, micro: Micro) -> dict[str, Any]:
        """All that a micro-batch's forward pass depends on beside weights and batch."""
        groups = trainer.optimizers[0].param_groups
        state: dict[str, Any] = {}
        trainer.lightning_module.on_save_checkpoint(state)
        cells = getattr(trainer.lightning_module, "cells", None)
        return {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "world": trainer.world_size,
            "batch_idx": micro.number,
            "accumulate": trainer.accumulate_grad_batches,
            "frames": self.cfg.data.frames,
            "rate": max(float(group["lr"]) for group in groups),
            "precision": precision_of(trainer),
            "device": trainer.strategy.root_device.type,
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
            "seed": self.cfg.seed,
            "run": str(self.run_dir),
            "config": asdict(self.cfg),
            # Of a task: the scale of its labels.
            "target": state.get("target"),
            # Of a task of brain maps: which of the head's cells lie in the brain.
            "cells": cells.tolist() if cells is not None else None,
        }

    def _record(
        self, step: int, verdict: Verdict, ranks: list[Any], reports: list[Any], bad_weights: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "step": step,
            "what": verdict.kind,
            "action": self.guard.action,
            "loss": verdict.loss,
            "gradient_norm": verdict.norm,
            "window": verdict.limits,
            "bad_steps_in_a_row": self.watch.in_row,
            "losses_of_ranks": {rank["rank"]: rank["losses"] for rank in ranks},
            "bad_weights": bad_weights,
            "ranks": reports,
        }

    def _log_step(
        self,
        trainer: pl.Trainer,
        step: int,
        verdict: Verdict,
        reports: list[Any],
        bad_weights: dict[str, int],
        place: Path,
    ) -> None:
        """One line in the log, one in the metrics."""
        if not trainer.is_global_zero:
            return
        numbers = {"guard/left_out": self.watch.bad, "guard/loss": verdict.loss, "guard/grad_norm": verdict.norm}
        where = "; ".join(map(incident.where, reports)) or "no rank stands out"
        for logger in trainer.loggers:
            words = {"guard/what": verdict.kind, "guard/where": where} if isinstance(logger, JsonlLogger) else {}
            logger.log_metrics(numbers | words, step=step)  # type: ignore[arg-type]
        limit = verdict.limits["loss" if verdict.kind.startswith("loss") else "norm"].get("limit")
        size = f"loss {verdict.loss:.4g}, gradient norm {verdict.norm:.4g}"
        size += f", limit {limit:.4g}" if verdict.spike and limit else ""
        kept = f"; see {place / incident.RECORD}" if (place / incident.RECORD).exists() else ""
        weights = f"; {len(bad_weights)} weights are not finite" if bad_weights else ""
        log.warning("step %d left out: %s (%s): %s%s%s", step, verdict.kind, size, where, weights, kept)

    def _act(self, trainer: pl.Trainer, step: int, verdict: Verdict, bad_weights: dict[str, int]) -> None:
        """Go on, go back, or end the run."""
        action, strategy = self.guard.action, trainer.strategy
        ends = None
        if action == "stop":
            ends = f"{verdict.kind}, and guard.action=stop"
        elif self.watch.in_row >= self.guard.limit:
            ends = f"{self.watch.in_row} bad steps in a row (guard.limit={self.guard.limit}), the last: {verdict.kind}"
        elif bad_weights and action != "rollback":
            name, count = next(iter(bad_weights.items()))
            ends = f"weight {name} has {count} values that are not finite: leaving out steps cannot help"
        if ends is None and action == "rollback":
            back = strategy.roll_back(self.checkpoints)  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                log.warning("step %d: weights and moments are those of %s again; the run goes on", step, back.name)
        if ends is not None:
            strategy.saver.finish()  # type: ignore[attr-defined]
            raise UserError(
                f"step {step}: {ends}; resume={self.run_dir} goes on from the last checkpoint "
                "(with guard.action=rollback the run goes back by itself)"
            )


def _bytes(batch: Mapping[str, Any]) -> int:
    return sum(value.numel() * value.element_size() for value in batch.values() if isinstance(value, Tensor))


def precision_of(trainer: pl.Trainer) -> str:
    """Lightning's name of what the model computes in; fully_shard casts by itself, which Lightning calls 32-true."""
    mixed = getattr(trainer.strategy, "mixed", None)
    return "bf16-mixed" if mixed is not None and mixed.param_dtype is not None else str(trainer.precision)

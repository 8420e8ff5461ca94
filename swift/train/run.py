"""One training: in this process, or in ranks that it starts; and what a run leaves behind."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from swift.config.compose import CHECKPOINTS, FROZEN, as_begun, differences, load_frozen, typed, writable
from swift.config.schema import Config
from swift.parallel.ranks import current_place, start_ranks
from swift.train.run_lock import only_training_in
from swift.utils import jsonl
from swift.utils.entry import INTERRUPTED_STATUS, STOPPED_STATUS
from swift.utils.errors import UserError

log = logging.getLogger(__name__)


def checkpoint_to_go_on_from(cfg: Config) -> Path | None:
    """The checkpoints of the run of `cfg.run_dir`; None if it has not got as far as a checkpoint. Changes nothing.

    Raises:
        UserError: the folder cannot be written, holds a run with other settings, or has nothing to resume.
    """
    run_dir = Path(cfg.run_dir)
    if not writable(run_dir):
        raise UserError(f"run_dir={run_dir} cannot be written: choose another")
    from swift.parallel.checkpoint import files as checkpoint

    checkpoints = run_dir / CHECKPOINTS
    found = checkpoint.exists(checkpoints)
    if cfg.resume:
        if not found:
            raise UserError(
                f"resume={run_dir}: the run has no checkpoint yet; repeat its first command with run_dir={run_dir}"
            )
    elif (run_dir / FROZEN).exists():
        before = load_frozen(run_dir, [])
        changed = differences(replace(before, run_dir=cfg.run_dir), cfg)
        if changed:
            raise UserError(
                f"run_dir={run_dir} holds a run with other settings ({', '.join(changed)}): choose another run_dir, "
                "or resume=RUN_DIR to go on with that run"
            )
    return checkpoints if found else None


def train(cfg: Config, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the configured training in `cfg.run_dir`; go on from its last checkpoint if there is one.

    Returns:
        The summary that is also written to RUN/summary.json.

    Raises:
        UserError: something the user can mend; nothing was trained.
    """
    if not cfg.resume:
        cfg = as_begun(cfg, Path(cfg.run_dir))
    if cfg.data.brain == "cohort":
        from swift.data.cohort_brain import with_cohort

        cfg = with_cohort(cfg)
    ranks, place = ranks_to_start(cfg), current_place()
    # The first rank holds the lock for all; or what has started them, on one machine.
    owner = place.rank == 0 and place.source != "swift"
    with only_training_in(Path(cfg.run_dir)) if owner else contextlib.nullcontext():
        return start(cfg, overrides, ranks) if ranks else train_here(cfg, overrides)


def train_here(cfg: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """`train` in this process, alone or as one of the ranks."""
    # Torch and Lightning take seconds to import: --help and a wrong option should not wait for them.
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from swift.data.clips.chosen import told
    from swift.parallel.setup import resolve
    from swift.train.amount import amount
    from swift.train.init_weights import start_from
    from swift.train.judge import judge
    from swift.train.wiring import build_data, build_module, build_trainer, tell

    run_dir = Path(cfg.run_dir)
    before = checkpoint_to_go_on_from(cfg)
    setup = resolve(cfg)
    cfg = setup.cfg
    module = build_module(setup, empty=True)
    parameters = module.parameter_count
    if cfg.init and not before:
        log.info("init=%s: %s", cfg.init, start_from(module, cfg.init))
    data = build_data(cfg)
    tell(module, data)
    log.info("%s: model %s, %s parameters, run directory %s", cfg.task.name, cfg.model.name, f"{parameters:,}", run_dir)
    if setup.why:
        log.info("%s", setup.why)
    line, warning = amount(cfg, data, current_place().world)
    log.info("%s", line)
    if warning:
        log.warning("%s", warning)
    trainer = build_trainer(setup, overrides)
    torch.set_float32_matmul_precision("high")
    judgement: dict[str, Any] | None = None

    def at_end(_: Any, __: Any) -> None:
        nonlocal judgement
        judgement = judge(trainer)

    trainer.callbacks.append(LambdaCallback(on_train_end=at_end))  # type: ignore[attr-defined]  # set at run time
    try:
        trainer.fit(module, datamodule=data, ckpt_path=before, weights_only=True)
    except SystemExit as stop:
        # What Lightning makes of a second Ctrl-C; a run that was asked to stop has saved.
        if not trainer.interrupted or stop.code == STOPPED_STATUS:
            raise
        if stop.code == INTERRUPTED_STATUS:
            log.info("saved; python -m swift.train resume=%s goes on from step %d", run_dir, trainer.global_step)
            raise KeyboardInterrupt from stop
        from swift.parallel.checkpoint import files as checkpoint

        trainer.strategy.saver.settle()  # type: ignore[attr-defined]  # all of ours have one
        if checkpoint.exists(run_dir / CHECKPOINTS):
            log.info("stopped; python -m swift.train resume=%s goes on from the last checkpoint", run_dir)
        else:
            log.info("stopped before the first checkpoint: nothing to go on from; the same command begins anew")
        raise KeyboardInterrupt from stop
    if trainer.global_step > cfg.trainer.max_steps:
        raise UserError(
            f"trainer.max_steps={cfg.trainer.max_steps}: the run has done {trainer.global_step} steps already"
        )
    # Judged already by all ranks, while their engines still held the model; not if there was nothing left to train.
    summary = {"model": cfg.model.name, "parameters": parameters, "steps": trainer.global_step}
    summary |= judge(trainer) if judgement is None else judgement
    summary |= told(data.left_out)
    if not trainer.is_global_zero:
        return {}
    leave(summary, cfg, run_dir)
    return summary


def leave(summary: dict[str, Any], cfg: Config, run_dir: Path) -> None:
    """Write the summary and the figures of a run, print its table."""
    from swift.report.figures.loss import loss_curve
    from swift.report.figures.maps import maps_figure
    from swift.report.figures.reconstruction import reconstruction

    if cfg.task.target is None:
        write_summary(summary, run_dir)
    else:
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if cfg.trainer.figures:
        if summary["steps"] >= min(cfg.trainer.log_every or 1, cfg.trainer.val_every):  # else no loss was written
            loss_curve([run_dir], run_dir / "figures" / "loss.png")
        if cfg.task.target is not None and cfg.task.target.kind == "map":
            maps_figure(run_dir / "figures" / "maps.npz", run_dir / "figures" / "maps.png")
        if cfg.task.target is None:
            reconstruction(run_dir / "figures" / "reconstruction.npz", run_dir / "figures" / "reconstruction.png")
    if cfg.task.target is None:
        print(summary_text(summary, run_dir))
    else:
        from swift.evaluate.judge import table

        print(table(summary, run_dir))


def ranks_to_start(cfg: Config) -> int:
    """Ranks that this process has to start itself; 0 where it shall run the training, alone or as one of them."""
    place = current_place()
    if place.problem:
        raise UserError(place.problem)
    if cfg.parallel.name == "single" or place.source != "none":
        return 0
    if cfg.parallel.nodes > 1:
        raise UserError(
            f"parallel.nodes={cfg.parallel.nodes}: ranks on several nodes are started by srun or torchrun, not here"
        )
    from swift.parallel.setup import accelerator_of
    from swift.utils import device

    ranks, on_cpu = cfg.parallel.devices, accelerator_of(cfg) == "cpu"
    if not ranks:
        ranks = 1 if on_cpu else device.count()
    if not on_cpu and ranks > device.count():
        raise UserError(
            f"parallel.devices={ranks}: torch sees {device.seen()} here; take as many, or trainer.accelerator=cpu"
        )
    return ranks if ranks > 1 else 0


def start(cfg: Config, overrides: Sequence[str], ranks: int) -> dict[str, Any]:
    """Run the training with several ranks on this machine.

    Returns:
        The summary that rank 0 has written.

    Raises:
        SystemExit: a rank has failed, and has said why.
    """
    settings = json.dumps({"config": OmegaConf.to_container(OmegaConf.structured(cfg)), "overrides": list(overrides)})
    status = start_ranks([sys.executable, "-m", "swift.train"], settings, ranks)
    if status:
        sys.exit(status if status > 0 else 128 - status)
    summary: dict[str, Any] = json.loads((Path(cfg.run_dir) / "summary.json").read_text())
    return summary


def run_rank(path: Path) -> None:
    """What a rank does that `start` has started: the settings are checked already."""
    sent = json.loads(path.read_text())
    train(typed(OmegaConf.create(sent["config"])), sent["overrides"])


def write_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """RUN/summary.json, strict JSON also where a diverged run gives NaN."""
    content = summary | {"val_l1": jsonl.plain(summary["val_l1"])}
    content["baselines"] = {name: jsonl.plain(value) for name, value in summary["baselines"].items()}
    (run_dir / "summary.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def summary_text(summary: dict[str, Any], run_dir: Path) -> str:
    """The table printed at the end: the model's held-out error between the baselines, best first."""
    rows = [*summary["baselines"].items(), (f"model {summary['model']}", summary["val_l1"])]
    width = max(len(name) for name, _ in rows)
    lines = [f"held-out masked-voxel L1 after {summary['steps']} steps, {summary['clips']} clips (lower is better)"]
    for name, value in sorted(rows, key=lambda row: row[1]):
        lines.append(f"  {name:<{width}}  {value:.4f}" + ("  <- this run" if name.startswith("model ") else ""))
    beaten, lost = summary["beats"], [name for name in summary["baselines"] if name not in summary["beats"]]
    lines.append(f"beats: {', '.join(beaten) or 'none of the baselines'}")
    if lost:
        lines.append(f"does not beat: {', '.join(lost)}")
    lines += [f"  {note}" for note in summary["baseline_notes"]]
    lines.append(f"figures and checkpoints: {run_dir}")
    return "\n".join(lines)

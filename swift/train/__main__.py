"""`python -m swift.train`: compose the configuration, check it, run it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swift.config.compose import CHECKPOINTS, FROZEN, conf_dir, differences, load_frozen, typed, writable
from swift.config.help import register
from swift.config.schema import Config
from swift.parallel.ranks import SETTINGS, current_place, first_to_report, start_ranks
from swift.utils import jsonl
from swift.utils.entry import STOPPED_STATUS, USER_ERROR_STATUS, reported, set_up_logging
from swift.utils.errors import UserError

# By name: run as a command, the module is called __main__, which is no part of swift's logging.
log = logging.getLogger("swift.train")


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
    if ranks := ranks_to_start(cfg):
        return start(cfg, overrides, ranks)
    # Torch and Lightning take seconds to import: --help and a wrong option should not wait for them.
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from swift.train.wiring import build_data, build_module, build_trainer, count_parameters, start_from, tell

    run_dir = Path(cfg.run_dir)
    before = checkpoint_to_go_on_from(cfg)
    parameters = count_parameters(cfg)
    module = build_module(cfg, empty=True)
    if cfg.init and not before:
        log.info("init=%s: %s", cfg.init, start_from(module, cfg.init))
    data = build_data(cfg)
    tell(module, data)
    log.info("%s: model %s, %s parameters, run directory %s", cfg.task.name, cfg.model.name, f"{parameters:,}", run_dir)
    trainer = build_trainer(cfg, run_dir, overrides)
    torch.set_float32_matmul_precision("high")
    judgement: dict[str, Any] | None = None

    def at_end(_: Any, __: Any) -> None:
        nonlocal judgement
        judgement = judge(trainer)

    trainer.callbacks.append(LambdaCallback(on_train_end=at_end))  # type: ignore[attr-defined]  # set at run time
    try:
        trainer.fit(module, datamodule=data, ckpt_path=before, weights_only=True)
    except SystemExit as stop:
        # What Lightning makes of Ctrl-C; a run that was asked to stop has saved.
        if not trainer.interrupted or stop.code == STOPPED_STATUS:
            raise
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
    if not trainer.is_global_zero:
        return {}
    leave(summary, cfg, run_dir)
    return summary


def leave(summary: dict[str, Any], cfg: Config, run_dir: Path) -> None:
    """Write the summary and the figures of a run, print its table."""
    from swift.report.figures.loss import loss_curve
    from swift.report.figures.reconstruction import reconstruction

    if cfg.task.target is None:
        write_summary(summary, run_dir)
    else:
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if cfg.trainer.figures:
        if summary["steps"] >= min(cfg.trainer.log_every, cfg.trainer.val_every):  # else no loss was written
            loss_curve([run_dir], run_dir / "figures" / "loss.png")
        if cfg.task.target is None:
            reconstruction(run_dir / "figures" / "reconstruction.npz", run_dir / "figures" / "reconstruction.png")
    if cfg.task.target is None:
        print(summary_text(summary, run_dir))
    else:
        from swift.evaluate.judge import table

        print(table(summary, run_dir))


def ranks_to_start(cfg: Config) -> int:
    """Ranks that this process has to start itself; 0 where it shall run the training, alone or as one of them."""
    if cfg.parallel.name == "single" or current_place().source != "none":
        return 0
    if cfg.parallel.nodes > 1:
        raise UserError(
            f"parallel.nodes={cfg.parallel.nodes}: ranks on several nodes are started by srun or torchrun, not here"
        )
    ranks = cfg.parallel.devices
    if not ranks:
        from swift.train.wiring import accelerator, gpus

        ranks = gpus() if accelerator(cfg) == "gpu" else 1
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


def judge(trainer: Any) -> dict[str, Any]:
    """Held-out reconstruction error of the trained model and of the baselines, as validation computes it.

    Of a task with a target: its scores in validation and test. The same clips, ranks and precision, so that the last
    validation and the summary say the same. All ranks call it.
    """
    from swift.evaluate.reconstruction import compare

    strategy, module, data = trainer.strategy, trainer.lightning_module, trainer.datamodule
    cfg, device = module.cfg, strategy.root_device
    module.to(device).eval()
    if cfg.task.target is not None:
        from swift.evaluate.judge import judge_run

        return judge_run(trainer)

    def dense(packed: Any) -> Any:
        on_device = data.transfer_batch_to_device(data.on_before_batch_transfer(packed), device, 0)
        return data.on_after_batch_transfer(on_device)

    batches = map(dense, itertools.islice(data.val_dataloader(), cfg.trainer.val_batches or None))
    seconds = [scan.tr for scan in data.store.scans]
    figure = Path(cfg.run_dir) / "figures" / "reconstruction.npz" if trainer.is_global_zero else None
    with trainer.precision_plugin.val_step_context():
        return compare(
            module,
            batches,
            seconds,
            figure,
            lambda batch: strategy.call("reconstruct", batch),
            lambda part: strategy.reduce(part, reduce_op="sum"),
        )


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
    lines.append(f"figures and checkpoints: {run_dir}")
    return "\n".join(lines)


def settings(tree: DictConfig, overrides: Sequence[str]) -> Config:
    """Typed settings of a command line: composed, or those of the run to resume with its overrides on top."""
    if not tree.resume:
        return typed(tree)
    rest = [override for override in overrides if not override.startswith("resume=")]
    return replace(load_frozen(Path(tree.resume), rest), run_dir=str(tree.resume), resume=str(tree.resume))


def run(tree: DictConfig, overrides: Sequence[str], jobs: list[Any]) -> None:
    """Check a composed configuration, then train, or make ready what a launcher shall submit.

    Args:
        tree: Hydra's composed configuration.
        overrides: the settings given on the command line, as typed.
        jobs: takes a run that is to be submitted.
    """
    cfg = settings(tree, overrides)
    if not cfg.launcher:
        train(cfg, overrides)
        return
    from swift.cluster.submit import prepare

    def make_data(cfg: Config) -> Path:
        from swift.train.wiring import store_path

        return store_path(cfg)

    jobs.append(prepare(cfg, overrides, make_data))


def main() -> None:
    """The command line. A mistake ends with status 2 and one message, composed or not."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    set_up_logging()
    register()
    if current_place().rank:
        logging.getLogger("swift").setLevel(logging.WARNING)  # rank 0 says it for all
    if SETTINGS in os.environ:
        reported(lambda: run_rank(Path(os.environ[SETTINGS])), first_to_report)
        return
    reached = False
    jobs: list[Any] = []

    def task(tree: DictConfig) -> None:
        nonlocal reached
        reached = True
        node = HydraConfig.get()
        # As typed: run_dir='runs/${model.name}' must not be resolved among the overrides themselves.
        typed_in = OmegaConf.to_container(node.overrides.task, resolve=False)
        assert isinstance(typed_in, list)
        overrides = [str(override) for override in typed_in]
        if node.mode == RunMode.MULTIRUN:
            tree.run_dir = node.runtime.output_dir
            if "launcher" in tree:
                from swift.cluster.submit import point_dir

                tree.run_dir = str(point_dir(Path(node.runtime.output_dir), overrides, sys.argv[1:]))
        reported(lambda: run(tree, overrides, jobs), first_to_report)

    # Hydra 1.4 drops version_base; 1.3 warns without it.
    extra = {"version_base": None} if "version_base" in signature(hydra.main).parameters else {}
    # Hydra prints tracebacks of its own making for some mistakes (model=51, --help with an unknown choice), with status
    # 1: let all errors come here.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", **extra)(task)()
    except Exception as error:
        if reached:
            raise
        # Composing has failed: the user's mistake. Hydra's own hint, and OmegaConf's where that is the cause.
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        print("\n".join(str(part) for part in (error, cause) if part), file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    if jobs:
        # Only now: all points of a sweep have been checked.
        from swift.cluster.submit import submit

        reported(lambda: submit(jobs))


if __name__ == "__main__":
    main()

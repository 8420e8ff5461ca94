"""`python -m swift.train`: compose the configuration, check it, run it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from swift.config.compose import FROZEN, conf_dir, freeze, load_frozen, typed
from swift.config.schema import Config
from swift.utils.entry import USER_ERROR_STATUS, reported, set_up_logging
from swift.utils.errors import UserError

log = logging.getLogger(__name__)

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


def prepare_run_dir(cfg: Config, run_dir: Path) -> Path | None:
    """Make the run directory and freeze the configuration in it.

    Returns:
        The checkpoint to go on from if the run is there already (a requeued or repeated command), else None.

    Raises:
        UserError: the folder cannot be written, or holds a run with another configuration.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(13, "Permission denied")
        frozen = run_dir / FROZEN
        if not frozen.exists():
            freeze(cfg, frozen)
            return None
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    before = load_frozen(run_dir, [])
    if before != cfg:
        changed = ", ".join(_differences(before, cfg))
        raise UserError(
            f"run_dir={run_dir} holds a run with other settings ({changed}): choose another run_dir, "
            "or resume=RUN_DIR to go on with that run"
        )
    last = run_dir / LAST_CHECKPOINT
    return last if last.exists() else None


def _differences(before: Config, after: Config) -> list[str]:
    """Names of the values that differ, as SECTION.NAME."""

    def flat(cfg: Config) -> dict[str, Any]:
        container = OmegaConf.to_container(OmegaConf.structured(cfg))
        assert isinstance(container, dict)
        sections = {str(key): value if isinstance(value, dict) else {"": value} for key, value in container.items()}
        return {f"{key}.{name}".rstrip("."): value for key, part in sections.items() for name, value in part.items()}

    old, new = flat(before), flat(after)
    return [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def train(cfg: Config, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the configured training in `cfg.run_dir`; go on from its last checkpoint if there is one.

    Returns:
        The summary that is also written to RUN/summary.json.

    Raises:
        UserError: something the user can mend; nothing was trained.
    """
    if cfg.parallel.name != "single":
        raise UserError(
            f"parallel={cfg.parallel.name}: only parallel=single is built so far (sharding comes with swift.parallel)"
        )
    # Torch and Lightning take seconds to import: --help and a wrong option should not wait for them.
    import torch

    from swift.analysis.plots import loss_curve, reconstruction
    from swift.build import build_data, build_module, build_trainer, count_parameters

    run_dir = Path(cfg.run_dir)
    parameters = count_parameters(cfg)
    module = build_module(cfg)
    data = build_data(cfg)
    checkpoint = prepare_run_dir(cfg, run_dir)
    log.info("%s: model %s, %s parameters, run directory %s", cfg.task.name, cfg.model.name, f"{parameters:,}", run_dir)
    trainer = build_trainer(cfg, run_dir, overrides)
    if checkpoint:
        log.info("going on from %s", checkpoint)
    torch.set_float32_matmul_precision("high")
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    trainer.save_checkpoint(run_dir / LAST_CHECKPOINT)
    summary = {"model": cfg.model.name, "parameters": parameters, "steps": trainer.global_step}
    summary |= judge(cfg, module, data, run_dir)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if cfg.trainer.figures:
        loss_curve([run_dir], run_dir / "figures" / "loss.png")
        reconstruction(run_dir / "figures" / "reconstruction.npz", run_dir / "figures" / "reconstruction.png")
    print(summary_text(summary, run_dir))
    return summary


def judge(cfg: Config, module: Any, data: Any, run_dir: Path) -> dict[str, Any]:
    """Held-out reconstruction error of the trained model and of the baselines, on the device it was trained on."""
    import torch

    from swift.analysis.held_out import compare
    from swift.build import accelerator

    device = torch.device("cuda" if accelerator(cfg) == "gpu" else "cpu")
    module.to(device).eval()

    def dense(packed: Any) -> Any:
        on_device = data.transfer_batch_to_device(data.on_before_batch_transfer(packed), device, 0)
        return data.on_after_batch_transfer(on_device)

    batches = map(dense, itertools.islice(data.val_dataloader(), cfg.trainer.val_batches or None))
    seconds = [scan.tr for scan in data.store.scans]
    return compare(module, batches, seconds, run_dir / "figures" / "reconstruction.npz")


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


def settings(tree: DictConfig) -> tuple[Config, list[str]]:
    """Typed settings of a command line: composed, or those of the run to resume with its overrides on top."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if tree.resume:
        rest = [override for override in overrides if not override.startswith("resume=")]
        run_dir = Path(tree.resume)
        cfg = load_frozen(run_dir, rest)
        if not (run_dir / LAST_CHECKPOINT).exists():
            raise UserError(
                f"resume={run_dir}: the run has no checkpoint yet; repeat its first command with run_dir={run_dir}"
            )
        cfg.run_dir = str(run_dir)
        freeze(cfg, run_dir / FROZEN)
        return cfg, overrides
    if hydra.mode == RunMode.MULTIRUN:
        OmegaConf.update(tree, "run_dir", hydra.runtime.output_dir)
    return typed(tree), overrides


def run(tree: DictConfig) -> None:
    """Check a composed configuration, then train, or say what a launcher still lacks."""
    cfg, overrides = settings(tree)
    if cfg.launcher:
        from swift.build import count_parameters

        raise UserError(
            f"+launcher={cfg.launcher.get('name')}: the configuration is valid (model={cfg.model.name}, "
            f"{count_parameters(cfg):,} parameters, parallel={cfg.parallel.name}), but submitting jobs "
            "(swift.submit) is not built yet; nothing was started"
        )
    train(cfg, overrides)


def main() -> None:
    """The command line. A mistake ends with status 2 and one message, composed or not."""
    import hydra

    set_up_logging()
    reached = False

    def task(tree: DictConfig) -> None:
        nonlocal reached
        reached = True
        reported(lambda: run(tree))

    # Hydra 1.4 drops version_base; 1.3 warns without it.
    extra = {"version_base": None} if "version_base" in signature(hydra.main).parameters else {}
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", **extra)(task)()
    except SystemExit as stop:
        # Hydra ends with 1 and its own hint when composing fails: that is the user's mistake too.
        sys.exit(USER_ERROR_STATUS if stop.code == 1 and not reached else stop.code)


if __name__ == "__main__":
    main()

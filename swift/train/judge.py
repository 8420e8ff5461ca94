"""Judging what was trained, on all ranks at once: held-out reconstruction, or validation and test of a task.

The same clips, ranks and precision as in a validation, so that the last validation and the summary say the same.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swift.config.compose import CHECKPOINTS
from swift.config.schema import Config
from swift.data.task_maps.module import MapDataModule
from swift.data.task_module import TargetDataModule
from swift.evaluate.judge import gathered, predictions_of
from swift.evaluate.linear_baselines import fit_linear
from swift.evaluate.map_judge import SubjectMeans, in_units, leave
from swift.evaluate.map_judge import predictions_of as map_predictions_of
from swift.evaluate.map_scores import judge as judge_maps
from swift.evaluate.reconstruction import compare
from swift.evaluate.scores import judge as judge_predictions
from swift.parallel.checkpoint import files as checkpoint
from swift.train.callbacks.signals import Heartbeat

log = logging.getLogger("swift")


def judge(trainer: Any) -> dict[str, Any]:
    """What RUN/summary.json says of a trained model; all ranks call it together.

    Of pre-training: held-out reconstruction error of the model and of the baselines. Of a task: the scores in
    validation and test.
    """
    module, device = trainer.lightning_module, trainer.strategy.root_device
    if module.device.type != device.type:
        # Only then: moving to cpu:0 what is on the CPU makes copies, and DeepSpeed would go on with the old tensors.
        module.to(device)
    module.eval()
    return _judge_reconstruction(trainer) if module.cfg.task.target is None else _judge_target(trainer)


def _dense(trainer: Any) -> Callable[[Any], Any]:
    """Brings a packed batch to the device, as training does, and gives a sign of life."""
    data, device = trainer.datamodule, trainer.strategy.root_device
    beats = [callback for callback in trainer.callbacks if isinstance(callback, Heartbeat)]

    def dense(packed: Any) -> Any:
        for beat in beats:
            beat.judging(trainer)
        on_device = data.transfer_batch_to_device(data.on_before_batch_transfer(packed), device, 0)
        return data.on_after_batch_transfer(on_device)

    return dense


def _judge_reconstruction(trainer: Any) -> dict[str, Any]:
    strategy, module, data = trainer.strategy, trainer.lightning_module, trainer.datamodule
    cfg = module.cfg
    batches = map(_dense(trainer), itertools.islice(data.val_dataloader(), cfg.trainer.val_batches or None))
    figure = Path(cfg.run_dir) / "figures" / "reconstruction.npz" if trainer.is_global_zero else None
    most = (cfg.trainer.val_batches or len(data.val_index)) * cfg.data.batch_size * trainer.world_size
    clips = min(len(data.val_index), most)
    linear = fit_linear(data, cfg, clips) if clips else None
    with trainer.precision_plugin.val_step_context():
        return compare(
            cfg,
            batches,
            [scan.tr for scan in data.store.scans],
            figure,
            lambda batch: strategy.call("reconstruct", batch),
            strategy.root_device,
            lambda part: strategy.reduce(part, reduce_op="sum"),
            linear,
        )


@torch.no_grad()
def _judge_target(trainer: Any) -> dict[str, Any]:
    """Take the weights that validation chose, and read the test set, once.

    Leaves RUN/predictions/*.csv. Returns {} on other ranks than the first.
    """
    strategy, module, data = trainer.strategy, trainer.lightning_module, trainer.datamodule
    cfg = module.cfg
    run_dir = Path(cfg.run_dir)
    step = take_best(strategy, run_dir / CHECKPOINTS)
    module.eval()
    dense = _dense(trainer)

    def predict(packed: Any) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = strategy.call("predict", dense(packed))
        return found

    judged: Callable[[], dict[str, Any]]
    with trainer.precision_plugin.val_step_context():
        if isinstance(data, MapDataModule):
            judged = _predicted_maps(strategy, data, predict, cfg, run_dir)
        else:
            judged = _predicted(data, predict, cfg, run_dir)
    if not trainer.is_global_zero:
        return {}
    used = {
        "task": cfg.task.name,
        "adapt": cfg.task.adapt,
        "init": cfg.init,
        "seed": cfg.seed,
        "split": cfg.data.split,
        "split_hash": data.split_hash,
        "store": [str(store.path) for store in data.store.stores],
        "select": cfg.task.select,
        "best_step": trainer.global_step if step is None else step,
        "trained": sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
        "n": {part: len(data.subjects_of(part)) for part in data.parts},
        "scaling": {"mean": data.scaling.mean, "std": data.scaling.std},
    }
    return used | judged()


Predict = Callable[[Any], dict[str, np.ndarray]]


def _predicted(data: TargetDataModule, predict: Predict, cfg: Config, run_dir: Path) -> Callable[[], dict[str, Any]]:
    """Predict validation and test on all ranks; what the first rank then does with it."""
    val, test = (
        predictions_of(gathered([predict(packed) for packed in loader]), data)
        for loader in (data.val_dataloader(), data.test_dataloader())
    )

    def judged() -> dict[str, Any]:
        for name, predictions in (("val", val), ("test", test)):
            predictions.save(run_dir / "predictions" / f"{name}.csv")
        return judge_predictions(val, test, cfg.seed)

    return judged


def _predicted_maps(
    strategy: Any, data: MapDataModule, predict: Predict, cfg: Config, run_dir: Path
) -> Callable[[], dict[str, Any]]:
    """The same of maps: RUN/predictions/maps and RUN/figures/maps.npz of the test part."""
    made = []
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        means = SubjectMeans()
        for packed in loader:
            means.add(predict(packed))
        subjects, values = means.gathered()
        missing = set(data.subjects_of(part)) - {data.people[place] for place in subjects.tolist()}
        if missing and strategy.is_global_zero:
            log.warning(
                "the %s part is judged without %s: no clip with a brain voxel", part, ", ".join(sorted(missing))
            )
        made.append((subjects, strategy.call("maps_of", values)["maps"]))

    def judged() -> dict[str, Any]:
        names = [[data.people[place] for place in subjects.tolist()] for subjects, _ in made]
        predicted = [in_units(data, maps) for _, maps in made]
        val, test = (map_predictions_of(data, *pair) for pair in zip(names, predicted, strict=True))
        leave(data, names[1], predicted[1], test, run_dir)
        return {"head": cfg.task.head, "loss": cfg.task.loss} | judge_maps(val, test, cfg.seed)

    return judged


def take_best(strategy: Any, folder: Path) -> int | None:
    """Fill the model with the weights of the best checkpoint; its optimizer step, None if no checkpoint has a score."""
    path = strategy.broadcast(checkpoint.best(folder) if strategy.is_global_zero else None)
    if path is None:
        return None
    manifest = checkpoint.Manifest.read(path)
    checkpoint.Reader(path, manifest).fill(list(strategy.pieces(moments=False)))
    strategy.refresh()
    return manifest.step

"""`python -m swift.replay FILE`: run the batch of a bad step again, and say where it goes wrong.

FILE is what a run's guard kept: RUN/guard/step-NNNNNNN/batch-rank-NNNNN.safetensors. With the weights of that step
beside it, the loss is that of the run: bit for bit on a CPU in float32 with as many threads (which it sets).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError


@dataclass
class Replayed:
    """What came out.

    Attributes:
        loss, recorded: Tensors of no dimension, divided by the micro-batches of a step.
        first: Where a value that is not finite appears first, or None; see `swift.train.callbacks.nonfinite.Trace`.
        gradient_norm: Of this micro-batch alone.
        inputs: Statistics of every floating-point tensor of the batch.
        weights: Which were used.
        exact: Whether they are those of the step.
        facts: What the file says.
    """

    loss: Any
    recorded: Any
    first: dict[str, Any] | None
    gradient_norm: float
    inputs: dict[str, dict[str, Any]]
    weights: str
    exact: bool
    facts: dict[str, Any]

    @property
    def same(self) -> bool:
        """Whether both losses are equal to the last bit, or both no number."""
        import torch

        return bool(torch.equal(self.loss, self.recorded) or (self.loss.isnan() and self.recorded.isnan()))


def replay(path: Path, source: Path | None = None) -> Replayed:
    """Run a kept micro-batch again.

    Args:
        path: Of the file.
        source: Weights to use in place of those that the file names: a run, a checkpoint or an exported file.

    Raises:
        UserError: not such a file, or its weights are not there.
    """
    from swift.train.callbacks.incident import read_batch

    batch, recorded, facts = read_batch(path)
    import torch

    from swift.parallel.setup import resolve
    from swift.train.callbacks.nonfinite import Trace, describe
    from swift.train.init_weights import weights_at
    from swift.train.wiring import build_data, build_module, give_maps
    from swift.utils import device as here

    cfg = settings(facts)
    if cfg.task.loss == "contrastive" and facts["world"] > 1:
        raise UserError(
            f"{path}: the loss of task.loss=contrastive is of the clips of all {facts['world']} ranks, and a kept "
            "batch holds those of one: it cannot be run again"
        )
    where, exact = weights_of(path, facts) if source is None else (source, False)
    torch.set_num_threads(facts["threads"])
    torch.use_deterministic_algorithms(facts["deterministic"])
    torch.set_float32_matmul_precision(facts["matmul"])
    setup = resolve(cfg)
    device = here.torch_device(setup.accelerator)
    module = build_module(setup)
    try:
        weights, _ = weights_at(where, module)
    except ValueError as error:
        raise UserError(f"weights {where}: {error}") from error
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in weights.shapes:
                raise UserError(f"weights {where}: have no {name}")
            parameter.view(-1).copy_(weights.read(name, 0, parameter.numel()))
    stand_in(module, facts)
    if cfg.model.maps and cfg.model.maps_of == "scan" and (cfg.task.target is None or cfg.task.courses):
        # The file does not hold them: they are made again from the training frames of the store.
        give_maps(module, build_data(cfg))
    module.to(device).train()
    on_device = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    narrow = facts["precision"] == "bf16-mixed"
    context = torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext()
    with Trace(module) as trace:
        with context:
            output = module.training_step(on_device, facts["batch_idx"])
        loss = (output["loss"] if isinstance(output, dict) else output) / facts["accumulate"]
        loss.backward()
    norms = [parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None]
    floating = {n: t for n, t in batch.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return Replayed(
        loss=loss.detach().cpu(),
        recorded=recorded,
        first=trace.first,
        gradient_norm=float(torch.stack(norms).norm()),
        inputs={name: describe(tensor) for name, tensor in floating.items()},
        weights=str(where),
        exact=exact,
        facts=facts,
    )


def settings(facts: dict[str, Any]) -> Any:
    """The settings of the run, for one device of this machine."""
    from omegaconf import DictConfig, OmegaConf

    from swift.config.compose import strategy_settings, typed
    from swift.utils import device

    tree = OmegaConf.create(facts["config"])
    assert isinstance(tree, DictConfig)
    tree.parallel = strategy_settings("single")
    tree.launcher = None
    cfg = typed(tree)
    # On the same kind of device if it is here, else on the CPU. Compiled blocks cannot be looked into.
    there = facts["device"] if facts["device"] == device.kind_here() else "cpu"
    trainer, parallel = replace(cfg.trainer, accelerator=there), replace(cfg.parallel, compile=False)
    return replace(cfg, trainer=trainer, parallel=parallel)


def weights_of(path: Path, facts: dict[str, Any]) -> tuple[Path, bool]:
    """The weights that belong to a file, and whether they are exactly those of its step.

    Raises:
        UserError: there are none any more.
    """
    from swift.parallel.checkpoint import files as checkpoint

    for name, exact in ((facts["weights"], True), (facts["checkpoint"], False)):
        place = path.parent / name if name else None
        if place and (checkpoint.exists(place) or (place / checkpoint.MANIFEST).exists()):
            return (checkpoint.finished(place)[0] if exact else place), exact
    raise UserError(
        f"{path}: neither the weights of step {facts['step']} nor the checkpoint before it "
        f"({facts['checkpoint'] or 'there was none'}) are there; give others with --weights RUN_OR_FILE"
    )


def stand_in(module: Any, facts: dict[str, Any]) -> None:
    """Give a module what its training step asks a Trainer for, as it was then; it logs nothing."""
    import torch

    if facts["target"]:
        module.target_info = facts["target"]
    if facts.get("cells"):
        module.cells = torch.tensor(facts["cells"])
    module._trainer = SimpleNamespace(
        global_step=facts["step"] - 1,
        global_rank=facts["rank"],
        world_size=facts["world"],
        accumulate_grad_batches=facts["accumulate"],
        optimizers=[SimpleNamespace(param_groups=[{"lr": facts["rate"]}])],
        current_epoch=0,
        training=True,
    )
    for name in ("log", "log_dict"):
        vars(module)[name] = lambda *args, **kwargs: None


def text(done: Replayed) -> str:
    """What the command prints."""
    facts, first = done.facts, done.first
    lines = [f"step {facts['step']}, rank {facts['rank']} of {facts['world']}, seed {facts['seed']}, of {facts['run']}"]
    lines.append(f"weights: {done.weights} ({'of that step' if done.exact else 'NOT of that step: the loss differs'})")
    verdict = "the same" if done.same else "another" if done.exact else "with other weights"
    scale = facts["accumulate"]
    lines.append(f"loss: {float(done.loss) * scale!r}; recorded {float(done.recorded) * scale!r}: {verdict}")
    lines.append(f"gradient norm of this micro-batch: {done.gradient_norm:.6g}")
    if first is None:
        lines.append("everything is finite, forward and backward")
    else:
        lines.append(f"first not finite: {first['layer']}, {first['what']} ({first['pass']}): {_numbers(first)}")
    lines += [f"input {name}: {_numbers(values)}" for name, values in done.inputs.items()]
    return "\n".join(lines)


def _numbers(found: dict[str, Any]) -> str:
    return (
        f"{found['nan']} NaN and {found['inf']} infinite of {found['values']} values; "
        f"the others {found['min']:.4g} to {found['max']:.4g}, mean {found['mean']:.4g}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Status 1: with the weights of the step the loss came out differently."""
    parser = argparse.ArgumentParser(prog="python -m swift.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="RUN/guard/step-*/batch-rank-*.safetensors")
    parser.add_argument("--weights", type=Path, help="a run, a checkpoint or an exported file, in place of those kept")
    options = parser.parse_args(arguments)
    set_up_logging()

    def work() -> None:
        done = replay(options.file, options.weights)
        print(text(done))
        if done.exact and not done.same:
            sys.exit(1)

    reported(work)


if __name__ == "__main__":
    main()

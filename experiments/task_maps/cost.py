"""CPU time and memory of the dense heads beside the encoder's, for the model and clips of run.py.

    python experiments/task_maps/cost.py [--clips N] [--repeat N]

Prints a table. Time is the process's own (CPU seconds of one thread), the least of the repetitions; memory is what
autograd keeps between the forward and the backward pass, every storage once, without weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from run import CLIPS, COURSES, MODEL
from torch import Tensor

from swift.config.compose import composed
from swift.models.heads import TargetModel

GRID = (24, 28, 24)


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Least CPU time of a call."""
    found = []
    for _ in range(repeat):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def kept_by(call: Callable[[], Sequence[Tensor] | Tensor], model: TargetModel) -> int:
    """Bytes that autograd keeps of a call, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(call())  # type: ignore[arg-type]
    return sum(kept.values())


def total(outputs: Sequence[Tensor] | Tensor) -> Tensor:
    """A scalar to differentiate."""
    parts = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.stack([part.float().sum() for part in parts]).sum()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(options.clips, 1, *GRID, 20)
    brain = torch.ones(options.clips, *GRID, dtype=torch.bool)
    rows = []
    for head in ("map_unet", "map_local"):
        own = ["task=task_map", f"task.head={head}", f"data.grid={list(GRID)}", "data.spacing=6.0", *MODEL, *COURSES]
        cfg, _ = composed(
            [*own, *CLIPS, "task.target.contrasts=[a,b,c,d,e,f]", "data=store", "data.path=none", "data.split=none"]
        )
        model = TargetModel(cfg.model, cfg.task, GRID, 20)
        assert model.linear is not None
        with torch.no_grad():
            model.linear.maps.normal_()
        features = [feature.detach() for feature in model.encoder(x, brain)]
        courses = model.linear.courses_of_all(x, brain).detach()
        parts: dict[str, tuple[Callable[[], Sequence[Tensor] | Tensor], int]] = {
            "encoder": (lambda m=model: m.encoder(x, brain), sum(p.numel() for p in model.encoder.parameters())),
            "courses of 24 maps": (lambda m=model: m.linear.courses_of_all(x, brain), model.linear.maps.numel()),
            head: (
                lambda m=model, f=features, c=courses: m.head(f, x, brain, c),
                sum(p.numel() for p in model.head.parameters()),
            ),
        }
        for name, (call, parameters) in parts.items():
            if not any(name == row[0] for row in rows):
                forward = seconds(call, options.repeat)
                both = seconds(lambda call=call: total(call()).backward(), options.repeat)
                rows.append((name, parameters, forward, both, kept_by(call, model) / options.clips))
    print("| part | parameters | forward, ms a clip | and backward | kept for it, MB a clip |\n|---|---|---|---|---|")
    for name, parameters, forward, both, kept in rows:
        each = 1000 / options.clips
        print(f"| {name} | {parameters:,} | {forward * each:.0f} | {both * each:.0f} | {kept / 1e6:.1f} |")


if __name__ == "__main__":
    main()

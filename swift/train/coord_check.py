"""Coordinate check of muP: the size of activations must not depend on the width while a model trains.

It trains models of the same depth and 16-fold different width for ten steps on one batch, with and without muP, through
the code that trains real models (`PretrainModule`, its optimizer groups). The size of an activation is its root mean
square. Its slope is that of log size against log width: 0 where the size does not depend on the width. Yang et al. 2022
(arXiv:2203.03466), appendix D. The command and its figure: experiments/mu_transfer/coord_check.py.

Shapes: B clips, X Y Z T voxels and frames, W windows, N tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swift.config.compose import composed
from swift.config.schema import Config
from swift.models.attention import WindowAttention
from swift.models.decoders import LocalDecoder
from swift.models.encoder import SwinBlock
from swift.models.window_layout import partition, plan_groups, slabs, whole_windows
from swift.train.pretrain import Batch, PretrainModule
from swift.utils.errors import UserError

WIDTHS = (16, 32, 64, 128, 256)
VARIANTS = ("factorized", "joint")
MODES = ("mup", "standard")
LIMIT = 0.15
"""Largest |slope| of a block's output that passes with muP."""
READOUT_LIMIT = 0.2
SCORES_LIMIT = 0.15
"""Largest mean slope of the attention scores with muP. They may shrink: divided by head_dim, they start as width^-1/2
and their learned part, of the same size at every width, takes over later. A single layer's scores are noisy."""
STANDARD_LIMIT = 0.5
"""Without muP the steepest activation must grow faster: otherwise the check was too gentle to see anything."""


@dataclass(frozen=True)
class Plan:
    """What is trained: one small architecture at several widths.

    Attributes:
        widths: embed_dim of the models, the first one is the base of muP.
        steps: Optimizer steps.
        lr: Learning rate, that of the base width with muP.
        seeds: Initial weights to average over.
        variant: model/variant.
        decoder: model.decoder.
        depths: Blocks in each stage.
        clips: Clips in the one batch.
    """

    widths: tuple[int, ...] = WIDTHS
    steps: int = 10
    lr: float = 0.01
    seeds: int = 3
    variant: str = "factorized"
    decoder: str = "local"
    depths: tuple[int, ...] = (2, 2)
    clips: int = 2


def settings(plan: Plan, width: int, mode: str, seed: int) -> Config:
    """Settings of one model: 8x8x8 voxels in patches of 2x2x2, 4 frames, windows that shift in space and time."""
    heads = [2**stage for stage in range(len(plan.depths))]
    overrides = [
        f"model/variant={plan.variant}",
        f"model.embed_dim={width}",
        f"model.depths={list(plan.depths)}",
        f"model.num_heads={heads}",
        f"model.decoder={plan.decoder}",
        "model.patch_size=[2,2,2,1]",
        "model.window=[2,2,2,2]",
        "data=synthetic",
        "data.grid=[8,8,8]",
        "data.frames=4",
    ]
    return mode_config(overrides, mode, plan.widths[0], plan.lr, seed)


def mode_config(overrides: Sequence[str], mode: str, base_width: int, lr: float, seed: int) -> Config:
    """Settings of a model of a family of widths, with muP or without.

    Args:
        overrides: Of model, data and task.
        mode: One of MODES.
        base_width: embed_dim whose rates muP keeps.
        lr: Learning rate, that of the base width with muP.
        seed: Of the weights.
    """
    chosen = ["optimizer=adamw_mup", f"optimizer.base_width={base_width}"] if mode == "mup" else ["optimizer=adamw"]
    return composed([*overrides, *chosen, f"optimizer.lr={lr}", f"seed={seed}"])[0]


def loss_of(module: PretrainModule, batch: Batch) -> Tensor:
    """The loss at hidden brain voxels, as in training."""
    return module.loss(batch)


def one_batch(cfg: Config, clips: int, seed: int) -> Batch:
    """Clips of a few smooth spatial maps with slow time courses and some noise, each voxel near unit variance."""
    generator = torch.Generator().manual_seed(seed)
    grid, frames = cfg.data.grid, cfg.data.frames
    coarse = torch.randn(clips, 6, *[max(n // 4, 1) for n in grid], generator=generator)
    maps = nn.functional.interpolate(coarse, size=tuple(grid), mode="trilinear")
    courses = torch.randn(clips, 6, frames, generator=generator).cumsum(-1)
    signal = torch.einsum("bkxyz,bkt->bxyzt", maps, courses)
    bold = signal / signal.std() + 0.5 * torch.randn(signal.shape, generator=generator)
    return {
        "bold": bold.unsqueeze(1),
        "brain": torch.ones(clips, *grid, dtype=torch.bool),
        "sample_id": torch.arange(clips),
        "valid": torch.ones(clips, dtype=torch.bool),
    }


def size(x: Tensor) -> float:
    """Root mean square."""
    return float(x.detach().double().square().mean().sqrt())


def logits_size(attention: WindowAttention, x: Tensor) -> float:
    """Root mean square of the attention scores, centred for each query since softmax does not see their mean.

    Args:
        attention: the layer.
        x: (B, X, Y, Z, T, C), its input.
    """
    grid = tuple(x.shape[1:5])
    groups = plan_groups(grid, tuple(w or n for w, n in zip(attention.window, grid)), attention.shifted)
    total, count = 0.0, 0
    (piece,) = whole_windows(groups, len(x), x.shape[:5].numel())
    for slab, (group, _) in zip(slabs(attention.qkv(partition(x, groups)), piece), piece):
        q, k, _ = attention.split_heads(slab, group.shape)
        scores = q @ k.transpose(-2, -1) * (attention.scale or q.shape[-1] ** -0.5)
        centred = scores - scores.mean(-1, keepdim=True)
        total, count = total + float(centred.square().sum()), count + centred.numel()
    return math.sqrt(total / count)


def places(module: PretrainModule) -> dict[str, tuple[nn.Module, Callable[..., float]]]:
    """What is measured: name -> (module to watch, size of it from the module's input and output).

    "readout" is where the width ends: the sum of the laterals in the local decoder, the voxels in the linear one.
    """
    found: dict[str, tuple[nn.Module, Callable[..., float]]] = {}
    for name, part in module.model.encoder.named_modules():
        short = name.replace("stages.", "stage ").replace(".blocks.", " block ").replace(".fn", "").replace(".", " ")
        if isinstance(part, SwinBlock):
            found[short] = (part, lambda layer, given, made: size(made))
        elif isinstance(part, WindowAttention):
            found[f"{short} scores"] = (part, lambda layer, given, made: logits_size(layer, given[0]))
    decoder: nn.Module = module.model.decoder
    head = decoder.get_submodule("head")
    if isinstance(decoder, LocalDecoder):
        found["readout"] = (decoder.norm, lambda layer, given, made: size(given[0]))
    found["prediction" if "readout" in found else "readout"] = (head, lambda layer, given, made: size(made))
    return found


def measure(cfg: Config, batch: Batch, steps: int) -> dict[str, list[float]]:
    """Train on one batch at a constant rate.

    Returns:
        Place -> its size before training and after 1, ..., `steps` steps; "loss" likewise.
    """
    torch.manual_seed(cfg.seed)
    module = PretrainModule(cfg)
    optimizer = module.configure_optimizers()["optimizer"]
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    sizes: dict[str, list[float]] = {"loss": []}

    def watch(name: str, how: Callable[..., float]) -> Callable[..., None]:
        def hook(layer: nn.Module, given: Any, made: Any) -> None:
            with torch.no_grad():
                sizes.setdefault(name, []).append(how(layer, given, made))

        return hook

    for name, (part, how) in places(module).items():
        part.register_forward_hook(watch(name, how))
    for step in range(steps + 1):
        loss = loss_of(module, batch)
        sizes["loss"].append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate  # the schedule's warm-up would make the first steps too small to see anything
            optimizer.step()
    return sizes


@dataclass
class Result:
    """What came out.

    Attributes:
        plan: What was trained.
        sizes: Mode -> place -> (widths, steps + 1): geometric mean over the seeds.
        slopes: Mode -> place -> (steps + 1,): slope of log size against log width.
        failures: What does not pass, in words.
    """

    plan: Plan
    sizes: dict[str, dict[str, np.ndarray]]
    slopes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def slope(widths: Sequence[int], sizes: np.ndarray) -> np.ndarray:
    """Least-squares slope of log size (widths, steps) against log width, one a step."""
    x = np.log(widths) - np.mean(np.log(widths))
    return x @ np.log(sizes) / (x @ x)


def run(plan: Plan, say: Callable[[str], None]) -> Result:
    """Train all models of the plan, check the slopes after the last step.

    Raises:
        UserError: an architecture that does not fit together, or a size that is not finite.
    """
    for width in plan.widths:
        settings(plan, width, "mup", 0)  # a width that cannot be is refused before the others are trained
    sizes: dict[str, dict[str, np.ndarray]] = {}
    for mode in MODES:
        logs: dict[str, np.ndarray] = {}
        for row, width in enumerate(plan.widths):
            for seed in range(plan.seeds):
                cfg = settings(plan, width, mode, seed)
                for name, values in measure(cfg, one_batch(cfg, plan.clips, seed), plan.steps).items():
                    if not np.all(np.isfinite(values)) or min(values) <= 0:
                        raise UserError(f"{name} is not finite at width {width} ({mode}): --lr {plan.lr} is too large")
                    table = logs.setdefault(name, np.zeros((len(plan.widths), plan.steps + 1)))
                    table[row] += np.log(values) / plan.seeds
            first, last = np.exp(logs["loss"][row, [0, -1]])
            say(f"{mode}, width {width}: loss {first:.3f} -> {last:.3f}")
        sizes[mode] = {name: np.exp(table) for name, table in logs.items()}
    result = Result(plan, sizes)
    result.slopes = {
        mode: {name: slope(plan.widths, table) for name, table in tables.items() if name != "loss"}
        for mode, tables in sizes.items()
    }
    result.failures = find_failures(result)
    return result


def is_scores(place: str) -> bool:
    """Whether a place is the scores of an attention layer."""
    return place.endswith(" scores")


def is_block(place: str) -> bool:
    """Whether a place is the output of a block."""
    return " block " in place and not is_scores(place)


def find_failures(result: Result) -> list[str]:
    """Slopes after the last step that break a limit, in words; [] if the check passes."""
    bad = []
    scores = [values[-1] for name, values in result.slopes["mup"].items() if is_scores(name)]
    if np.mean(scores) > SCORES_LIMIT:
        bad.append(f"with muP the mean slope of attention scores is {np.mean(scores):+.2f}, above {SCORES_LIMIT}")
    for name, values in result.slopes["mup"].items():
        if is_scores(name):
            continue
        limit = READOUT_LIMIT if name in ("readout", "prediction") else LIMIT
        if abs(values[-1]) > limit:
            bad.append(f"with muP the slope of {name} is {values[-1]:+.2f}, more than {limit}")
    blocks = {name: values[-1] for name, values in result.slopes["standard"].items() if is_block(name)}
    steepest = max(blocks, key=lambda name: blocks[name])
    if blocks[steepest] <= STANDARD_LIMIT:
        bad.append(
            f"without muP the steepest slope of a block is {blocks[steepest]:+.2f} ({steepest}), "
            f"not above {STANDARD_LIMIT}: too gentle a check, raise --lr"
        )
    return bad


def report(result: Result) -> dict[str, Any]:
    """Everything as plain numbers for machines."""
    return {
        "plan": asdict(result.plan),
        "limits": {"mup": LIMIT, "mup_readout": READOUT_LIMIT, "mup_scores": SCORES_LIMIT, "standard": STANDARD_LIMIT},
        "passed": not result.failures,
        "failures": result.failures,
        "slopes": {mode: {k: v.tolist() for k, v in table.items()} for mode, table in result.slopes.items()},
        "sizes": {mode: {k: v.tolist() for k, v in table.items()} for mode, table in result.sizes.items()},
    }


def text(result: Result) -> str:
    """A table of the slopes after the last step."""
    plan, slopes = result.plan, result.slopes
    width = max(len(name) for name in slopes["mup"])
    lines = [f"slope of log size against log width, widths {plan.widths[0]} to {plan.widths[-1]}, step {plan.steps}"]
    lines.append(f"  {'':<{width}}  with muP  without")
    for name in slopes["mup"]:
        lines.append(f"  {name:<{width}}  {slopes['mup'][name][-1]:>+8.2f} {slopes['standard'][name][-1]:>+8.2f}")
    lines.append("passed" if not result.failures else "failed: " + "; ".join(result.failures))
    return "\n".join(lines)

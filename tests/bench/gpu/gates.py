"""Right before fast: outputs and gradients on the device beside the slow reference in float64.

`norm` in a name is the norm of a difference over that of the reference. What must hold is in LIMITS; a row says `ok`.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from swift.config.compose import composed
from swift.config.schema import ModelConfig
from swift.models.encoder import SwinEncoder
from swift.parallel.recompute import prepare_blocks
from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.build import Step, settings
from tests.bench.gpu.measure import kernels
from tests.models import cases as shapes
from tests.models import reference

LIMITS = {
    # Single products in float32 (no TF32) round at 6e-8; sums over a clip's tokens add up.
    "fp32": {"outputs": 1e-5, "gradients": 1e-4},
    # bf16 has 8 bits: 4e-3 a rounding, a few dozen of them one after the other.
    "bf16": {"outputs": 3e-2, "gradients": 1e-1},
}
COLUMNS = (("ok", "5"), ("outputs", "9.1e"), ("gradients", "9.1e"), ("worst", "9.1e"), ("graphs", "6d"), ("text", "8"))
KINDS: dict[str, dict[str, Any]] = {
    "v1": shapes.V1,
    "joint": shapes.JOINT,
    "joint-rope_global": {**shapes.JOINT, "position": "rope_global", "last_stage": "windowed"},
    "factorized": {**shapes.FACTORIZED, "last_stage": "windowed", "layer_scale": 0.1},
    "factorized-full-last": {**shapes.FACTORIZED, "layer_scale": 0.1},
    "factorized-rope_global": {**shapes.FACTORIZED, "position": "rope_global", "layer_scale": 0.1},
    "factorized-absolute": {**shapes.FACTORIZED, "position": "absolute", "layer_scale": None},
    "factorized-ts-each": {**shapes.FACTORIZED, "order": "ts", "mlp": "each", "layer_scale": None},
}
Grads = dict[str, Tensor]


def config(bench: Bench, kind: str, head_dim: int) -> tuple[ModelConfig, tuple[int, int, int], int]:
    """Architecture, grid and frames: every axis has a cut window, shifted and not, and merging pads."""
    space, frames = (10, 4) if bench.small else (36, 12)
    patch = 2 if bench.small else 6
    width = 2 * head_dim if bench.small else 4 * head_dim
    shape = shapes.Shape(
        (space, space, space - patch), frames, (patch, patch, patch, 1), (4, 4, 4, 2 if bench.small else 10),
        (2, 2, 2), width, tuple(width // head_dim * 2**stage for stage in range(3)),
    )  # fmt: skip
    return shapes.config(KINDS[kind], shape, rope_base=10000.0, mlp_ratio=4.0), shape.grid, frames


def weigh(features: list[Tensor]) -> Tensor:
    """A scalar to which all features contribute, each value with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64, device=features[0].device)
    for index, feature in enumerate(features):
        generator = torch.Generator().manual_seed(100 + index)
        weights = torch.randn(feature.shape[1:], generator=generator).to(feature.device, torch.float64)
        total = total + (feature.double() * weights).sum() / feature[0].numel()
    return total


def backward(model: nn.Module, x: Tensor, narrow: bool = False) -> tuple[list[Tensor], Grads]:
    """Features and gradients of a model, the input's among them."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=narrow):
        features = model(x)
    weigh(features).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"the input": x.grad}
    model.zero_grad(set_to_none=True)
    return [feature.detach() for feature in features], grads


def slow(cfg: ModelConfig, grid: Any, frames: int, state: reference.State, x: Tensor) -> tuple[list[Tensor], Grads]:
    """The same of the slow reference, float64 on the CPU."""
    state = {name: value.clone().requires_grad_() for name, value in state.items()}
    x = x.double().clone().requires_grad_()
    features = reference.encode(cfg, grid, frames, state, x)
    weigh(features).backward()
    grads = {name: value.grad for name, value in state.items() if value.grad is not None} | {"the input": x.grad}
    return [feature.detach() for feature in features], grads


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Norm of the difference over the norm, all tensors as one vector."""
    above = sum(float((a.double().cpu() - b.double().cpu()).square().sum()) for a, b in zip(got, wanted, strict=True))
    below = sum(float(b.double().cpu().square().sum()) for b in wanted)
    return (above / max(below, 1e-300)) ** 0.5


def compare(got: tuple[list[Tensor], Grads], wanted: tuple[list[Tensor], Grads], limit: dict[str, float]) -> Row:
    """Distances of features, of all gradients together, and of the worst parameter; and whether they are in limits."""
    assert got[1].keys() == wanted[1].keys(), got[1].keys() ^ wanted[1].keys()
    names = list(wanted[1])
    each = {name: distance([got[1][name]], [wanted[1][name]]) for name in names}
    worst = max(each, key=lambda name: each[name])
    outputs = distance(got[0], wanted[0])
    gradients = distance([got[1][name] for name in names], [wanted[1][name] for name in names])
    ok = outputs <= limit["outputs"] and gradients <= limit["gradients"]
    return {"ok": ok, "outputs": outputs, "gradients": gradients, "worst": each[worst], "text": f"worst: {worst}"}


def built(bench: Bench, kind: str, head_dim: int, clips: int = 2) -> tuple[Any, ...]:
    """Settings, weights of ordinary size in float64, a clip, and the model with them in float32 on the device."""
    cfg, grid, frames = config(bench, kind, head_dim)
    generator = torch.Generator().manual_seed(3)
    state = reference.random_state(reference.parameter_shapes(cfg, grid, frames), generator)
    state = {name: value.float().double() for name, value in state.items()}
    x = torch.randn(clips, 1, *grid, frames, generator=generator)
    model = SwinEncoder(cfg, grid, frames)
    model.load_state_dict(state)
    return cfg, grid, frames, state, x, model.to(bench.device).train()


def against_reference(bench: Bench, kind: str, head_dim: int, precision: str, stream: str = "autocast") -> Row:
    """A variant beside the slow reference: fp32 without TF32, bf16 by autocast, or with bf16 weights and stream."""
    cfg, grid, frames, state, x, model = built(bench, kind, head_dim)
    torch.set_float32_matmul_precision("highest")
    try:
        if stream == "bf16":
            model.bfloat16()
            state = {name: value.bfloat16().double() for name, value in state.items()}
        got = backward(model, x.to(bench.device), narrow=precision == "bf16" and stream == "autocast")
        return compare(got, slow(cfg, grid, frames, state, x), LIMITS[precision])
    finally:
        torch.set_float32_matmul_precision("high")


def compiled(bench: Bench, kind: str, head_dim: int, precision: str) -> Row:
    """Compiled blocks beside eager ones; graphs and graph breaks of torch.compile."""
    cfg = built(bench, kind, head_dim)
    x, model = cfg[4].to(bench.device), cfg[5]
    narrow = precision == "bf16"
    torch.set_float32_matmul_precision("highest")
    try:
        eager = backward(model, x, narrow)
        again = copy.deepcopy(model)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        prepare_blocks(again, composed(["data=store", "data.path=none", "parallel.compile=true"])[0].parallel)
        row = compare(backward(again, x, narrow), eager, LIMITS[precision])
        counters = torch._dynamo.utils.counters
        breaks = sum(counters["graph_break"].values())
        graphs = int(counters["stats"]["unique_graphs"])
        row |= {"graphs": graphs, "breaks": breaks, "text": f"{breaks} graph breaks; {row['text']}"}
        row["ok"] = row["ok"] and breaks == 0
        return row
    finally:
        torch.set_float32_matmul_precision("high")


def product_shape(bench: Bench, model: str) -> tuple[SwinEncoder, Any]:
    """The encoder of a size on the grid of its targets, float32 weights of ordinary size.

    Two blocks a stage, one plain and one shifted, are all kinds of them: more would only need more memory.
    """
    cfg = settings(bench, model, "model.depths=[2,2,2,2]")
    encoder = SwinEncoder(cfg.model, cfg.data.grid, cfg.data.frames).to(bench.device)
    generator = torch.Generator(device=bench.device).manual_seed(5)
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        elif not name.endswith(("weight", "gamma")):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return encoder.train(), cfg


def many_clips(bench: Bench, model: str, clips: int, stream: str) -> Row:
    """Many clips at once beside one after the other: features, and gradients that must be their sum.

    Rows of a launch grow with the clips; a kernel that silently stops at 65,535 of them shows here.
    """
    encoder, cfg = product_shape(bench, model)
    if stream == "bf16":
        encoder.bfloat16()
    narrow = stream == "autocast"
    generator = torch.Generator(device=bench.device).manual_seed(9)
    x = torch.randn(clips, 1, *cfg.data.grid, cfg.data.frames, device=bench.device, generator=generator)
    sums: Grads = {}
    features: list[list[Tensor]] = []
    inputs = []
    for clip in x.split(1):
        found, grads = backward(encoder, clip, narrow)
        features.append([feature.cpu() for feature in found])
        inputs.append(grads.pop("the input"))
        sums = {name: grad.float() + sums[name] if name in sums else grad.float() for name, grad in grads.items()}
    one_by_one = [torch.cat(parts) for parts in zip(*features)]
    wanted = one_by_one, sums | {"the input": torch.cat(inputs)}
    del found, grads, features
    return compare(backward(encoder, x, narrow), wanted, LIMITS["bf16"])


def twice(bench: Bench, model: str, clips: int, weights: str, compile_it: bool) -> Row:
    """Two steps from the same weights: loss and all gradients equal to the last bit."""
    parallel = {"mixed": "single", "bf16": "zero1"}[weights]
    cfg = settings(bench, model, f"parallel={parallel}", f"parallel.compile={str(compile_it).lower()}")
    step = Step(cfg, clips, bench.device, weights)

    def gradients() -> list[Tensor]:
        loss = step.forward()
        loss.backward()
        found = [loss.detach(), *(p.grad for p in step.module.parameters() if p.grad is not None)]
        step.module.zero_grad(set_to_none=True)
        return found

    first = gradients()
    names = ["loss", *(name for name, p in step.module.named_parameters() if p.requires_grad)]
    differ = [name for name, a, b in zip(names, first, gradients()) if not torch.equal(a, b)]
    text = f"{len(differ)} of {len(first)} differ" + (f", first {differ[0]}" if differ else "")
    return {"ok": not differ, "text": text}


def which_kernel(bench: Bench, model: str, clips: int, stream: str) -> Row:
    """Names of the attention kernels that ran."""
    encoder, cfg = product_shape(bench, model)
    if stream == "bf16":
        encoder.bfloat16()
    x = torch.randn(clips, 1, *cfg.data.grid, cfg.data.frames, device=bench.device)
    seen = kernels(lambda: backward(encoder, x, stream == "autocast"), bench.device)
    marks = ("flash", "fmha", "attention", "efficient", "cudnn", "softmax", "window")
    found: Counter[str] = Counter()
    for name, (count, _) in seen.by_name.items():
        if any(mark in name.lower() for mark in marks):
            found[name.split("<")[0].split("(")[0][-70:]] += count
    return {
        "ok": True,
        "text": "; ".join(f"{name} x{count}" for name, count in found.most_common()),
        "kernels": seen.count,
    }


def cases(bench: Bench) -> list[Case]:
    """What most probably breaks first."""
    gpu, first = not bench.small, "7m" if bench.small else "51m"
    dims = (16, 64, 128) if gpu else (8,)
    made = []

    def add(name: str, work: Any, *args: Any) -> None:
        made.append(Case(name, lambda: work(bench, *args)))

    clips = 10 if gpu else 2
    for precision in ("fp32", "bf16"):
        add(f"factorized d={dims[0]} {precision}", against_reference, "factorized", dims[0], precision)
    add(f"which kernel {first} {clips} clips autocast", which_kernel, first, clips, "autocast")
    add(f"which kernel {first} {clips} clips bf16", which_kernel, first, clips, "bf16")
    for stream in ("autocast", "bf16"):
        add(f"{first} {clips} clips at once, {stream}", many_clips, first, clips, stream)
    add(f"two runs {first} {clips} clips mixed eager", twice, first, clips, "mixed", False)
    if gpu:
        add("compiled factorized d=64 bf16", compiled, "factorized", 64, "bf16")
    for kind in KINDS:
        for precision in ("fp32", "bf16"):
            for dim in dims if kind == "factorized" else dims[:1]:
                if (kind, dim) != ("factorized", dims[0]):
                    add(f"{kind} d={dim} {precision}", against_reference, kind, dim, precision)
    add(f"factorized d={dims[-1]} bf16 weights and stream", against_reference, "factorized", dims[-1], "bf16", "bf16")
    if gpu:
        for kind in KINDS:
            add(f"compiled {kind} d=16 bf16", compiled, kind, 16, "bf16")
        add("compiled factorized d=64 fp32", compiled, "factorized", 64, "fp32")
        add("806m 9 clips at once, bf16", many_clips, "806m", 9, "bf16")
        add("two runs 806m 8 clips bf16 compiled", twice, "806m", 8, "bf16", True)
        add("which kernel 806m 8 clips bf16", which_kernel, "806m", 8, "bf16")
        add("which kernel 3b 4 clips bf16", which_kernel, "3b", 4, "bf16")
        add("3b 4 clips at once, bf16", many_clips, "3b", 4, "bf16")
    return made


PART = Part("outputs and gradients beside the slow reference, compiled, many clips, bit-equal, kernels", cases, COLUMNS)

"""Models, batches and the bare training step that the parts measure, made of the product's own pieces."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from swift.config.compose import composed
from swift.config.schema import Config
from swift.models.init import fill
from swift.parallel.recompute import prepare_blocks
from swift.parallel.strategies import _Float32
from swift.plan.flops import model_flops
from swift.plan.geometry import geometry_of
from swift.plan.memory import memory, sharding_of
from swift.plan.step_time import recomputed_flops
from swift.train.optim import build_optimizer
from swift.train.pretrain import PretrainModule
from tests.bench.gpu.base import Bench, Row
from tests.bench.gpu.measure import DATASHEET, GIB, kernels, milliseconds, peak_gib

SMALL = ["data.grid=[24,24,24]", "data.frames=4", "model.patch_size=[3,3,3,1]", "model.depths=[2,2,2,2]"]


def settings(bench: Bench, model: str, *overrides: str) -> Config:
    """Settings of a run of a size; in small form on a grid of 24 with 4 frames."""
    base = [f"model={model}", "data=store", "data.path=none", "data.grid=[96,96,96]", "data.spacing=2.0"]
    return composed([*base, *(SMALL if bench.small else []), *overrides])[0]


def make_batch(cfg: Config, clips: int, device: torch.device) -> dict[str, Tensor]:
    """Random clips in an ellipsoid of a quarter of the grid, as the loader hands them over."""
    grid = cfg.data.grid
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n, device=device) for n in grid), indexing="ij")
    brain = sum((axis / radius) ** 2 for axis, radius in zip(axes, (0.74, 0.9, 0.72))) <= 1
    generator = torch.Generator(device=device).manual_seed(7)
    shape = (clips, 1, *grid, cfg.data.frames)
    bold = torch.randn(shape, generator=generator, device=device) * brain[..., None]
    return {
        "bold": bold,
        "brain": brain.expand(clips, *grid).contiguous(),
        "sample_id": torch.arange(clips, device=device),
        "valid": torch.ones(clips, dtype=torch.bool, device=device),
    }


def make_module(cfg: Config, device: torch.device) -> PretrainModule:
    """The product's module with its initial values, made on the device."""
    module = PretrainModule(cfg, empty=True)
    module.model.to_empty(device=device)
    values = module.initial_values()
    for name, parameter in module.named_parameters():
        fill(parameter.detach().view(-1), values[name], cfg.seed, name)
    return module.to(device).train()


class Step:
    """Mask, forward, loss, backward, clipping and AdamW, without a training loop.

    Args:
        cfg: Of the run; parallel.compile and parallel.activation_checkpointing are applied as strategies do.
        clips: Of a micro-batch.
        device: Where it runs.
        weights: mixed: float32 weights, products in bf16 by autocast (parallel=single, ddp) | bf16: bf16 weights and
            stream, AdamW on float32 copies (what ZeRO does on one rank, without its buckets) | fp32.
    """

    def __init__(self, cfg: Config, clips: int, device: torch.device, weights: str) -> None:
        assert weights in ("mixed", "bf16", "fp32"), weights
        self.cfg, self.clips, self.device, self.weights = cfg, clips, device, weights
        self.module = make_module(cfg, device)
        self.batch = make_batch(cfg, clips, device)
        if weights == "bf16":
            masters = {parameter: parameter.detach().clone() for parameter in self.module.model.parameters()}
            self.module.model.bfloat16()
        prepare_blocks(self.module.model, cfg.parallel)
        self.optimizer = build_optimizer(self.module.model, cfg.optimizer, self.module.widths)
        self.narrow: list[Tensor] = []
        self.masters: list[Tensor] = []
        if weights == "bf16":
            for group in self.optimizer.param_groups:
                self.narrow += group["params"]
                group["params"] = [masters[parameter] for parameter in group["params"]]
                self.masters += group["params"]
        self.clipper = _Float32()

    def forward(self) -> Tensor:
        """The loss of the micro-batch."""
        narrow = torch.autocast(self.device.type, torch.bfloat16) if self.weights == "mixed" else nullcontext()
        with narrow:
            return self.module.loss(self.batch)

    def update(self) -> None:
        """Clip and step; gradients are gone afterwards."""
        if self.weights == "bf16":
            pairs = [(wide, narrow) for wide, narrow in zip(self.masters, self.narrow) if narrow.grad is not None]
            for wide, narrow in pairs:
                wide.grad = narrow.grad.float()
                narrow.grad = None
        self.clipper.clip_gradients(self.optimizer, self.cfg.trainer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.weights == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(self.narrow, self.masters)

    def __call__(self) -> Tensor:
        """One step; returns its loss."""
        loss = self.forward()
        loss.backward()
        self.update()
        return loss.detach()


def planned_gib(cfg: Config, clips: int, weights: str) -> float:
    """What `swift.plan` says that a device holds at the peak of this step, GiB."""
    geometry = geometry_of(cfg)
    sharding = sharding_of(cfg, geometry, 1, weights != "fp32", 1)
    return memory(geometry, sharding, clips).total / GIB


def step_row(step: Step, rates: dict[str, Any], seconds: float = 1.5, fixed: int = 0) -> Row:
    """Figures of a step: clips/s, MFU, kernels, idle share, memory beside the plan.

    Args:
        step: To be measured.
        rates: `measure.card`.
        seconds: To measure for.
        fixed: Steps of a round, where several ranks step together; 0: as many as the time allows.
    """
    cfg, device = step.cfg, step.device
    loss = step()
    step()
    peak = peak_gib(step, device)
    ms = milliseconds(step, device, seconds, warm=1, fixed=fixed)
    seen = kernels(step, device)
    geometry = geometry_of(cfg)
    work = step.clips * model_flops(geometry).total
    again = step.clips * recomputed_flops(geometry, cfg.parallel.activation_checkpointing)
    plan = planned_gib(cfg, step.clips, step.weights)
    rate = work / (ms / 1000)
    return {
        "ms": ms,
        "clips_s": 1000 * step.clips / ms,
        "mfu": rate / DATASHEET,
        "mfu_card": rate / (rates["matrix_tflops"] * 1e12),
        "hfu": (work + again) / (ms / 1000) / DATASHEET,
        "tflop": work / 1e12,
        "kernels": seen.count,
        "idle": max(0.0, 1 - seen.busy_ms / ms) if device.type == "cuda" else None,
        "waits": seen.waits,
        "peak_gib": peak,
        "plan_gib": plan,
        "peak/plan": None if peak is None else peak / plan,
        "loss": float(loss),
    }

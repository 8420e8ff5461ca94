"""The attention branch alone at stage 1, with each implementation that `swift.models.attention` offers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import swift.models.attention as attention
from tests.bench.gpu.base import Bench, Case, Part, Row
from tests.bench.gpu.measure import kernels, milliseconds
from tests.bench.gpu.stages import encoder_of, passes, tokens

COLUMNS = (("ms", "9.3f"), ("kernels", "7d"), ("forward_ms", "9.3f"), ("text", "8"))


def implementations(device: torch.device) -> list[str]:
    """Names of the implementations that the device has; `current` where the model has no choice."""
    names = getattr(attention, "METHODS", ["current"])
    return [name for name in names if name != "kernel" or device.type == "cuda"]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within it, attention runs by this implementation."""
    layers: Any = attention.WindowAttention
    before = getattr(layers, "method", None)
    if name != "current":
        layers.method = name
    try:
        yield
    finally:
        if name != "current":
            layers.method = before


def one(bench: Bench, model: str, clips: int, branch: str, shifted: bool, name: str) -> Row:
    """A row."""
    encoder, cfg = encoder_of(bench, model)
    module = encoder.stages[0].get_submodule(f"blocks.{int(shifted)}.{branch}.fn")
    x, gradient = tokens(bench, encoder, 0, clips, cfg.model.embed_dim)
    seconds = 0.03 if bench.small else 0.4
    with using(name):
        work = passes(module, x, gradient)
        ms = milliseconds(work, bench.device, seconds)
        seen = kernels(work, bench.device)
        forward = milliseconds(lambda: module(x.detach()), bench.device, seconds)
    longest = [f"{name[:60]} x{count} {took:.2f} ms" for name, (count, took) in list(seen.by_name.items())[:3]]
    return {"ms": ms, "kernels": seen.count, "forward_ms": forward, "text": "; ".join(longest), "by_name": seen.by_name}


def cases(bench: Bench) -> list[Case]:
    """Both branches of the three sizes."""
    if bench.small:
        shapes = [("7m", 1, branch, True) for branch in ("space", "time")]
    else:
        shapes = [
            (model, clips, branch, shifted)
            for model, clips in (("806m", 8), ("3b", 4), ("51m", 16), ("806m", 1))
            for branch in ("space", "time")
            for shifted in (True, False)
        ]
    return [
        Case(
            f"{model} {clips} clips {branch} {'shifted' if shifted else 'plain'} {name}",
            lambda kind=(model, clips, branch, shifted, name): one(bench, *kind),  # type: ignore[misc]
        )
        for model, clips, branch, shifted in shapes
        for name in implementations(bench.device)
    ]


PART = Part("attention of stage 1 alone, forward + backward, by implementation", cases, COLUMNS)

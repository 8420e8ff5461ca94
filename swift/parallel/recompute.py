"""What the backward pass recomputes, and torch.compile: applied to the blocks that a model names, from outside.

A model only says which of its parts repeat (`blocks()`); nothing in it knows that they are recomputed or compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from swift.config.schema import ParallelConfig
from swift.models.attention import HAS_TRITON, WindowAttention
from swift.models.packed import layout_of
from swift.models.token_sets import TokenSet


def _kept_operations() -> list[Any]:
    """Operations whose results selective checkpointing keeps, as they are expensive: matrix products and attention."""
    aten = torch.ops.aten
    names = (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    kept = [getattr(aten, name).default for name in names if hasattr(aten, name)]
    if HAS_TRITON:
        importlib.import_module("swift.models.window_kernel")
        kept.append(torch.ops.swift.window_attention.default)
    return kept


def recomputing(forward: Callable[..., Any], how: str) -> Callable[..., Any]:
    """A forward function whose activations are computed again in the backward pass.

    Args:
        forward: Of a block.
        how: block: only its input is kept | selective: its input and the results of matrix products and attention.
    """
    assert how in ("block", "selective"), how
    extra: dict[str, Any] = {}
    if how == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_operations())
    return partial(checkpoint, forward, use_reentrant=False, **extra)


def compiled(block: Any) -> Callable[..., Tensor]:
    """The forward function of a block as one graph."""
    layers = [layer for layer in block.modules() if isinstance(layer, WindowAttention)]
    forward = torch.compile(block.forward, fullgraph=True)

    def run(x: Tensor, where: TokenSet | None = None) -> Tensor:
        for layer in layers:
            if where is None:
                layer.plan(x)
            else:
                layout_of(layer, x, where)
        return forward(x) if where is None else forward(x, where)

    return run


def prepare_blocks(model: Any, cfg: ParallelConfig) -> None:
    """Apply activation checkpointing and torch.compile to `model.blocks()`, in place; names stay as they are."""
    blocks = model.blocks()
    if cfg.compile:
        # Blocks share their code: one graph for each kind of them, with and without gradients. Beyond torch's limit of
        # 8 the rest would run as if it had not been compiled.
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))
    for block in blocks:
        if cfg.compile:
            # Before it is wrapped: torch.compile gives up on a block whose recomputing it has to look into.
            block.forward = compiled(block)
        if cfg.activation_checkpointing != "none":
            block.forward = recomputing(block.forward, cfg.activation_checkpointing)

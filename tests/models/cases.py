"""Small models and clips that together reach every path of the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swift.config.schema import ModelConfig

V1: dict[str, Any] = {
    "variant": "v1",
    "patch_norm": False,
    "position": "absolute",
    "attention": "joint",
    "last_stage": "unshifted",
    "layer_scale": None,
    "final_norm": False,
}
JOINT: dict[str, Any] = {**V1, "variant": "joint", "patch_norm": True, "last_stage": "full", "final_norm": True}
FACTORIZED: dict[str, Any] = {
    "variant": "factorized",
    "patch_norm": True,
    "position": "rope",
    "attention": "factorized",
    "last_stage": "full",
    "layer_scale": 1e-5,
    "final_norm": True,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "v1": V1,
    "joint": JOINT,
    "joint-windowed-last": {**JOINT, "last_stage": "windowed"},
    "joint-rope": {**JOINT, "position": "rope", "layer_scale": 1e-5},
    "joint-rope_global": {**JOINT, "position": "rope_global", "last_stage": "unshifted"},
    "joint-none": {**JOINT, "position": "none", "final_norm": False},
    "factorized": FACTORIZED,
    "factorized-ts": {**FACTORIZED, "order": "ts", "last_stage": "windowed"},
    "factorized-each": {**FACTORIZED, "mlp": "each", "final_norm": False},
    "factorized-ts-each": {**FACTORIZED, "order": "ts", "mlp": "each", "last_stage": "unshifted", "layer_scale": None},
    "factorized-rope_global": {**FACTORIZED, "position": "rope_global", "last_stage": "windowed"},
    "factorized-absolute": {**FACTORIZED, "position": "absolute", "patch_norm": False},
    "factorized-none": {**FACTORIZED, "position": "none", "order": "ts", "layer_scale": None},
}


@dataclass(frozen=True)
class Shape:
    """A clip, and how it is cut."""

    grid: tuple[int, int, int]
    frames: int
    patch: tuple[int, int, int, int]
    window: tuple[int, int, int, int]
    depths: tuple[int, ...]
    embed_dim: int
    heads: tuple[int, ...]


SHAPES: dict[str, Shape] = {
    # Tokens 4x4x4x4, then 2x2x2x4: everything divides; the second stage's windows are clipped to the grid in space.
    "divisible": Shape((8, 8, 8), 4, (2, 2, 2, 1), (2, 2, 2, 2), (2, 2), 16, (2, 4)),
    # Tokens 6x5x5x3, then 3x3x3x3, 2x2x2x3: the patch, the windows and the merging all need padding.
    "padded": Shape((11, 13, 9), 5, (2, 3, 2, 2), (3, 2, 4, 2), (2, 2, 1), 16, (2, 2, 4)),
    # Tokens 3x2x4x9, then 2x1x2x9: a long time axis of three windows, a head of five pairs (dealt 2, 2, 1).
    "long": Shape((9, 6, 12), 9, (3, 3, 3, 1), (2, 2, 2, 4), (2, 2), 10, (1, 2)),
    # Tokens 5x3x1x7, then 3x2x1x7, 2x1x1x7: axes of one token, one axis shorter than its window, frames not divisible.
    "thin": Shape((10, 5, 2), 13, (2, 2, 2, 2), (4, 3, 2, 3), (2, 1, 2), 12, (1, 2, 2)),
    # Tokens 4x3x5x4, then 2x2x3x4: windows of one token on some axes, next to an axis that one window covers.
    "slices": Shape((8, 6, 10), 4, (2, 2, 2, 1), (4, 1, 1, 4), (2, 2), 16, (2, 4)),
}


def config(variant: str | dict[str, Any], shape: str | Shape, **changes: Any) -> ModelConfig:
    """The settings of a variant on a shape, with changes."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    options: dict[str, Any] = {
        "name": "test",
        "embed_dim": shape.embed_dim,
        "depths": list(shape.depths),
        "num_heads": list(shape.heads),
        "patch_size": list(shape.patch),
        "window": list(shape.window),
        "order": "st",
        "mlp": "shared",
        "mlp_ratio": 2.0,
        "rope_base": 50.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "drop_path": 0.0,
        "decoder": "local",
        "decoder_dim": 12,
        **(VARIANTS[variant] if isinstance(variant, str) else variant),
        **changes,
    }
    return ModelConfig(**options)

"""Exact parameter counts of every size in conf/model, on the meta device: no weights are made."""

from __future__ import annotations

from typing import Any

import torch

from swift.config.compose import composed, conf_dir
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.decoders import build_decoder
from swift.plan.geometry import count

VARIANTS = ("factorized", "joint")


def count_parameters(model: str, variant: str | None) -> dict[str, Any]:
    """Parameters of one size at 96x96x96 voxels and 20 frames, counted on the meta device."""
    overrides = [f"model={model}", "data=store", "data.path=none"]
    if variant:
        overrides.append(f"model/variant={variant}")
    cfg, _ = composed(overrides)
    with torch.device("meta"):
        local = MaskedAutoencoder(cfg.model, cfg.data.grid, cfg.data.frames)
        cfg.model.decoder = "linear"
        linear = build_decoder(cfg.model, cfg.data.grid, cfg.data.frames)

    return {
        "model": model,
        "variant": cfg.model.variant,
        "embed_dim": cfg.model.embed_dim,
        "depths": list(cfg.model.depths),
        "encoder": count([local.encoder]),
        "decoder_local": count([local.decoder]),
        "decoder_linear": count([linear]),
    }


def count_all_sizes() -> list[dict[str, Any]]:
    """A row for every size and variant, smallest encoder first in each variant."""
    rows = []
    for name in sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml")):
        # v1 is one published model; the other sizes come in both families, the joint one with one depth for all.
        rows += (
            [count_parameters(name, None)]
            if name == "v1"
            else [count_parameters(name, variant) for variant in VARIANTS]
        )
    unique: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        unique.setdefault((row["variant"], row["embed_dim"], tuple(row["depths"])), row)
    return sorted(unique.values(), key=lambda row: (row["variant"], row["encoder"]))

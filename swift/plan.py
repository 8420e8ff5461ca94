"""`python -m swift.plan`: exact parameter counts of every model size, without building any."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from swift.config.compose import conf_dir
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

VARIANTS = ("factorized", "joint")


def size_names(conf: Path) -> list[str]:
    """Names of the sizes in conf/model."""
    return sorted(path.stem for path in (conf / "model").glob("*.yaml"))


def count(model: str, variant: str | None) -> dict[str, Any]:
    """Parameters of one size at 96x96x96 voxels and 20 frames, counted on the meta device."""
    import torch
    from hydra import compose, initialize_config_dir

    from swift.config.compose import typed
    from swift.models.autoencoder import MaskedAutoencoder

    overrides = [f"model={model}", "data=store", "data.path=none"]
    if variant:
        overrides.append(f"model/variant={variant}")
    with initialize_config_dir(str(conf_dir()), version_base=None):
        cfg = typed(compose("config", overrides))
    with torch.device("meta"):
        local = MaskedAutoencoder(cfg.model, cfg.data.grid, cfg.data.frames)
        cfg.model.decoder = "linear"
        linear = MaskedAutoencoder(cfg.model, cfg.data.grid, cfg.data.frames)

    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return {
        "model": model,
        "variant": cfg.model.variant,
        "embed_dim": cfg.model.embed_dim,
        "depths": list(cfg.model.depths),
        "encoder": parameters(local.encoder),
        "decoder_local": parameters(local.decoder),
        "decoder_linear": parameters(linear.decoder),
    }


def counts() -> list[dict[str, Any]]:
    """A row for every size and variant, smallest encoder first in each variant."""
    rows = []
    for name in size_names(conf_dir()):
        # v1 is one published model; the other sizes come in both families, the joint one with one depth for all.
        rows += [count(name, None)] if name == "v1" else [count(name, variant) for variant in VARIANTS]
    unique: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        unique.setdefault((row["variant"], row["embed_dim"], tuple(row["depths"])), row)
    return sorted(unique.values(), key=lambda row: (row["variant"], row["encoder"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The counts as aligned text."""
    lines = [f"{'variant':<11} {'model':<6} {'E':>5}  {'depths':<10} {'encoder':>15} {'+ local':>10} {'+ linear':>14}"]
    for row in rows:
        depths = ",".join(map(str, row["depths"]))
        lines.append(
            f"{row['variant']:<11} {row['model']:<6} {row['embed_dim']:>5}  {depths:<10} {row['encoder']:>15,} "
            f"{row['decoder_local']:>10,} {row['decoder_linear']:>14,}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of parameter counts."""
    parser = argparse.ArgumentParser(
        prog="python -m swift.plan",
        description="Exact parameter counts of every size (96x96x96 voxels, 20 frames), without allocating any.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_up_logging()

    def work() -> None:
        if options.settings:
            raise UserError(
                f"{' '.join(options.settings)}: planning FLOPs, memory and node-hours of one run is not built yet; "
                "without arguments this command prints the parameter counts"
            )
        rows = counts()
        print(json.dumps(rows, indent=2) if options.json else table(rows))

    reported(work)


if __name__ == "__main__":
    main()

"""`python -m swift.plan`: what a run will hold, compute, send and take, before any node-hour is spent.

Without settings: a table of the exact parameter counts of every size. Neither builds a model with weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.compose import composed, conf_dir
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

if TYPE_CHECKING:
    from swift.plan.planning import Plan

VARIANTS = ("factorized", "joint")
OWN_KEYS = ("nodes", "site", "micro_batch", "clips")
CLIPS = 1_000_000.0


def size_names(conf: Path) -> list[str]:
    """Names of the sizes in conf/model."""
    return sorted(path.stem for path in (conf / "model").glob("*.yaml"))


def count(model: str, variant: str | None) -> dict[str, Any]:
    """Parameters of one size at 96x96x96 voxels and 20 frames, counted on the meta device."""
    import torch

    from swift.models.autoencoder import MaskedAutoencoder
    from swift.models.decoders import build_decoder

    overrides = [f"model={model}", "data=store", "data.path=none"]
    if variant:
        overrides.append(f"model/variant={variant}")
    cfg, _ = composed(overrides)
    with torch.device("meta"):
        local = MaskedAutoencoder(cfg.model, cfg.data.grid, cfg.data.frames)
        cfg.model.decoder = "linear"
        linear = build_decoder(cfg.model, cfg.data.grid, cfg.data.frames)

    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return {
        "model": model,
        "variant": cfg.model.variant,
        "embed_dim": cfg.model.embed_dim,
        "depths": list(cfg.model.depths),
        "encoder": parameters(local.encoder),
        "decoder_local": parameters(local.decoder),
        "decoder_linear": parameters(linear),
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


# ------------------------------------------------------------------------------------------------------ planning a run
def own_settings(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into this command's own keys and Hydra's overrides.

    Raises:
        UserError: a word without "=".
    """
    own, rest = {}, []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(
                f"{setting}: settings are KEY=VALUE; own keys are {', '.join(OWN_KEYS)}, others as in train"
            )
        if key in OWN_KEYS:
            own[key] = value
        else:
            rest.append(setting)
    return own, rest


def _number(own: dict[str, str], key: str, default: float, kind: Callable[[str], float]) -> float:
    """A setting of this command: a finite number, at least 1."""
    if key not in own:
        return default
    try:
        value = kind(own[key])
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        what = "a whole number, at least 1" if kind is int else "a number, at least 1"
        raise UserError(f"{key}={own[key]}: must be {what}")
    return value


def plan_of(settings: Sequence[str]) -> Plan:
    """The plan of a command line.

    Raises:
        UserError: anything in it that no run could have.
    """
    from swift.plan.devices import load_site, site_names
    from swift.plan.planning import make_plan, overrides_for

    own, rest = own_settings(settings)
    cfg, launcher = composed(overrides_for(rest))
    site, nodes = "local", cfg.parallel.nodes
    if launcher is not None:
        nodes = launcher.nodes
        site = launcher.name if launcher.name in site_names() else "local"
    nodes = int(_number(own, "nodes", nodes, int))
    micro_batch = int(_number(own, "micro_batch", cfg.data.batch_size, int))
    clips = _number(own, "clips", CLIPS, float)
    return make_plan(cfg, load_site(own.get("site", site)), nodes, micro_batch, clips)


def main(arguments: list[str] | None = None) -> None:
    """Plan a run, or print the table of parameter counts."""
    parser = argparse.ArgumentParser(
        prog="python -m swift.plan",
        usage="python -m swift.plan [--json] [SETTING ...]",
        description="Parameters, FLOPs, memory a device, traffic, step time and node-hours of a run, before it is "
        "started. Without settings: exact parameter counts of every size (96x96x96 voxels, 20 frames).",
        epilog="SETTING: nodes=N, site=NAME (a file of conf/sites, or local: this machine), micro_batch=N (clips a "
        "device in one pass), clips=N (that node-hours are for), and everything python -m swift.train takes: "
        "model=14b5 parallel=zero1 parallel.activation_checkpointing=block +launcher=frontier ... Without data= a clip "
        "is 96x96x96 voxels x 20 frames.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (bytes, FLOPs, seconds) instead of text")
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_up_logging()

    def work() -> None:
        if not options.settings:
            rows = counts()
            print(json.dumps(rows, indent=2) if options.json else table(rows))
            return
        plan = plan_of(options.settings)
        from swift.plan.planning import as_json
        from swift.plan.text import plan_text

        print(json.dumps(as_json(plan), indent=2) if options.json else plan_text(plan))

    reported(work)


if __name__ == "__main__":
    main()

"""`python -m swift.plan`: what a run will hold, compute, send and take, before any node-hour is spent.

Without settings: a table of the exact parameter counts of every size. Neither builds a model with weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from swift.config.compose import composed
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

if TYPE_CHECKING:
    from swift.plan.planning import Plan

OWN_KEYS = ("nodes", "site", "micro_batch", "clips")
CLIPS = 1_000_000.0


def overrides_for(settings: Sequence[str]) -> list[str]:
    """Hydra overrides of a command line, planned for 96x96x96 voxels x 20 frames where it names no data."""
    chosen = [setting for setting in settings if setting.startswith("data=")]
    added = [] if chosen else ["data=store"]
    if chosen in ([], ["data=store"]) and not any(setting.startswith("data.path=") for setting in settings):
        added.append("data.path=none")
    return [*added, *settings]


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
    from swift.plan.planning import make_plan

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
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()

    def work() -> None:
        from swift.plan.sizes import count_all_sizes
        from swift.plan.text import as_json, counts_text, plan_text

        if not options.settings:
            rows = count_all_sizes()
            print(json.dumps(rows, indent=2) if options.json else counts_text(rows))
            return
        plan = plan_of(options.settings)
        print(json.dumps(as_json(plan), indent=2) if options.json else plan_text(plan))

    reported(work)


if __name__ == "__main__":
    main()

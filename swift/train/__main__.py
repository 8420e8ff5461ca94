"""`python -m swift.train`: compose the configuration, check it, run it or hand it to a launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swift.config.compose import conf_dir, load_frozen, typed
from swift.config.derive import quote_command_line
from swift.config.help import register
from swift.config.names import refuse_unknown
from swift.config.schema import Config
from swift.parallel.ranks import SETTINGS, current_place, first_to_report
from swift.train.run import run_rank, train
from swift.utils.entry import USER_ERROR_STATUS, reported, set_up_logging


def settings(tree: DictConfig, overrides: Sequence[str]) -> Config:
    """Typed settings of a command line: composed, or those of the run to resume with its overrides on top."""
    if not tree.resume:
        return typed(tree, overrides)
    rest = [override for override in overrides if not override.startswith("resume=")]
    return replace(load_frozen(Path(tree.resume), rest), run_dir=str(tree.resume), resume=str(tree.resume))


def run(tree: DictConfig, overrides: Sequence[str], jobs: list[Any]) -> int:
    """Check a composed configuration, then train, or make ready what a launcher shall submit.

    Args:
        tree: Hydra's composed configuration.
        overrides: the settings given on the command line, as typed.
        jobs: takes a run that is to be submitted.

    Returns:
        The exit status: 1 where scans were left out that the settings do not name, though all was done.
    """
    cfg = settings(tree, overrides)
    if not cfg.launcher:
        from swift.data.clips.chosen import say_unmeant

        status = say_unmeant(train(cfg, overrides), f"{cfg.run_dir}/summary.json")
        # A launcher (srun, torchrun, a job of swift's) would take 1 for a rank that has failed, and start it again.
        return status if current_place().source == "none" else 0
    from swift.cluster.submit import prepare
    from swift.data.cohort_brain import with_cohort

    def make_data(cfg: Config) -> Path:
        from swift.data.locate import store_path

        return store_path(cfg.data, cfg.seed)

    jobs.append(prepare(cfg, overrides, make_data, with_cohort))
    return 0


def main() -> None:
    """The command line. A mistake ends with status 2 and one message, composed or not."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    set_up_logging()
    register()
    if SETTINGS not in os.environ and not {"--help", "-h"} & set(sys.argv[1:]):
        reported(lambda: refuse_unknown(sys.argv[1:], conf_dir()), first_to_report)
    quote_command_line()
    sys.argv[0] = "swift.train"  # what a usage line calls it
    if current_place().rank:
        logging.getLogger("swift").setLevel(logging.WARNING)  # rank 0 says it for all
    if SETTINGS in os.environ:
        reported(lambda: run_rank(Path(os.environ[SETTINGS])), first_to_report)
        return
    reached = False
    jobs: list[Any] = []
    statuses: list[int] = []

    def task(tree: DictConfig) -> None:
        nonlocal reached
        reached = True
        node = HydraConfig.get()
        # As typed: run_dir='runs/${model.name}' must not be resolved among the overrides themselves.
        typed_in = OmegaConf.to_container(node.overrides.task, resolve=False)
        assert isinstance(typed_in, list)
        overrides = [str(override) for override in typed_in]
        if node.mode == RunMode.MULTIRUN:
            tree.run_dir = node.runtime.output_dir
            if "launcher" in tree:
                from swift.cluster.submit import point_dir

                tree.run_dir = str(point_dir(Path(node.runtime.output_dir), overrides, sys.argv[1:]))
        reported(lambda: statuses.append(run(tree, overrides, jobs)), first_to_report)

    # Hydra 1.4 drops version_base; 1.3 warns without it.
    extra = {"version_base": None} if "version_base" in signature(hydra.main).parameters else {}
    # Hydra prints tracebacks of its own making for some mistakes (model=51, --help with an unknown choice), with status
    # 1: let all errors come here.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", **extra)(task)()
    except Exception as error:
        if reached:
            raise
        # Composing has failed: the user's mistake. Hydra's own hint, and OmegaConf's where that is the cause.
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        print("\n".join(str(part) for part in (error, cause) if part), file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    if jobs:
        # Only now: all points of a sweep have been checked.
        from swift.cluster.submit import submit

        reported(lambda: submit(jobs))
    if any(statuses):
        sys.exit(max(statuses))  # only now: with -m other points come after one


if __name__ == "__main__":
    main()

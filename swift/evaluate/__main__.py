"""`python -m swift.baselines`: fit and judge the baselines of a task. Takes the settings of swift.train."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from swift.config.compose import composed
from swift.data.clips.chosen import say_unmeant
from swift.evaluate.baselines import MAP_BASELINES, PER_FRAME, PER_SUBJECT, run_baselines, table
from swift.utils.entry import reported, set_up_logging

log = logging.getLogger("swift.baselines")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m swift.baselines",
        usage="python -m swift.baselines [--json] [--only NAME,NAME] [--config-dir FOLDER] SETTING ...",
        description="Fit and judge the baselines of a task: majority / mean, motion and site, connectomes, volumes.",
        epilog="SETTING: as python -m swift.train takes them: task=depression data=store data.path=DIR "
        "data.split=FILE run_dir=DIR ... The encoder with random weights: swift.train task.adapt=linear without init=.",
    )
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON")
    every = ", ".join(dict.fromkeys(PER_SUBJECT + PER_FRAME + MAP_BASELINES))
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"of {every} (default: all that fit the task)")
    parser.add_argument(
        "--config-dir", type=Path, metavar="FOLDER", help="more YAML files, such as FOLDER/task/NAME.yaml"
    )
    parser.add_argument("settings", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()

    def work() -> None:
        cfg, _ = composed(options.settings, options.config_dir, model=False)
        found = run_baselines(cfg, options.only.split(",") if options.only else None)
        print(json.dumps(found, indent=2) if options.json else table(found))
        log.info("written to %s", cfg.run_dir)
        where = f"summary.json of each in {cfg.run_dir}"
        statuses.append(say_unmeant(next(iter(found.values()), {}), where))

    statuses: list[int] = []
    reported(work)
    if any(statuses):
        sys.exit(1)


if __name__ == "__main__":
    main()

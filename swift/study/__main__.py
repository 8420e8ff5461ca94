"""`python -m swift.study STUDY.yaml...`: run the points of a study that are not finished, then draw its figure.

A study file names overrides of `python -m swift.train` (base: for all points; points: blocks whose lists are multiplied
out), and the command of `python -m swift.report` that makes figure and table. Every point has its own run directory, so
that a repeated command goes on where it stopped: finished points are left alone, half-finished ones resume. SETTING ...
is added to every point, e.g. +launcher=frontier (the points are submitted, and drawn by a later call).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from swift.study.file import load_study
from swift.study.runner import listed, run_study
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m swift.study", description=__doc__)
    parser.add_argument(
        "given", nargs="+", metavar="STUDY.yaml | SETTING", help="study files; NAME=VALUE for all points"
    )
    parser.add_argument("--list", action="store_true", help="only list the points and how far each is")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="folder of the run directories (runs/STUDY)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for figures and tables (runs/figures/STUDY)")
    parser.add_argument(
        "--keep", action="store_true", help="write figures and tables beside the study file: change those kept there"
    )
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()

    def work() -> None:
        settings = [word for word in options.given if "=" in word and not Path(word).is_file()]
        studies = [load_study(Path(word)) for word in options.given if word not in settings]
        if not studies:
            raise UserError("give a study file, such as experiments/ablation/laptop.yaml")
        if len(studies) > 1 and (options.runs or options.out):
            raise UserError("--runs and --out are for a single study")
        if options.keep and options.out:
            raise UserError("--keep and --out: choose one")
        if options.list:
            for study in studies:
                for line in listed(study, options.runs or Path("runs") / study.name):
                    print(line)
            return
        statuses = [
            run_study(
                study,
                options.runs or Path("runs") / study.name,
                study.path.parent if options.keep else options.out or Path("runs") / "figures" / study.name,
                settings,
            )
            for study in studies
        ]
        if any(statuses):
            raise SystemExit(max(statuses))

    reported(work)


if __name__ == "__main__":
    main()

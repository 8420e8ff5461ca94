"""`python -m swift.series RUN SCAN...`: how slowly BOLD and the features of every layer change, into RUN/temporal.json.

A scan is cut into clips one after the other, encoded with nothing hidden, and the features of its clips are joined to
series over the whole scan, one for each token that sees brain and each channel (a random part of them). BOLD: the mean
of each patch of stage 1. The control encodes the same frames in a random order: what is then left of the
autocorrelation is made by the model (windows, positions), not by the signal.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from swift.inference.options import add_scan_options, fitting_of
from swift.study.series import write_series
from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError

log = logging.getLogger("swift.series")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m swift.series", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; temporal.json is written into it")
    parser.add_argument(
        "scans", nargs="+", metavar="SCAN", help="stores, STORE:SCAN_ID, NIfTI files or folders of them"
    )
    parser.add_argument("--count", type=int, default=0, help="describe only the first COUNT scans (all)")
    parser.add_argument("--frames", type=int, default=400, help="use at most so many frames of each scan; 0: all (400)")
    parser.add_argument("--lag", type=float, default=60.0, help="largest lag, seconds (60)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the shuffled frames and of the choice of series (0)"
    )
    add_scan_options(parser)
    options = parser.parse_args(arguments)
    set_up_logging()

    def work() -> None:
        if options.count < 0 or options.frames < 0:
            raise UserError("--count and --frames must not be negative")
        if not 0 < options.lag < float("inf"):
            raise UserError(f"--lag {options.lag}: must be a number of seconds above 0")
        if not options.run.is_dir():
            raise UserError(f"{options.run}: no such run directory")

        fitting = fitting_of(options)
        counts = (options.count, options.frames)
        out = write_series(options.run, options.scans, *counts, options.lag, options.seed, fitting)
        log.info("wrote %s", out)

    reported(work)


if __name__ == "__main__":
    main()

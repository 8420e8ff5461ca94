"""`python -m swift.export RUN --out FILE.safetensors`: weights, configuration and input contract in one file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from swift.inference.export import DTYPES, export
from swift.utils.entry import reported, set_up_logging


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m swift.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32, the masters)")
    parser.add_argument("--which", default="latest", help="latest (default), best, or the name of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args(arguments)
    set_up_logging()

    def work() -> None:
        done = export(options.run, options.out, options.dtype, options.which)
        if options.json:
            print(json.dumps(done, indent=2))
        else:
            print(f"{done['file']}: {done['parameters']:,} parameters of step {done['step']}, {done['bytes']:,} bytes")
            if done["subjects_file"]:
                print(f"{done['subjects_file']}: the subjects it was trained on, for checks of leaks; not for sharing")

    reported(work)


if __name__ == "__main__":
    main()

"""`make bench-gpu`: correctness and speed on a GPU, in parts that run alone; on a CPU a small form of the same.

    python -m tests.bench.gpu --list --out FILE.json
    python -m tests.bench.gpu --part gates,steps --out FILE.json

Every measurement is added to the file at once, so that what is killed goes on where it stopped: cases that have a row
are not measured again unless --again says so.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from swift.utils.entry import reported, set_up_logging
from swift.utils.errors import UserError
from tests.bench.gpu import v1
from tests.bench.gpu.base import Bench, Part, Results, header, run_part, table, wanted
from tests.bench.gpu.measure import card

PARTS = (
    *("gates", "steps", "stages", "attention", "v1", "profile"),
    *("strategies", "loop", "optimizer", "checkpoint"),
)
"""In the order of work: right before fast."""


def part_of(name: str) -> Part:
    """A part by its name."""
    found: Part = importlib.import_module(f"tests.bench.gpu.{name}").PART
    return found


def chosen_parts(text: str) -> list[str]:
    """Names of --part.

    Raises:
        UserError: there is no such part.
    """
    names = list(PARTS) if text == "all" else [name for name in text.split(",") if name]
    for name in names:
        if name not in PARTS:
            raise UserError(f"--part {name}: no such part; legal are {', '.join(PARTS)} (several with commas), or all")
    return names


def device_of(name: str | None) -> torch.device:
    """The device to measure.

    Raises:
        UserError: it is not here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def listing(bench: Bench, results: Results) -> str:
    """Parts, what each is, and which of its cases have no row."""
    lines = []
    for name in PARTS:
        part = part_of(name)
        known = results.rows(name)
        try:
            names = [case.name for case in wanted(part, bench)]
        except UserError as error:
            lines.append(f"{name:<11} {part.about}: {error}")
            continue
        missing = [case for case in names if case not in known]
        failed = sum("error" in row for row in known.values())
        state = f"{len(names) - len(missing)} of {len(names)} measured" + (
            f", {failed} with an error" if failed else ""
        )
        lines.append(f"{name:<11} {part.about}: {state}")
        lines += [f"              missing: {case}" for case in missing[:6]]
        if len(missing) > 6:
            lines.append(f"              missing: {len(missing) - 6} more")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="all", help=f"{', '.join(PARTS)}; several with commas (default: all)")
    parser.add_argument("--out", type=Path, help="JSON to add to")
    parser.add_argument("--list", action="store_true", help="show the parts and what is missing in --out")
    parser.add_argument("--table", action="store_true", help="print the tables of --out, measure nothing")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a GPU too (a CPU has no others)")
    parser.add_argument("--seconds", type=float, default=360, help="of a part; no case begins after that (360)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name holds it")
    parser.add_argument("--again", action="store_true", help="measure cases again that have a row")
    parser.add_argument("--v1", type=Path, metavar="FOLDER", help="with the two model files of SwiFT v1")
    parser.add_argument("--ranks", type=int, default=1, help="processes, one a device, of part steps (1)")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    return parser.parse_args(arguments)


def start_again(arguments: list[str]) -> None:
    """Go on in a fresh process: an error has left the device unusable; the case that met it has its row."""
    kept = [argument for argument in arguments if argument != "--again"]
    print("the device is unusable after this error: going on in a new process", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "tests.bench.gpu", *kept])


def main(arguments: list[str]) -> None:
    """Run the command."""
    options = parse(arguments)
    names = chosen_parts(options.part)
    if options.ranks < 1 or (options.ranks > 1 and names != ["steps"]):
        raise UserError(f"--ranks {options.ranks}: must be at least 1, and more than 1 is for --part steps alone")
    if "v1" in names and (options.part != "all" or options.v1 is not None) and not options.list:
        v1.check(options.v1)
    device = device_of(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            device=device,
            small=options.small or device.type == "cpu",
            folder=Path(folder),
            seconds=options.seconds,
            only=tuple(options.only),
            v1=options.v1,
            ranks=options.ranks,
        )
        if options.list:
            print(listing(bench, results))
            return
        if options.table:
            print("\n\n".join(table(name, part_of(name), results) for name in names if results.rows(name)))
            return
        torch.set_float32_matmul_precision("high")
        facts = card(device, bench.small) | {"time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}
        results.content["card"] = facts
        results.content.setdefault("commands", []).append(" ".join(arguments))
        results.save()
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
            )
        )
        bench = replace(bench, card=facts)
        for name in names:
            part = part_of(name)
            if name == "v1" and options.part == "all" and bench.v1 is None:
                print("\nv1: left out, it needs --v1 FOLDER")
                continue
            if options.again:
                for case in wanted(part, bench):
                    results.forget(name, case.name)
            print(f"\n{name}: {part.about}\n{header(part.columns)}", flush=True)
            if not run_part(name, part, bench, results):
                start_again(arguments)
    if any("error" in row for name in names for row in results.rows(name).values()):
        sys.exit(1)


if __name__ == "__main__":
    set_up_logging()
    reported(lambda: main(sys.argv[1:]))

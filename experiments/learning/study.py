"""Runs the points of the study in many processes at once; what is done is kept, also when this is stopped.

    python -m experiments.learning.study --sets factors --jobs 12 --seconds 500 --out DIR

Each process takes the next point that nobody has, and leaves one line of JSON when it is done. DIR/points.jsonl holds
them all; points that are in it, or in experiments/learning/points.jsonl, are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.learning.points import Point, chosen
from swift.utils import jsonl
from swift.utils.files import replace_text

HERE = Path(__file__).resolve().parent
KEPT = HERE / "points.jsonl"
POLL = 2.0
Row = dict[str, Any]


def done_in(*files: Path) -> set[str]:
    """Names of the points in some files."""
    return {line["point"] for file in files if file.exists() for line in jsonl.read(file)}


def work_on(options: argparse.Namespace) -> None:
    """Take points until there is none, or no time for another."""
    import torch

    from experiments.learning.train_point import prepare_cohort

    torch.set_num_threads(1)
    places = {"sample": list(options.place), "cohort": prepare_cohort(options.work)}
    before = done_in(KEPT, *options.done, *options.work.glob("worker-*.jsonl"))
    longest = 0.0
    with (options.work / f"worker-{options.worker}.jsonl").open("a", encoding="utf-8") as stream:
        points = chosen(options.sets)
        suites = dict.fromkeys(point.suite for point in points)
        todo = [Point(f"{suite}: closed forms", suite, ()) for suite in suites] + points
        for point in todo:
            began = time.time()
            if began + longest > options.until or point.name in before or not _take(options.work, point.name):
                continue
            try:
                made = _result(point, places[point.suite], options)
            except (RuntimeError, ValueError) as error:
                # One point that cannot be run must not cost the others; it has no line, so that it is tried again.
                print(f"{point.name}: not run: {error}", file=sys.stderr)
                continue
            for line in made:
                stream.write(json.dumps(line | {"wall_seconds": round(time.time() - began, 1)}) + "\n")
            stream.flush()
            longest = max(longest, time.time() - began)


def _result(point: Point, places: list[str], options: argparse.Namespace) -> list[Row]:
    """Lines of a point, or of the predictions that need no training."""
    from experiments.learning.train_point import closed_forms, train

    if point.name != point.suite + ": closed forms":
        return [train(point, places, options.budget, options.masks)]
    return [
        {"point": point.name, "suite": point.suite, "rows": []},
        *closed_forms(point.suite, places, options.masks),
    ]


def _take(work: Path, name: str) -> bool:
    """Whether this process is the first to want a point."""
    try:
        os.close(os.open(work / (name.replace("/", "~") + ".taken"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def gather(work: Path, out: Path) -> int:
    """All whole lines of all processes, in one file; how many."""
    lines = [
        line for file in sorted(work.glob("worker-*.jsonl")) for line in file.read_text().splitlines(keepends=True)
    ]
    lines = [line for line in lines if line.endswith("\n")]
    replace_text(out / "points.jsonl", "".join(lines))
    return len(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["factors"], help="factors | cohort | finalists, in this order")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--seconds", type=float, default=3600, help="of wall time; then all is stopped")
    parser.add_argument("--out", type=Path, required=True, help="folder of points.jsonl")
    parser.add_argument("--work", type=Path, default=None, help="folder for the work; else OUT")
    parser.add_argument("--place", nargs="*", default=[], help="options that say where the sample's store is")
    parser.add_argument("--done", nargs="*", type=Path, default=[], help="points.jsonl of earlier calls")
    parser.add_argument("--budget", type=float, default=None, help="CPU seconds of a point; else as in points.py")
    parser.add_argument("--masks", type=int, default=10, help="of each held-out clip")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work or options.out
    if options.worker is not None:
        work_on(options)
        return
    from experiments.learning.train_point import prepare_cohort

    began = time.time()
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    chosen(options.sets)
    for taken in options.work.glob("*.taken"):
        taken.unlink()
    prepare_cohort(options.work)
    until = began + options.seconds
    base = [sys.executable, "-m", "experiments.learning.study", *sys.argv[1:], "--work", str(options.work)]
    more = ["--until", str(until)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*base, *more, "--worker", str(number)], env=environment) for number in range(options.jobs)
    ]
    while any(worker.poll() is None for worker in workers) and time.time() < until:
        time.sleep(POLL)
        gather(options.work, options.out)
    for worker in workers:
        worker.kill()
        worker.wait()
    print(f"{gather(options.work, options.out)} lines in {options.out / 'points.jsonl'}, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()

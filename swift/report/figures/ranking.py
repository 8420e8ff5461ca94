"""The ablation: settings of pre-training (mask ratio, patch size, ...) ranked by the sum of z-scores over tasks.

Points are pre-trainings that differ in some settings; each is judged by runs fine-tuned from it (init=). Of every task
the points' main scores (mean over seeds and splits) become z-scores over the points, higher being better; the table is
ranked by their sum. Losses of the pre-trainings themselves are not compared: a larger mask ratio is a harder problem.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from swift.evaluate.downstream import find, load
from swift.report.output import write_csv
from swift.report.ranking import csv_row, markdown, rank
from swift.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m swift.report ranking`."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", type=Path, help="fine-tuned runs, or folders of them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write ranking.{md,csv,json} there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Rank.

    Returns:
        0.

    Raises:
        UserError: see `rank`.
    """
    found = [result for result in (load(path) for path in find(args.runs)) if not result.summary.get("baseline")]
    if not found:
        raise UserError("only baselines here: give runs that were fine-tuned from several pre-trainings")
    rows = rank(found)
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "ranking.md").write_text(markdown(rows), encoding="utf-8")
            (args.out / "ranking.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            write_csv(args.out / "ranking.csv", [csv_row(row) for row in rows])
        except OSError as error:
            raise UserError(f"{args.out}: cannot be written ({error.strerror})") from error
    print(json.dumps(rows, indent=2) if args.json else markdown(rows), end="" if not args.json else "\n")
    return 0

"""`swift.data report`: the page of brains of a store."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from swift.utils.errors import UserError
from swift.utils.page import check_name, write

MEGABYTES = 30.0
LOOKED_AT = 8
"""Scans after which the size of the whole page is foreseen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `swift.data report`."""
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="the page")
    parser.add_argument("--scan", action="append", default=[], metavar="ID", help="only this scan (may be repeated)")
    parser.add_argument(
        "--pictures", type=int, metavar="N", help="pictures of N scans only: those with most marks, then lowest tSNR"
    )
    parser.add_argument("--limit-mb", type=float, default=MEGABYTES, metavar="MB", help="refuse a larger page (30)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")


def run(options: argparse.Namespace) -> int:
    """Write the page; 1 where a scan could not be read."""
    from tqdm import tqdm

    from swift.data.quality.look import looked
    from swift.data.quality.measures import Measures, mark
    from swift.data.quality.page import page
    from swift.data.store.reader import Store

    check_name(options.out)
    if options.pictures is not None and options.pictures < 0:
        raise UserError(f"--pictures {options.pictures}: legal is 0 or more")
    store = Store(options.store)
    places = [store.find(name) for name in options.scan] or list(range(len(store.scans)))
    kept = len(places) if options.pictures is None else min(options.pictures, len(places))
    rows: list[Measures] = []
    pictures: list[str] = []
    found = looked(store, places, options.workers)
    for row, picture in tqdm(found, total=len(places), unit="scan", disable=options.quiet or options.json):
        rows.append(row)
        pictures.append(picture)
        if len(rows) == min(LOOKED_AT, len(places)):
            _check_size(sum(map(len, pictures)) / len(pictures) * kept, kept, options.limit_mb)
    mark(rows)
    if kept < len(places):
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].marks), rows[i].tsnr or 0.0))
        chosen = set(order[:kept])
        pictures = [picture if place in chosen else "" for place, picture in enumerate(pictures)]
    notes = [f"Pictures of {kept} scans only: those with most marks, then lowest tSNR."] if kept < len(places) else []
    text = page(f"Scans of {options.store.resolve().name}", rows, pictures, notes)
    _check_size(len(text.encode()), kept, options.limit_mb)
    said = write(options.out, text)
    bad = [row for row in rows if row.problem]
    for row in bad:
        print(row.problem, file=sys.stderr)
    marked = sum(bool(row.marks) for row in rows)
    if options.json:
        print(json.dumps({"page": str(options.out), "scans": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"{said}: {len(rows)} scans, {marked} marked" + (f", {len(bad)} not readable" if bad else ""))
    return 1 if bad else 0


def _check_size(size: float, pictures: int, limit: float) -> None:
    if size > limit * 1e6:
        raise UserError(
            f"the page would have about {size / 1e6:.3g} MB with the pictures of {pictures} scans, the limit is "
            f"{limit:g} MB: --pictures {max(0, int(0.9 * pictures * limit * 1e6 / size))} shows those that stand out, "
            "--scan ID some, --limit-mb allows more"
        )

"""The commands `python -m swift.data join` and `place`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_join(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `join` to a parser that has --json and --quiet."""
    parser.add_argument("parts", type=Path, nargs="+", metavar="store", help="what ingest --part made")
    _add_out(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `place`."""
    parser.add_argument("store", type=Path, help="of format version 1")
    _add_out(parser)
    parser.add_argument("--space", help="that all its scans are in, where their names do not say")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the new store")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="target size of a shard; 0: one scan each (4)")


def run_join(options: argparse.Namespace) -> int:
    """Run `join`; returns its status."""
    from swift.data.store.join import join

    figures = join(options.parts, options.out, int(options.shard_gb * 1e9) or 1)
    counts = f"{figures['scans']} scans of {figures['parts']} stores, {figures['shards']} shards"
    line = f"{options.out}: {counts}, all verified"
    print(json.dumps(figures, indent=2) if options.json else line)
    return 0


def run_place(options: argparse.Namespace) -> int:
    """Run `place`; returns its status."""
    from swift.data.store.move import place

    figures = place(options.store, options.out, options.space, int(options.shard_gb * 1e9) or 1)
    line = f"{options.out}: {figures['scans']} scans, grid in {figures['placement']}"
    line += f"; {figures['voxels_lost']} brain voxels outside it left out" if figures["voxels_lost"] else ""
    print(json.dumps(figures, indent=2) if options.json else line)
    return 0

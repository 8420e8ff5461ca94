"""Change single bytes of a store at random; every change must be found, named and mended.

    python experiments/data_integrity/flips.py [--flips 1000] [--seed 0] [--out results/flips.json]

Makes its own small store and a replica in a temporary folder. Where a byte lies is known from plain h5py, not from the
code under test. Each round changes one byte of one region, runs `verify`, compares what it names with where the byte
lies, runs `repair` with the replica, and compares every file with what it was before. Exit status 1: some round failed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from swift.data.ingest.repair import repair
from swift.data.store.check import verify
from swift.data.store.format import decode_manifest
from swift.data.store.reader import ScanHeader, StoreWriter
from swift.utils.errors import UserError

GRID = (10, 12, 9)


@dataclass(frozen=True)
class Region:
    """Bytes [first, last) of a file, and what `verify` has to call them; an empty scan: any name in that shard."""

    file: Path
    first: int
    last: int
    kind: str
    scan: str = ""
    part: str = ""
    row: int = 0
    """Bytes of a frame, for bold."""


def make(path: Path, scans: int, seed: int) -> None:
    """A store of several shards with several scans each."""
    with StoreWriter(path, GRID, 2.0, shard_bytes=60_000) as writer:
        for number in range(scans):
            rng = np.random.default_rng([seed, number])
            mask = rng.random(GRID) > 0.4
            frames = 20 + 3 * number
            bold = (1000 + 20 * rng.normal(size=(frames, int(mask.sum())))).astype(np.float32)
            header = ScanHeader(
                f"sub-{number:02d}",
                f"{number:02d}",
                0.72,
                np.diag([2.0, 2.0, 2.0, 1.0]),
                task="rest",
                source=f"sub-{number:02d}.nii.gz",
                notes=["made for this experiment"],
                phenotypes={"age": str(20 + number)},
                confounds=rng.normal(size=(frames, 2)).astype(np.float32),
                confound_names=["trans_x", "rot_z"],
            )
            writer.add(header, mask, bold)


def regions(store: Path) -> list[Region]:
    """Every dataset of every scan, whole shards, and the two lists."""
    found = []
    for shard in sorted((store / "shards").iterdir()):
        found.append(Region(shard, 0, shard.stat().st_size, "anywhere in a shard"))
        with h5py.File(shard, "r") as file:
            for scan, group in file["scans"].items():
                names = [name for name in group if name != "stats"] + [f"stats/{name}" for name in group["stats"]]
                for name in names:
                    data = group[name]
                    first, row = data.id.get_offset(), data.nbytes // len(data) if name == "bold" else 0
                    kind = "stats" if name.startswith("stats/") else name
                    found.append(Region(shard, first, first + data.nbytes, kind, scan, name, row))
    for name in ("store.json", "manifest.csv"):
        found.append(Region(store / name, 0, (store / name).stat().st_size, name))
    return found


def inside(all_regions: list[Region], file: Path, place: int) -> Region | None:
    """The dataset that a byte of a shard belongs to."""
    own = [r for r in all_regions if r.scan and r.file == file and r.first <= place < r.last]
    return own[0] if own else None


def named(store: Path, file: Path, where: Region | None, place: int) -> str:
    """'' if verify names the place rightly; else what it said."""
    try:
        damage = verify(store)
    except UserError as error:
        return "" if file.name in str(error) else f"error: {error}"
    said = {(one.shard, one.scan, one.part, one.frame) for one in damage}
    if where is not None:
        frame = (place - where.first) // where.row if where.part == "bold" else None
        # A changed checksum list makes frames differ from it, too.
        wanted = (file.name, where.scan, where.part, frame)
        return "" if wanted in said and {one[:2] for one in said} == {wanted[:2]} else f"{sorted(map(str, said))}"
    if file.suffix == ".h5":
        return "" if said and {one[0] for one in said} == {file.name} else f"{sorted(map(str, said))}"
    return "" if any(part in ("manifest", "header") for _, _, part, _ in said) else f"{sorted(map(str, said))}"


def same_lines(one: Path, other: Path) -> bool:
    """Whether two manifests say the same."""
    try:
        return decode_manifest(one) == decode_manifest(other)
    except UserError:
        return False


def run(flips: int, seed: int, scans: int = 5) -> dict[str, Any]:
    """All rounds; figures by kind of region."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="swift-flips-"))
    began = time.monotonic()
    try:
        store, replica = folder / "store", folder / "replica"
        make(store, scans, seed)
        shutil.copytree(store, replica)
        places = regions(store)
        kinds = sorted({region.kind for region in places})
        before = {file: file.read_bytes() for file in sorted(store.rglob("*")) if file.is_file()}
        rounds: Counter[str] = Counter()
        wrong: list[dict[str, Any]] = []
        harmless = 0
        for number in range(flips):
            region = rng.choice([r for r in places if r.kind == kinds[number % len(kinds)]])
            place = rng.randrange(region.first, region.last)
            raw = bytearray(before[region.file])
            raw[place] ^= rng.randrange(1, 256)
            region.file.write_bytes(raw)
            rounds[region.kind] += 1
            if region.kind == "manifest.csv" and same_lines(replica / "manifest.csv", region.file):
                harmless += 1  # such as another way to end a line
                region.file.write_bytes(before[region.file])
                continue
            where = inside(places, region.file, place)
            said = named(store, region.file, where, place)
            left = [str(one) for one, _ in repair(store, replica=replica).left]
            mended = all(file.read_bytes() == content for file, content in before.items())
            if said or left or not mended:
                at = {
                    "file": region.file.name,
                    "byte": place,
                    "region": region.kind,
                    "from": before[region.file][place],
                }
                wrong.append({**at, "to": raw[place], "said": said, "left": left, "mended": mended})
                region.file.write_bytes(before[region.file])
    finally:
        shutil.rmtree(folder)
    return {
        "flips": flips,
        "seed": seed,
        "found_named_and_mended": flips - len(wrong) - harmless,
        "without_effect": harmless,
        "by_region": dict(sorted(rounds.items())),
        "store_bytes": sum(map(len, before.values())),
        "wrong": wrong,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Print the figures; 1 if some round failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the figures there")
    options = parser.parse_args()
    figures = run(options.flips, options.seed)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

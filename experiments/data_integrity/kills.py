"""Kill an ingest with SIGKILL at random moments; going on must give the very store of an undisturbed ingest.

    python experiments/data_integrity/kills.py [--kills 50] [--cli 5] [--seed 0] [--out results/kills.json]

Makes its own NIfTI scans in a temporary folder and ingests them once undisturbed. Then, again and again into a fresh
folder: start the ingest in a process of its own, kill it after a random time (four of ten: up to 0.1 s after all scans
are staged, so that packing is met, too), in half of the rounds kill the next try, too, let the last one finish, and
compare every file of the store, byte for byte (the report tells times and is left out). The last --cli kills are of
`python -m swift.data ingest --workers 2`, with its whole process group; the other ingests are forked, so that no time
goes into imports. Exit status 1: some store differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.store.check import verify
from swift.data.store.tables import REPORT

RECIPE = Recipe(grid=(32, 32, 32), spacing=3.0)
SHARD_BYTES = 1 << 20


def make(folder: Path, scans: int) -> None:
    """NIfTI files of a box full of noise around an ellipsoid, 3 mm, TR 2 s."""
    folder.mkdir()
    shape = (30, 34, 28, 16)
    places = np.indices(shape[:3]).reshape(3, -1).T
    half = (np.array(shape[:3]) - 1) / 2
    brain = ((((places - half) / (0.8 * half)) ** 2).sum(1) <= 1).reshape(shape[:3])
    for number in range(scans):
        rng = np.random.default_rng(number)
        data = np.where(brain[..., None], 1000 + 10 * rng.normal(size=shape), 5 * np.abs(rng.normal(size=shape)))
        image = nib.Nifti1Image(data.astype(np.float32), np.diag([3.0, 3.0, 3.0, 1.0]))
        image.header.set_xyzt_units("mm", "sec")
        image.header.set_zooms((3.0, 3.0, 3.0, 2.0))
        nib.save(image, folder / f"sub-{number:02d}.nii.gz")


def start(source: Path, store: Path, by_cli: bool) -> int:
    """Begin an ingest in a process group of its own; returns its process id."""
    if by_cli:
        command = [sys.executable, "-m", "swift.data", "ingest", str(source), "--out", str(store), "--quiet"]
        command += ["--grid", "32", "--spacing", "3", "--workers", "2", "--shard-gb", str(SHARD_BYTES / 1e9)]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL).pid
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            status = ingest(find_sources([source]), store, RECIPE, shard_bytes=SHARD_BYTES).exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait(process: int) -> int:
    """Exit status of a process that is left alone."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int, seconds: float, store: Path, staged: int) -> bool:
    """Kill a process and its group `seconds` after `staged` scans were staged; False: it had ended before."""
    until = None if staged else time.monotonic() + seconds
    while not os.waitpid(process, os.WNOHANG)[0]:
        if until is None and len(list(store.glob("staging/[!.]*.h5"))) >= staged:
            until = time.monotonic() + seconds
        if until is not None and time.monotonic() >= until:
            try:
                os.killpg(process, signal.SIGKILL)
            except ProcessLookupError:  # killed so early that it has no group of its own yet
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return True
        time.sleep(0.0002)
    return False


def content(store: Path) -> dict[str, str]:
    """Every file of a store with its hash, but for the report."""
    files = [file for file in sorted(store.rglob("*")) if file.is_file() and not file.name.startswith(REPORT)]
    return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def state(store: Path) -> str:
    """What a killed ingest left."""
    staged = len(list(store.glob("staging/[!.]*.h5")))
    half = len([*store.glob("staging/.tmp-*"), *store.glob("shards/.tmp-*"), *store.glob(".tmp-*")])
    packed = len(list(store.glob("shards/[!.]*.h5")))
    done = (store / "manifest.csv").is_file()
    stage = (
        "nothing yet"
        if not store.exists()
        else "packing"
        if packed or done
        else "staging scans"
        if staged or half
        else "empty store"
    )
    return stage + (", a file half written" if half else "")


def run(kills: int, cli: int, seed: int, scans: int = 6) -> dict[str, Any]:
    """All rounds; figures, and what went wrong."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="swift-kills-"))
    began = time.monotonic()
    states: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    killed = 0
    try:
        make(folder / "nifti", scans)
        ingest(find_sources([folder / "nifti"])[:1], folder / "warm", RECIPE)  # imports, so that no child needs them
        lasts: dict[bool, float] = {}
        for by_cli in [False, True] if cli else [False]:
            before = time.monotonic()
            whole = folder / f"whole-{by_cli}"
            assert wait(start(folder / "nifti", whole, by_cli)) == 0
            lasts[by_cli] = time.monotonic() - before
        reference = content(folder / "whole-False")
        assert not cli or content(folder / "whole-True") == reference
        while killed < kills:
            by_cli = kills - killed <= cli
            store, moments, first = folder / "store", [], True
            while killed < kills and (first or rng.random() < 0.5):
                first = False
                # At any time; or, as packing is short, soon after all scans are staged.
                late = rng.random() < 0.4
                seconds = rng.uniform(0.0, 0.1 if late else lasts[by_cli])
                moments.append((scans if late else 0, seconds))
                if kill(start(folder / "nifti", store, by_cli), seconds, store, scans if late else 0):
                    killed += 1
                    states[state(store)] += 1
            status = wait(start(folder / "nifti", store, by_cli))
            damage = [str(one) for one in verify(store)]
            if status != 0 or damage or content(store) != reference:
                wrong.append({"seconds": moments, "by_cli": by_cli, "status": status, "damage": damage})
            shutil.rmtree(store)
    finally:
        shutil.rmtree(folder)
    return {
        "kills": killed,
        "of_them_by_command_line": cli,
        "seed": seed,
        "scans": scans,
        "files_compared": len(reference),
        "killed_while": dict(sorted(states.items())),
        "wrong": wrong,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Print the figures; 1 if some store differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cli", type=int, default=5, help="of them, through the command line (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the figures there")
    options = parser.parse_args()
    figures = run(options.kills, options.cli, options.seed)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

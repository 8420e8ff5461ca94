"""Time reading clips: `make bench-data`, or `python -m tests.bench.data [--json]`.

Makes its own scans in a temporary folder (about 1 GB), three times: as a store, as one .pt file a frame (SwiFT v1), and
as one gzip HDF5 file a scan. Then it reads the same clips in the same order in several ways, in turn, several times, on
a warm page cache, and prints the best of each: wall time, and CPU time of this process and its workers, which other
users of the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

import swift.data.clips.ring
from swift.data.clips.dataset import ClipDataset, ClipLoader, identity
from swift.data.clips.index import ClipIndex, ClipSpec
from swift.data.clips.order import Item, Order, TrainBatches
from swift.data.clips.ring import PREFETCH
from swift.data.clips.scatter import to_dense
from swift.data.store.reader import ScanHeader, Store, StoreWriter

KIND = "zscore_voxel"
WORKERS = 2
SEED = 0


@dataclass
class Row:
    """The best round of one way of reading. Rates count 16-bit values: packed in-brain ones, or the whole grid's."""

    name: str
    ms_per_clip: float
    cpu_ms_per_clip: float
    packed_gb_s: float
    dense_gb_s: float


# ------------------------------------------------------------------------------------------------- making the scans
def brain(grid: tuple[int, int, int], number: int) -> np.ndarray:
    """(X, Y, Z) bool: an ellipsoid of a quarter of the grid, a little different for every scan."""
    axes = [(np.arange(n) - (n - 1) / 2) / (n / 2) for n in grid]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return (x / 0.74) ** 2 + (y / 0.9) ** 2 + (z / (0.72 - 0.005 * (number % 4))) ** 2 <= 1


def make(folder: Path, grid: tuple[int, int, int], scans: int, frames: int) -> None:
    """The same scans in three formats; the dense ones hold z-scored float16 with zeros outside the brain."""
    with StoreWriter(folder / "store", grid, 2.0) as writer:
        for number in range(scans):
            rng = np.random.default_rng(number)
            mask = brain(grid, number)
            bold = 1000 + 20 * rng.standard_normal((frames, int(mask.sum())), dtype=np.float32)
            writer.add(ScanHeader(f"sub-{number:03d}", f"{number:03d}", 0.72, np.eye(4)), mask, bold)
            dense = np.zeros((frames, *grid), np.float16)
            dense[:, mask] = (bold - bold.mean(0)) / bold.std(0)
            home = folder / "frames" / str(number)
            home.mkdir(parents=True)
            for frame in range(frames):
                torch.save(torch.from_numpy(dense[frame].copy()), home / f"frame_{frame}.pt")
            with h5py.File(folder / f"{number}.h5", "w") as file:
                file.create_dataset("bold", data=dense, chunks=True, compression="gzip", compression_opts=4)


class DenseClips(Dataset[torch.Tensor]):
    """Clips (T, X, Y, Z) float16 from per-frame files or gzip HDF5, to be stacked by the default collate function."""

    def __init__(self, folder: Path, index: ClipIndex, frames: int, kind: str) -> None:
        self.folder, self.index, self.frames, self.kind = folder, index, frames, kind
        self.open: dict[int, h5py.Dataset] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: Item) -> torch.Tensor:
        scans, starts = self.index.locate(np.array([item[1]]))
        scan, start = int(scans[0]), int(starts[0])
        if self.kind == "gzip":
            if scan not in self.open:
                self.open[scan] = h5py.File(self.folder / f"{scan}.h5", "r")["bold"]
            return torch.from_numpy(self.open[scan][start : start + self.frames])
        files = (self.folder / "frames" / str(scan) / f"frame_{t}.pt" for t in range(start, start + self.frames))
        return torch.stack([torch.load(file, weights_only=True) for file in files])


# ---------------------------------------------------------------------------------------------------- ways to read
class Bench:
    """All ways over one folder.

    Args:
        folder: What `make` made.
        clip: Frames of a clip.
        batch: Clips of a batch.
    """

    WAYS = (
        "raw pread",
        "clip read",
        "clip read, checksums",
        "loader, no checksums",
        "loader",
        "loader, no scan held",
        "loader + scatter on CPU",
        "frames .pt",
        "gzip HDF5",
    )

    def __init__(self, folder: Path, clip: int, batch: int) -> None:
        self.folder, self.batch = folder, batch
        self.store = Store(folder / "store")
        self.spec = ClipSpec(clip, 1, max(1, clip // 2))
        lengths = [scan.frames for scan in self.store.scans]
        scans = range(len(lengths))
        self.index = ClipIndex(scans, [0] * len(lengths), lengths, clip, self.spec.clip_stride)
        self.order = Order(len(self.index), SEED)
        self.packed = 2 * clip * float(np.mean([scan.voxels for scan in self.store.scans]))
        self.dense = 2 * clip * float(np.prod(self.store.grid))
        self.buffer = np.zeros(clip * max(scan.voxels for scan in self.store.scans), np.int16)

    def clips(self) -> Iterator[tuple[int, int]]:
        """(scan, start) of one batch after the other's clips, without end."""
        for items in TrainBatches(self.order, self.batch, 0, 1):
            scans, starts = self.index.locate(np.array([clip for _, clip in items]))
            yield from zip(scans.tolist(), starts.tolist(), strict=True)

    def raw(self) -> Iterator[None]:
        """os.preadv of the very bytes into one warm buffer."""
        store = self.store
        for scan, start in self.clips():
            info = store.scans[scan]
            handle, offset = store._shard(info.shard).handle, store._layout(scan).bold + start * 2 * info.voxels
            view = self.buffer.data.cast("B")[: 2 * self.spec.frames * info.voxels]
            assert os.preadv(handle, [view], offset) == len(view)
            yield

    def read(self, verify: bool) -> Iterator[None]:
        """Store.read into one warm buffer."""
        frames = self.spec.frames
        for scan, start in self.clips():
            voxels = self.store.scans[scan].voxels
            out = self.buffer[: frames * voxels].reshape(frames, voxels)
            self.store.read(scan, start, start + frames, out=out, verify=verify)
            yield

    def loader(self, verify: bool = True, dense: bool = False) -> Iterator[Any]:
        """Our DataLoader: packed batches ready for the device, or scattered here to dense float32 ones."""
        dataset = ClipDataset(self.store, self.index, self.spec, KIND, verify, True)
        loader = ClipLoader(
            dataset,
            batch_sampler=TrainBatches(self.order, self.batch, 0, 1),
            collate_fn=identity,
            num_workers=WORKERS,
            prefetch_factor=PREFETCH,
        )
        for packed in loader:
            yield to_dense(packed, self.store.grid, self.spec.frames, 0.0) if dense else packed

    def other(self, kind: str) -> Iterator[Any]:
        """The same through dense files and the default collate function."""
        return iter(
            DataLoader(
                DenseClips(self.folder, self.index, self.spec.frames, kind),
                batch_sampler=TrainBatches(self.order, self.batch, 0, 1),
                num_workers=WORKERS,
                prefetch_factor=PREFETCH,
            )
        )

    def ways(self) -> dict[str, tuple[Callable[[], Iterator[Any]], int]]:
        """Name -> (maker of the endless stream, clips that each of its items holds)."""
        b = self.batch
        makers: list[tuple[Callable[[], Iterator[Any]], int]] = [
            (self.raw, 1),
            (lambda: self.read(False), 1),
            (lambda: self.read(True), 1),
            (lambda: self.loader(verify=False), b),
            (self.loader, b),
            (self.loader, b),
            (lambda: self.loader(dense=True), b),
            (lambda: self.other("pt"), b),
            (lambda: self.other("gzip"), b),
        ]
        return dict(zip(self.WAYS, makers, strict=True))

    def check(self) -> float:
        """Largest difference between the first batch of our loader and of both others: they are the same clips."""
        ours = next(self.loader(dense=True))["bold"][:, 0].permute(0, 4, 1, 2, 3)
        return max(float((ours - next(self.other(kind)).float()).abs().max()) for kind in ("pt", "gzip"))


def workers_cpu() -> float:
    """CPU seconds of all child processes so far."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        tasks = list(Path(f"/proc/{child.pid}/task").glob("*/schedstat"))
        if tasks:  # nanoseconds; the times that psutil gives are multiples of 10 ms
            total += sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
        else:
            times = child.cpu_times()
            total += times.user + times.system
    return total


def settle() -> None:
    """Wait until no worker reads ahead any more."""
    before = -1.0
    while (now := workers_cpu()) > before + 1e-3:
        before = now
        time.sleep(0.03)


def timed(stream: Iterator[Any], count: int) -> tuple[float, float]:
    """Wall and CPU seconds of `count` items of a running stream."""
    for _ in range(PREFETCH * WORKERS):  # what was read ahead
        next(stream)
    own, theirs, began = time.process_time(), workers_cpu(), time.perf_counter()
    for _ in range(count):
        next(stream)
    wall = time.perf_counter() - began
    return wall, time.process_time() - own + workers_cpu() - theirs


def measure(bench: Bench, rounds: int, seconds: float) -> list[Row]:
    """Every way in turn, `rounds` times; each time about `seconds` long. The best of each counts."""
    best: dict[str, tuple[float, float]] = {}
    streams: dict[str, tuple[Iterator[Any], int, int]] = {}
    for name, (start, clips) in bench.ways().items():
        with ExitStack() as stack:
            if name == "loader, no scan held":
                # As with thousands of scans. A ring keeps what was set when it was made.
                held = swift.data.clips.ring.TABLE_BYTES
                swift.data.clips.ring.TABLE_BYTES = 0
                stack.callback(setattr, swift.data.clips.ring, "TABLE_BYTES", held)
                bench.store.close()
            stream = start()
            slow = name in ("loader + scatter on CPU", "frames .pt", "gzip HDF5")
            for _ in range(1 if slow else 3 * len(bench.index) // clips):  # every worker has met every scan
                next(stream)
            trial = max(1, 8 // clips)
            wall, _ = timed(stream, trial)
            # What workers have ready when the clock starts, at most PREFETCH batches each, must not count for much.
            least = trial if slow else 25 * PREFETCH * WORKERS * bench.batch // clips
            streams[name] = stream, clips, max(least, int(seconds * trial / wall))
            settle()
    for _ in range(rounds):
        for name, (stream, clips, count) in streams.items():
            wall, cpu = (1000 * x / (count * clips) for x in timed(stream, count))
            last = best.get(name, (wall, cpu))
            best[name] = min(last[0], wall), min(last[1], cpu)
            settle()
    return [
        Row(name, *best[name], bench.packed / best[name][0] / 1e6, bench.dense / best[name][0] / 1e6) for name in best
    ]


def judge(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Each aim: what was reached, and what is wanted. Ratios of wall times."""
    ms = {row.name: row.ms_per_clip for row in rows}
    return {
        "clip read / raw pread": (ms["raw pread"] / ms["clip read"], 0.9),
        "loader / raw pread": (ms["raw pread"] / ms["loader"], 0.6),
        "loader / frames .pt": (ms["frames .pt"] / ms["loader"], 10.0),
        "loader / gzip HDF5": (ms["gzip HDF5"] / ms["loader"], 20.0),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--grid", type=int, default=96, help="voxels a side (96)")
    parser.add_argument("--scans", type=int, default=6, help="scans (6)")
    parser.add_argument("--frames", type=int, default=40, help="frames a scan (40)")
    parser.add_argument("--clip", type=int, default=20, help="frames a clip (20)")
    parser.add_argument("--batch", type=int, default=2, help="clips a batch (2)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions, of which the best counts (5)")
    parser.add_argument("--seconds", type=float, default=0.7, help="length of a repetition (0.7)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the workers have the other CPUs
    folder = Path(tempfile.mkdtemp(prefix="swift-bench-"))
    try:
        make(folder, (options.grid,) * 3, options.scans, options.frames)
        bench = Bench(folder, options.clip, options.batch)
        difference = bench.check()
        rows = measure(bench, options.rounds, options.seconds)
    finally:
        shutil.rmtree(folder)
    aims = judge(rows)
    figures = {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "clip_mb": {"packed": bench.packed / 1e6, "dense": bench.dense / 1e6},
        "batch": options.batch,
        "workers": WORKERS,
        "largest_difference": difference,
        "rows": [asdict(row) for row in rows],
        "aims": {name: {"reached": got, "wanted": want} for name, (got, want) in aims.items()},
    }
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    print(
        f"a clip: {options.clip} frames of {options.grid}^3, {bench.packed / 1e6:.1f} MB packed, "
        f"{bench.dense / 1e6:.1f} MB dense fp16; batches of {options.batch}; {WORKERS} workers; {os.cpu_count()} CPUs, "
        f"load {figures['load']:.1f}; warm page cache; best of {options.rounds} rounds\n"
    )
    print(f"{'':<25} {'ms/clip':>8} {'CPU ms':>8} {'packed GB/s':>12} {'dense-equivalent GB/s':>22}")
    for row in rows:
        print(
            f"{row.name:<25} {row.ms_per_clip:8.2f} {row.cpu_ms_per_clip:8.2f} {row.packed_gb_s:12.2f} "
            f"{row.dense_gb_s:22.2f}"
        )
    print()
    for name, (got, want) in aims.items():
        print(f"{name:<25} {got:8.2f}   wanted {want:g}: {'reached' if got >= want else 'NOT reached'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m swift.health`: look at every node of a job before a run, and name the bad ones.

`check` is run once a rank: device, a small matrix product with a known result, free space, readable data, then an
all-reduce over all ranks. After each it notes in a file how far it has come, so that a rank that hangs is seen too.
`judge` reads the notes: bad nodes to stdout, one a line; the reasons to stderr, last line `healthy` or `unhealthy`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from swift.parallel.ranks import current_place
from swift.utils.entry import reported
from swift.utils.errors import UserError
from swift.utils.files import replace_text

SIDE = 512
"""Rows of the matrices that are multiplied."""
REDUCE_SECONDS = 120


def node_name() -> str:
    """Name of this node, as the batch system calls it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node().partition(".")[0]


def pick_device(kind: str, local_rank: int) -> Any:
    """The torch device of a rank.

    Args:
        kind: What the job has frozen: cpu | cuda | xpu | gpu.
        local_rank: Of this rank on its node.

    Raises:
        UserError: it is not what this rank sees.
    """
    from swift.utils.device import of_local_rank

    return of_local_rank(kind, "trainer.accelerator", local_rank)


def multiply(device: Any) -> None:
    """A product of small whole numbers, which every device must get exactly right.

    Raises:
        UserError: it does not.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-2, 3, (SIDE, SIDE), generator=generator) for _ in range(2))
    expected = left.double() @ right.double()
    found = (left.float().to(device) @ right.float().to(device)).cpu().double()
    if not torch.equal(found, expected):
        raise UserError(f"{int((found != expected).sum())} of {SIDE * SIDE} elements of a matrix product are wrong")


def look_for_space(folders: Sequence[str], free_gb: float) -> None:
    """Raise UserError where a folder has less free space than `free_gb`, or cannot be written."""
    for folder in folders:
        try:
            probe = Path(folder) / f".health-{node_name()}-{os.getpid()}"
            probe.write_bytes(bytes(4096))
            probe.unlink()
            free = shutil.disk_usage(folder).free / 1e9
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror or error}") from error
        if free < free_gb:
            raise UserError(f"{folder}: {free:.1f} GB free of the {free_gb:g} GB a run wants (launcher.min_free_gb)")


def read_data(folder: str) -> None:
    """Read the beginning of the manifest and of a shard of a store.

    Raises:
        UserError: this node cannot.
    """
    try:
        with (Path(folder) / "manifest.csv").open("rb") as stream:
            stream.read(4096)
        shard = next(iter(sorted((Path(folder) / "shards").glob("*.h5"))), None)
        if shard is not None:
            with shard.open("rb") as stream:
                stream.read(1 << 20)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from error


def all_reduce(device: Any, rank: int, world: int) -> None:
    """Sum the numbers of all ranks, over the network the run will use.

    Raises:
        UserError: the sum is wrong, or another rank does not come.
    """
    import torch
    import torch.distributed as dist

    from swift.utils.device import COLLECTIVES, set_current

    set_current(device)
    try:
        dist.init_process_group(
            COLLECTIVES[device.type], rank=rank, world_size=world, timeout=timedelta(seconds=REDUCE_SECONDS)
        )
        numbers = torch.full((1 << 18,), float(rank), device=device)
        dist.all_reduce(numbers)
        wrong = int((numbers != world * (world - 1) / 2).sum())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"all-reduce over {world} ranks: {str(error).splitlines()[0]}") from error
    if wrong:
        raise UserError(f"{wrong} of {numbers.numel()} sums over {world} ranks are wrong")
    dist.destroy_process_group()


def check(reports: Path, environ: dict[str, str]) -> dict[str, Any]:
    """All checks of this rank; returns its note, which is also written to `reports` after every step."""
    place = current_place()
    note: dict[str, Any] = {"node": node_name(), "rank": place.rank, "python": sys.executable}
    note |= {"seconds": {}, "failed": None}
    path = reports / f"rank-{place.rank:06d}.json"
    device: Any = None

    def step(name: str, work: Callable[[], Any]) -> Any:
        note["at"] = name
        replace_text(path, json.dumps(note) + "\n")
        began = time.monotonic()
        try:
            return work()
        except (UserError, RuntimeError) as error:
            if note["failed"] is None:
                note["failed"] = f"{name}: {str(error).splitlines()[0]}"
            return None
        finally:
            note["seconds"][name] = round(time.monotonic() - began, 3)

    folders = [folder for folder in (environ["SWIFT_RUN"], environ["SWIFT_SCRATCH"]) if folder]
    device = step("device", lambda: pick_device(environ["SWIFT_DEVICE"], place.local_rank))
    if device is not None:
        step("matmul", lambda: multiply(device))
    step("space", lambda: look_for_space(folders, float(environ["SWIFT_MIN_FREE_GB"])))
    if environ["SWIFT_DATA"]:
        step("data", lambda: read_data(environ["SWIFT_DATA"]))
    if device is not None and place.world > 1:
        # Ranks that have failed take part as long as they can: else all others would wait for them.
        step("all-reduce", lambda: all_reduce(device, place.rank, place.world))
    note["at"] = "done"
    replace_text(path, json.dumps(note) + "\n")
    return note


def judge(reports: Path, ranks: int, hosts: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """What the notes say.

    Args:
        reports: Folder of the notes.
        ranks: Ranks that each node should have noted.
        hosts: All nodes.

    Returns:
        Bad node -> reason; and what is wrong where no node stands out, else None.
    """
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reports.glob("rank-*.json"))]
    own: dict[str, str] = {}
    waiting: dict[str, str] = {}
    for host in hosts:
        mine = [note for note in notes if note["node"] == host]
        for note in mine:
            if note["failed"] and not note["failed"].startswith("all-reduce"):
                own.setdefault(host, note["failed"])
            elif note["at"] not in ("done", "all-reduce"):
                own.setdefault(host, f"{note['at']}: rank {note['rank']} hangs or has died")
            elif note["failed"] or note["at"] == "all-reduce":
                waiting.setdefault(host, note["failed"] or "all-reduce: no answer")
        if len(mine) < ranks and host not in own:
            own[host] = f"{len(mine)} of {ranks} ranks have started"
    if own:
        return own, None
    if waiting and len(waiting) < len(hosts):
        return waiting, None
    return {}, next(iter(waiting.values()), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; meant for the job's script."""
    parser = argparse.ArgumentParser(prog="python -m swift.health", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="look at the node of this rank")
    one.add_argument("--reports", type=Path, required=True, help="folder for the notes")
    two = commands.add_parser("judge", help="read the notes of all ranks")
    two.add_argument("--reports", type=Path, required=True, help="folder of the notes")
    two.add_argument("--ranks", type=int, required=True, help="ranks on each node")
    two.add_argument("--hosts", nargs="+", required=True, help="names of all nodes")
    options = parser.parse_args(arguments)

    def work() -> None:
        if options.command == "check":
            failed = check(options.reports, dict(os.environ))["failed"]
            sys.exit(f"{node_name()}: {failed}" if failed else 0)
        bad, trouble = judge(options.reports, options.ranks, options.hosts)
        for host, reason in bad.items():
            print(host)
            print(f"{host}: {reason}", file=sys.stderr)
        if trouble:
            print(f"no node stands out: {trouble}", file=sys.stderr)
        print("unhealthy" if bad or trouble else f"healthy: {len(options.hosts)} nodes", file=sys.stderr)

    reported(work)


if __name__ == "__main__":
    main()

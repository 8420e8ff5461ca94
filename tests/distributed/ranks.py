"""Several real ranks for a test: processes with gloo between them, forked from one server that has imported everything.

A fork costs milliseconds, the imports of torch, Lightning and DeepSpeed ten seconds a process.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from swift.parallel.ranks import SETTINGS


def context() -> Any:
    """The server that forks; it imports `tests.distributed.preload` when it starts."""
    # DeepSpeed chooses its device when it is imported, and prints what it chose.
    os.environ.update(DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.distributed.preload"])
    return found


def _rank(job: Callable[..., Any], args: Sequence[Any], env: dict[str, str], log: str, pipe: Connection) -> None:
    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, job(*args)))
    except BaseException as error:  # reported to the test, which decides
        traceback.print_exc()
        pipe.send((False, (type(error).__name__, str(error))))


class Failed(AssertionError):
    """A rank has raised: what, and its log."""

    def __init__(self, rank: int, kind: str, message: str, log: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {message}\n{log}")
        self.kind, self.message = kind, message


class Running:
    """`job(*args)` on each of `ranks` ranks, started.

    Attributes:
        processes: One a rank.
    """

    def __init__(
        self, job: Callable[..., Any], ranks: int, args: Sequence[Any], env: dict[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        shared |= {"LOCAL_WORLD_SIZE": str(ranks), SETTINGS: "unused"} | (env or {})
        server = context()
        self._folder = tempfile.TemporaryDirectory()
        self.processes: list[Any] = []
        self._pipes: list[Any] = []
        for rank in range(ranks):
            mine, other = server.Pipe(duplex=False)
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = str(Path(self._folder.name) / f"{rank}.log")
            process = server.Process(target=_rank, args=(job, args, own, log, other), daemon=True)
            process.start()
            other.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def alive(self) -> bool:
        """Whether any rank is still running."""
        return any(process.is_alive() for process in self.processes)

    def end(self) -> None:
        """End all ranks, also those that wait for a dead one."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def results(self, seconds: int = 240) -> list[Any]:
        """What the job returned on each rank.

        Raises:
            Failed: the first failure of a rank; the others are ended.
        """
        try:
            results = self._collect(seconds)
            for process in self.processes:
                process.join(timeout=5)
            return results
        finally:
            self.end()

    def _collect(self, seconds: int) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in results], timeout=seconds)
            log = "".join(path.read_text()[-4000:] for path in sorted(Path(self._folder.name).glob("*.log")))
            if not ready:
                raise Failed(-1, "TimeoutError", f"no rank has answered for {seconds} s", log)
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = False, ("EOFError", "the process has ended")
                if not good:
                    raise Failed(rank, *value, log)
                results[rank] = value
        return [results[rank] for rank in range(len(self._pipes))]


def run(job: Callable[..., Any], ranks: int, *args: Any, env: dict[str, str] | None = None) -> list[Any]:
    """What `job(*args)` returns on each of `ranks` ranks.

    Raises:
        Failed: the first failure of a rank; the others are ended.
    """
    return Running(job, ranks, args, env).results()

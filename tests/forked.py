"""Commands for tests in processes of their own, forked from a server that has imported everything.

`python -m swift.train` imports for five to ten seconds before it does anything; a fork takes milliseconds. Everything
else is the command's own: arguments, environment, folder, output, signals, exit status. That commands also start from
nothing is seen in tests/test_console.py, tests/test_packaging.py and where a test says so.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.ranks import context


def _child(work: Callable[..., None], args: tuple[Any, ...], folder: str, env: dict[str, str], out: str) -> None:
    """In the fork: what the shell would have set up, then the work."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    work(*args)


def as_command(module: str, *arguments: str) -> None:
    """What `python -m module arguments` does once Python has started."""
    name = module if "__main__" not in module else module.removesuffix(".__main__")
    sys.argv = [name, *arguments]
    for imported in (name, f"{name}.__main__"):
        # It may have been imported by the server: runpy warns of that.
        if getattr(sys.modules.get(imported), "__path__", None) is None:
            sys.modules.pop(imported, None)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


class Forked:
    """`work(*args)` in a fork that has been started.

    Attributes:
        pid: Of the process.
    """

    def __init__(self, work: Callable[..., None], *args: Any, cwd: Path, env: dict[str, str]) -> None:
        self._out = tempfile.TemporaryDirectory()
        self._process = context().Process(target=_child, args=(work, args, str(cwd), env, self._out.name))
        self._process.start()
        self.pid: int = self._process.pid

    def _read(self, name: str) -> str:
        path = Path(self._out.name) / name
        return path.read_text() if path.exists() else ""

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._read("stderr")

    def alive(self) -> bool:
        """Whether it still runs."""
        return bool(self._process.is_alive())

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """Its exit status, negative for a signal; ended when it takes longer.

        Raises:
            AssertionError: It took longer.
        """
        self._process.join(seconds)
        late = self.alive()
        if late:
            self._process.kill()
            self._process.join()
        assert not late, f"not ended after {seconds} s: {self.stderr[-4000:]}"
        return int(self._process.exitcode)


def python_m(module: str, *arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments`, ended."""
    forked = Forked(as_command, module, *arguments, cwd=cwd, env=env)
    status = forked.wait()
    return subprocess.CompletedProcess([module, *arguments], status, forked.stdout, forked.stderr)

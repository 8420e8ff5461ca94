"""Shared by all tests. What is heavy to import is imported by the fixtures that need it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import command, small_store

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `tests.small`; read only."""
    return small_store(tmp_path_factory.mktemp("small") / "store")


@pytest.fixture(scope="session")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps; read only."""
    from tests.runs import start

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    start(*command(store, run_dir))
    torch.set_num_threads(before)
    return run_dir


@pytest.fixture
def alone() -> Iterator[None]:
    """One thread, and Ctrl-C as before: Lightning ignores it after the first."""
    import signal

    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the runs of this test stop in the step after this one."""
    import swift.train.wiring
    from tests.runs import StopAt

    original = swift.train.wiring.build_callbacks

    def stop(step: int) -> None:
        def build(*args: Any) -> list[Any]:
            return [*original(*args), StopAt(step)]

        monkeypatch.setattr(swift.train.wiring, "build_callbacks", build)

    return stop

"""What commands say of files that the disk or its rights forbid."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import swift
from swift.utils.entry import no_memory, reported


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise OSError(number, "says why", "/disk/split.json")

    with pytest.raises(SystemExit) as status:
        reported(work)
    assert status.value.code == 2
    assert capsys.readouterr().err == "error: /disk/split.json: says why\n"


def test_a_folder_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        reported((tmp_path / "file" / "x").mkdir)
    assert capsys.readouterr().err == f"error: {tmp_path}/file/x: Not a directory\n"


def test_faults_of_ours_keep_their_traceback() -> None:
    def work() -> None:
        raise OSError(errno.EBADF, "closed too early")

    with pytest.raises(OSError, match="closed too early"):
        reported(work)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "this machine's memory is not enough"),
        (
            MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"),
            "this machine's memory is not enough (7.45 GiB more were asked for)",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
            "this machine's memory is not enough (99 bytes more were asked for)",
        ),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"),
            "the GPU's memory is not enough (CUDA out of memory): try a smaller batch",
        ),
    ],
)
def test_too_little_memory_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as status:
        reported(work)
    assert status.value.code == 1
    assert capsys.readouterr().err == f"error: {line}\n"
    with pytest.raises(RuntimeError, match="a fault of ours"):
        reported(lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))


def test_torch_says_so_as_is_expected() -> None:
    import numpy as np
    import torch

    for ask in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            ask()
        said = no_memory(caught.value)
        assert said is not None
        assert said.startswith("this machine's memory is not enough (")


@pytest.mark.parametrize(
    ("command", "imports"), [("train", "omegaconf"), ("plan", "omegaconf"), ("baselines", "numpy")]
)
def test_ctrl_c_while_a_command_imports_is_one_line(tmp_path: Path, command: str, imports: str) -> None:
    """As if it came in the middle of an import, before the command's own code runs."""
    (tmp_path / f"{imports}.py").write_text("raise KeyboardInterrupt\n")
    paths = os.pathsep.join([str(tmp_path), str(Path(swift.__file__).parents[1])])
    words = [sys.executable, "-m", f"swift.{command}"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    # What a shell calls status 130.
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "stopped\n")
    # Who imports swift keeps what Python does.
    code = "import sys, swift; sys.exit(sys.excepthook is not sys.__excepthook__)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}).returncode == 0


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_waiting_threads_soon_sleep_unless_the_user_says_how_they_wait(given: dict[str, str]) -> None:
    found: dict[str, str] = {}
    swift._wait_briefly(found)
    assert found == {"GOMP_SPINCOUNT": "1000"}
    found = dict(given)
    swift._wait_briefly(found)
    assert found == given

"""What commands say of files that the disk or its rights forbid."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from swift.utils.entry import reported


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

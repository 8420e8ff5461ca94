"""`python -m swift.embed` by many processes, stopped and gone on with: the table of one process, to the last bit."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from swift.inference import embedding as embedding_module
from swift.inference import embedding_parts
from swift.inference.embed_cli import main
from swift.inference.embedding import Embedder, Embedding
from tests.data import scans
from tests.forked import Forked, python_m
from tests.inference.test_embed_cli import embed, npz
from tests.runs import environment

COUNT = 9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine scans of four subjects, of 8 to 24 frames; one is too short."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(COUNT):
        name = f"sub-{number % 4}_run-{number}"
        frames = 5 if number == 4 else 8 + 2 * number
        scans.save(folder / f"{name}.nii.gz", scans.bold(frames, seed=number))
        scans.save(folder / f"{name}_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    return folder


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written after every scan."""
    monkeypatch.setattr(embedding_parts, "SECONDS", 0.0)


def same(a: Path, b: Path) -> None:
    left, right = npz(a), npz(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("per", ["scan", "clip", "frame", "subject"])
def test_parts_in_any_order_make_the_table_of_one_process(
    finished: Path, files: Path, tmp_path: Path, per: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (finished, files, "--layer", "all", "--per", per, "--batch", "2")
    embed(*arguments, "--out", tmp_path / "one.npz", status=1)
    many = tmp_path / "many.npz"
    for number in (3, 1, 4, 2):
        capsys.readouterr()
        bad = int(number in (1, 2))  # the part with the short scan, and the last one, which speaks for all
        embed(*arguments, "--out", many, "--part", f"{number}/4", status=bad)
        assert many.exists() == (number == 2)
    assert "1 of 9 scans failed" in capsys.readouterr().err
    same(tmp_path / "one.npz", many)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.npz", "one.npz"]
    embed(*arguments, "--out", many, "--part", "3/4")  # a point that comes again
    embed(finished, files, "--out", many, "--part", "3/4", "--per", "scan", "--batch", "3", status=2)
    assert "exists already" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_a_stopped_command_goes_on_and_does_nothing_twice(
    finished: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, made = tmp_path / "a.npz", []
    original = Embedding.prepare

    def counted(self: Embedding, scan: Any) -> Any:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(scan.scan_id)
        return original(self, scan)

    monkeypatch.setattr(Embedding, "prepare", counted)
    embed(finished, files, "--out", out, status=130)
    assert not out.exists()
    kept = sorted((tmp_path / ".a.npz.parts").glob("*.npz"))
    assert len(kept) == 5
    kept[0].write_bytes(kept[0].read_bytes()[:-30])  # a disk that lost power
    before, made[:] = list(made), []
    monkeypatch.setattr(Embedding, "prepare", lambda self, scan: made.append(scan.scan_id) or original(self, scan))
    embed(finished, files, "--out", out, status=1)
    assert "is damaged and left out: its scans are embedded again" in caplog.text
    assert "of 9 scans are embedded already" in caplog.text
    assert len(set(before) & set(made)) == 2  # the damaged one, and the one that failed
    assert set(before) | set(made) == {f"sub-{number % 4}_run-{number}" for number in range(COUNT)}
    embed(finished, files, "--out", tmp_path / "b.npz", status=1)
    same(out, tmp_path / "b.npz")


def test_scans_made_ready_ahead_give_the_same_table(
    finished: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(finished, files, "--out", tmp_path / "one.npz", status=1)
    original, threads = Embedding.prepare, set()

    def noted(self: Embedding, scan: Any) -> Any:
        threads.add(threading.current_thread().name)
        return original(self, scan)

    monkeypatch.setattr(Embedding, "prepare", noted)
    embed(finished, files, "--out", tmp_path / "two.npz", "--ahead", "2", status=1)
    assert {name.rpartition("_")[0] for name in threads} == {"prepare"}
    same(tmp_path / "one.npz", tmp_path / "two.npz")
    embed(finished, files, "--out", tmp_path / "three.npz", "--ahead", "-1", status=2)
    assert "--ahead -1: must not be negative" in capsys.readouterr().err


def test_products_are_those_of_training_and_the_callers_are_put_back(finished: Path, files: Path) -> None:
    seen, original = [], embedding_module.embed_batch

    def noted(*given: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_module, "embed_batch", noted)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            Embedder(finished).transform([str(files / "sub-1_run-1.nii.gz")])
            assert torch.get_float32_matmul_precision() == "highest"
        finally:
            torch.set_float32_matmul_precision(before)
    assert set(seen) == {"high"}


@pytest.mark.usefixtures("at_once")
def test_parts_of_another_table_are_refused(
    finished: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.npz"
    embed(finished, files, "--out", out, "--part", "1/2", status=1)
    for other, says in ((("--layer", "all"), "other layer"), (("--batch", "1"), "other batch")):
        embed(finished, files, "--out", out, "--part", "2/2", *other, status=2)
        assert f"holds parts of another table ({says}): remove it" in capsys.readouterr().err
    embed(finished, next(files.glob("*run-0.nii.gz")), "--out", out, status=2)
    assert "holds parts of another table (other scans)" in capsys.readouterr().err
    embed(finished, files, "--out", out, "--part", "3/2", status=2)
    assert "--part 3/2: legal are I/N" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_ranks_share_the_scans_out(
    finished: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(finished, files, "--out", tmp_path / "one.parquet", status=1)
    for rank in range(3):
        started = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 3, "TORCHELASTIC_RUN_ID": "x"}
        for name, value in started.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit):
            main([str(finished), str(files), "--out", str(tmp_path / "many.parquet"), "--quiet", "--device", "cpu"])
    one, many = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "many"))
    assert one.equals(many)
    assert many.num_rows == COUNT - 1


def slowly(arguments: list[str]) -> None:
    """`python -m swift.embed`, with a second's rest before each scan."""
    embedding_parts.SECONDS = 0.0
    original = Embedding.prepare

    def prepare(self: Embedding, scan: Any) -> Any:
        time.sleep(1)
        return original(self, scan)

    Embedding.prepare = prepare  # type: ignore[method-assign]
    main(arguments)


@pytest.mark.slow
def test_four_processes_and_a_kill(finished: Path, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "many.npz"
    arguments = [str(finished), str(files), "--quiet", "--device", "cpu", "--per", "clip", "--out"]

    def start(part: int) -> Forked:
        return Forked(slowly, [*arguments, str(out), "--part", f"{part}/4"], cwd=tmp_path, env=environment())

    processes = [start(part) for part in (1, 2, 3, 4)]
    folder = tmp_path / ".many.npz.parts"
    until = time.monotonic() + 300
    while not list(folder.glob("0000007-*.npz")) and time.monotonic() < until:  # the last part's first but one
        time.sleep(0.05)
    processes[3].send_signal(signal.SIGKILL)
    ended = [process.wait(300) for process in processes]
    assert ended == [1, 0, 0, -signal.SIGKILL]
    assert not out.exists()
    left = {path.name[:7] for path in folder.glob("*.npz")}
    assert "0000008" not in left
    assert start(4).wait(300) == 1  # it ends last, and so says that a scan has failed
    one = tmp_path / "one.npz"
    assert python_m("swift.embed", *arguments, str(one), cwd=tmp_path, env=environment()).returncode == 1
    same(out, one)
    assert not folder.exists()

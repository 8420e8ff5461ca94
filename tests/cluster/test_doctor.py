"""The doctor: what it says is so, and a planted fault is named."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from swift.cluster import doctor
from swift.utils import machine
from swift.utils.errors import UserError
from tests.data import stores


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        doctor.main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "LOW_GB", 0.0)
    monkeypatch.setattr(doctor, "product", lambda: {"gflops": 1.0, "seconds": 0.0})
    monkeypatch.chdir(tmp_path)


def test_what_a_bug_report_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stores.build(tmp_path / "s", [1, 2, 3], shard_bytes=1)
    code, said = run(capsys, path, "--json")
    found = json.loads(said)
    assert (code, found["wrong"]) == (0, [])
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["disk"]["folder"] == str(tmp_path)
    assert found["store"] == {"store": str(path), "scans": 3, "shards_read": 3}
    assert found["swift"].startswith(metadata.version("swift-fmri"))
    code, said = run(capsys, path)
    assert said.splitlines()[-1] == "all is well"
    assert [line.split()[0] for line in said.splitlines()[:-1]] == [name for name in found if name != "wrong"]


def test_faults_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = stores.build(tmp_path / "s", [1], shard_bytes=1)
    shard = next((path / "shards").iterdir())
    raw = bytearray(shard.read_bytes())
    from swift.data.store.reader import Store

    raw[Store(path)._layout(0).bold] ^= 1
    shard.write_bytes(raw)

    def broken() -> None:
        raise UserError("3 of 9 elements of a matrix product are wrong")

    monkeypatch.setattr(doctor, "product", broken)
    monkeypatch.setattr(doctor, "LOW_GB", 1e9)
    monkeypatch.setattr(doctor, "packages", lambda: {"torch": "2", "no-such-package": machine.MISSING})
    code, said = run(capsys, path)
    wrong = [line for line in said.splitlines() if line.startswith("wrong: ")]
    assert code == 1
    assert wrong[0] == "wrong: product: 3 of 9 elements of a matrix product are wrong"
    assert "frame 0" in wrong[1]
    assert wrong[2] == "wrong: no-such-package is not installed"
    assert "GB free" in wrong[3]
    assert len(wrong) == 4


def test_the_product_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "SIDE", 64)
    found = doctor.product(0.01)
    assert found["gflops"] > 0
    assert found["seconds"] >= 0.01

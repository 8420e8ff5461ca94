"""Health of nodes: each check with what it must find, and which node is blamed for it."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from swift.cluster.health import check, judge, look_for_space, main, multiply, node_name, pick_device, read_data
from swift.utils import device
from swift.utils.errors import UserError


def test_the_node_is_called_as_the_batch_system_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert node_name() == "n7"
    monkeypatch.delenv("SLURMD_NODENAME")
    monkeypatch.setattr(platform, "node", lambda: "x3004c0.hsn.site.org")
    assert node_name() == "x3004c0"


@pytest.mark.parametrize(
    ("count", "local_rank", "expected"),
    [
        (8, 0, 0),
        (8, 5, 5),
        (1, 5, 0),
        (4, 4, "local rank 4, but only 4 devices are visible"),
        (0, 0, "xpu: torch sees no GPU here"),
    ],
)
def test_each_rank_picks_its_device(
    monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, expected: int | str
) -> None:
    monkeypatch.setattr(device, "kind_here", lambda: "xpu" if count else "cpu")
    monkeypatch.setattr(device, "count", lambda: count)
    monkeypatch.setattr(device, "name", lambda: "Max 1550")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            pick_device("xpu", local_rank)
    else:
        assert pick_device("gpu", local_rank) == pick_device("xpu", local_rank) == torch.device("xpu", expected)
        with pytest.raises(UserError, match=rf"^trainer.accelerator=cuda: torch sees {count} x xpu \(Max 1550\) here"):
            pick_device("cuda", local_rank)
    assert pick_device("cpu", local_rank) == torch.device("cpu")


def test_a_device_that_multiplies_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply(torch.device("cpu"))
    honest = torch.Tensor.cpu

    def flipped(tensor: torch.Tensor) -> torch.Tensor:
        copy = honest(tensor).clone()
        copy[3, 5] += 1
        return copy

    monkeypatch.setattr(torch.Tensor, "cpu", flipped)
    with pytest.raises(UserError, match="1 of 262144 elements of a matrix product are wrong"):
        multiply(torch.device("cpu"))


def test_space_and_data(tmp_path: Path, store: Path) -> None:
    look_for_space([str(tmp_path)], 0.001)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"GB free of the 1e\+09 GB a run wants \(launcher.min_free_gb\)"):
        look_for_space([str(tmp_path)], 1e9)
    with pytest.raises(UserError, match="gone: No such file"):
        look_for_space([str(tmp_path / "gone")], 0)
    read_data(str(store))
    with pytest.raises(UserError, match="No such file"):
        read_data(str(tmp_path))


def test_the_note_of_a_rank(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    environ = {"SWIFT_RUN": str(tmp_path), "SWIFT_SCRATCH": "", "SWIFT_DEVICE": "cpu", "SWIFT_MIN_FREE_GB": "0"}
    reports = tmp_path / "reports"
    reports.mkdir()
    well = check(reports, environ | {"SWIFT_DATA": str(store)})
    assert (well["node"], well["rank"], well["at"], well["failed"]) == ("n1", 0, "done", None)
    assert list(well["seconds"]) == ["device", "matmul", "space", "data"]
    assert json.loads((reports / "rank-000000.json").read_text()) == well
    # The first failure is told; the checks after it are made all the same.
    ill = check(reports, environ | {"SWIFT_DATA": "/gone", "SWIFT_MIN_FREE_GB": "1e9"})
    assert ill["failed"].startswith("space: ")
    assert list(ill["seconds"]) == ["device", "matmul", "space", "data"]


WELL = {"at": "done", "failed": None}
REDUCED = {"at": "done", "failed": "all-reduce: timed out"}
HOSTS = ["n1", "n2", "n3"]
CASES = {
    "all well": ([("n1", WELL), ("n2", WELL), ("n3", WELL)], {}, None),
    "a failure": ([("n1", WELL), ("n2", WELL | {"failed": "space: none"}), ("n3", WELL)], {"n2": "space: none"}, None),
    "a failure explains why the others wait": (
        [("n1", REDUCED), ("n2", WELL | {"failed": "device: gone"}), ("n3", {"at": "all-reduce", "failed": None})],
        {"n2": "device: gone"},
        None,
    ),
    "a rank that hangs": (
        [("n1", {"at": "matmul", "failed": None}), ("n2", REDUCED), ("n3", REDUCED)],
        {"n1": "matmul: rank 0 hangs or has died"},
        None,
    ),
    "a rank that never came": ([("n1", REDUCED), ("n3", REDUCED)], {"n2": "0 of 1 ranks have started"}, None),
    "a bad network card": ([("n1", WELL), ("n2", REDUCED), ("n3", WELL)], {"n2": "all-reduce: timed out"}, None),
    "a bad network": ([(host, REDUCED) for host in HOSTS], {}, "all-reduce: timed out"),
}


@pytest.mark.parametrize("name", CASES)
def test_who_is_to_blame(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    notes, bad, trouble = CASES[name]
    for rank, (node, note) in enumerate(notes):
        (tmp_path / f"rank-{rank:06d}.json").write_text(json.dumps({"node": node, "rank": rank} | note))
    assert judge(tmp_path, 1, HOSTS) == (bad, trouble)
    # What the job's script reads: bad nodes on one stream, the verdict last on the other.
    main(["judge", "--reports", str(tmp_path), "--ranks", "1", "--hosts", *HOSTS])
    said = capsys.readouterr()
    assert said.out.split() == list(bad)
    assert said.err.splitlines()[-1] == ("unhealthy" if bad or trouble else "healthy: 3 nodes")

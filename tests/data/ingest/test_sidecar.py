"""JSON sidecars: inheritance by key, byte order marks, StartTime and VolumeTiming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.ingest.sidecar import read_timing
from swift.data.store.reader import Store
from swift.utils.errors import BadScan
from tests.data import scans


def write(path: Path, content: object, mark: bytes = b"") -> Path:
    path.write_bytes(mark + json.dumps(content).encode())
    return path


def test_each_key_counts_from_the_nearest_file_that_has_it(tmp_path: Path) -> None:
    root = scans.dataset(tmp_path / "d", subjects=1)
    near = next(root.rglob("*_bold.json"))
    write(near, {"SkullStripped": False}, b"\xef\xbb\xbf")
    write(root / "task-rest_bold.json", {"RepetitionTime": 1.5, "StartTime": 9})
    write(root / "sub-01" / "sub-01_bold.json", {"StartTime": 0.75})
    write(root / "task-rest_desc-smooth_bold.json", {"RepetitionTime": 7})  # of another form
    write(root / "sub-01" / "sub-01_ses-1_task-rest_run-01_bold.json", {"RepetitionTime": 2.5})  # run-01 is run-1
    (source,) = find_sources([root])
    names = ["task-rest_bold.json", "sub-01_bold.json", "sub-01_ses-1_task-rest_run-01_bold.json", near.name]
    assert [path.name for path in source.sidecars] == names
    ready = prepare(source, Recipe(grid=(24, 24, 24), spacing=3.0))
    assert (ready.header.tr, ready.header.start_time) == (2.5, 0.75)
    assert ingest([source], tmp_path / "s", Recipe(grid=(24, 24, 24), spacing=3.0)).exit_code == 0
    assert float(Store(tmp_path / "s").attributes(0)["start_time"]) == 0.75


def test_volume_timing(tmp_path: Path) -> None:
    even = write(tmp_path / "a.json", {"VolumeTiming": [0.5, 2.5, 4.5, 6.5]})
    timing = read_timing([even], "x")
    assert (timing.tr, timing.start_time, timing.notes) == (2.0, 0.5, [])
    odd = write(tmp_path / "b.json", {"VolumeTiming": [0, 2, 5]})
    with pytest.raises(BadScan, match=r"x: frames are 2 to 3 s apart \(VolumeTiming in b.json\).*--tr"):
        read_timing([odd], "x")
    assert read_timing([odd], "x", told=True).notes == [
        "frames are 2 to 3 s apart (VolumeTiming): taken as evenly spaced"
    ]
    for wrong in ([1], [2, 1], "no", [0, None]):
        with pytest.raises(BadScan, match="not a list of growing times"):
            read_timing([write(tmp_path / "c.json", {"VolumeTiming": wrong})], "x")


@pytest.mark.parametrize("key", ["RepetitionTime", "StartTime"])
def test_no_number(key: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {key: "2"})
    with pytest.raises(BadScan, match=f"{key} '2' in a.json is not a number of seconds"):
        read_timing([file], "x")

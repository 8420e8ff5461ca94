"""Stores made one, and stores of format version 1 moved."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.store import format as fmt
from swift.data.store.check import verify
from swift.data.store.join import join
from swift.data.store.move import place
from swift.data.store.reader import CorruptData, Store, StoreWriter
from swift.data.store.spaces import box_affine
from swift.utils.errors import UserError
from tests.data import scans
from tests.data.store.test_spaces import as_version_1
from tests.data.stores import GRID, build, content, scan
from tests.forked import Forked, as_command
from tests.runs import environment

RECIPE = Recipe(grid=(24, 24, 24), spacing=4.0)
SHARD = 40_000


def data(path: Path) -> dict[str, str]:
    """Every file of a store but its report."""
    return {name: digest for name, digest in content(path).items() if not name.startswith("ingest_report")}


def test_parts_joined_are_the_store_of_one_ingest(tmp_path: Path) -> None:
    sources = find_sources([scans.dataset(tmp_path / "d", subjects=5)])
    parts = []
    for number in (1, 2, 3):
        parts.append(tmp_path / f"part{number}")
        report = ingest(sources, parts[-1], RECIPE, shard_bytes=SHARD, part=(number, 3))
        assert len(report.results) == (2, 2, 1)[number - 1]
    figures = join(parts[::-1], tmp_path / "joined", SHARD)
    ingest(sources, tmp_path / "whole", RECIPE, shard_bytes=SHARD)
    assert figures["scans"] == 5
    assert figures["shards"] > 1
    assert data(tmp_path / "joined") == data(tmp_path / "whole")
    assert verify(tmp_path / "joined") == []
    rows = json.loads((tmp_path / "joined" / "ingest_report.json").read_text())["scans"]
    assert [row["status"] for row in rows] == ["added"] * 5
    with pytest.raises(UserError, match="part 2 of 3 is missing"):
        join([parts[0], parts[2]], tmp_path / "less")
    assert not (tmp_path / "less").exists()
    again = ingest(sources, tmp_path / "joined", RECIPE)
    assert {row.status for row in again.results} == {"present"}


def test_what_cannot_be_joined_is_named(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a", [0, 1]), build(tmp_path / "b", [1, 2])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"scan sub-01_task-rest is in .*a and in .*b"):
        join([a, b], out)
    with StoreWriter(tmp_path / "c", GRID, 3.0) as writer:
        writer.add(*scan(5))
    with pytest.raises(UserError, match=r"c has spacing 3\.0, .*a has 2\.0"):
        join([a, tmp_path / "c"], out)
    with StoreWriter(tmp_path / "e", GRID, 2.0, placement="MNI152") as writer:
        header, mask, bold = scan(6)
        writer.add(replace(header, placement="MNI152"), mask, bold)
    with pytest.raises(UserError, match=r"e has placement MNI152, .*a has own mask"):
        join([a, tmp_path / "e"], out)
    StoreWriter(tmp_path / "a", GRID, 2.0).add(*scan(7))
    with pytest.raises(UserError, match="1 scans are not packed yet"):
        join([a], out)
    with pytest.raises(UserError, match="is one of the parts"):
        join([b], b)
    with pytest.raises(UserError, match=r"format version 1; .*swift\.data place"):
        join([as_version_1(b)], out)
    assert not out.exists()


def test_a_damaged_part_is_named_and_nothing_of_it_is_taken(tmp_path: Path) -> None:
    part = build(tmp_path / "a", [0], shard_bytes=1)
    shard = next((part / "shards").iterdir())
    offset, _ = fmt.bold_offsets(shard)["sub-00_task-rest"]
    raw = bytearray(shard.read_bytes())
    raw[offset + 2 * Store(part).scans[0].voxels] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(CorruptData, match="scan sub-00_task-rest, frame 1"):
        join([part], tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.csv").exists()


def version_1(path: Path, shift: tuple[float, float, float]) -> Path:
    """A store as version 1 made it: two scans, the grid around each one's own mask, so many mm off the box."""
    with StoreWriter(path, GRID, 2.0) as writer:
        for number in (0, 1):
            header, mask, bold = scan(number)
            affine = box_affine("MNI152", GRID, 2.0)
            affine[:3, 3] += np.asarray(shift) * (number == 1)
            source = f"sub-{number}_space-MNI152NLin6Asym_bold.nii.gz"
            writer.add(replace(header, affine=affine, source=source), mask, bold)
    return as_version_1(path)


def test_a_version_1_store_is_moved_by_whole_voxels(tmp_path: Path) -> None:
    old = Store(version_1(tmp_path / "old", (2.0, 0.0, 0.0)))
    # One slice of 5 falls out at x: more than a tenth; the second store is wide enough.
    with pytest.raises(UserError, match=r"% of the brain of sub-01_task-rest would lie outside the box of MNI152"):
        place(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    path = tmp_path / "wide"
    header, _, _ = scan(0)
    mask = np.zeros((12, 12, 12), bool)
    mask[2:9, 3:8, 2:9] = True
    mask[11, 5, 5] = True
    bold = np.random.default_rng(0).normal(900, 10, (6, int(mask.sum()))).astype(np.float32)
    affine = box_affine("MNI152", (12, 12, 12), 2.0)
    affine[:3, 3] += [2.0, -4.0, 0.0]
    with StoreWriter(path, (12, 12, 12), 2.0) as writer:
        writer.add(replace(header, affine=affine), mask, bold)
    with pytest.raises(UserError, match="space of 1 scans is not known"):
        place(as_version_1(path), tmp_path / "moved")
    figures = place(path, tmp_path / "moved", "MNI152NLin6Asym")
    assert figures == {"scans": 1, "voxels_lost": 1, "placement": "MNI152"}
    new, old = Store(tmp_path / "moved"), Store(path)
    assert (new.version, new.placement, new.spaces) == (2, "MNI152", ("MNI152NLin6Asym",))
    np.testing.assert_array_equal(new.affine(0), box_affine("MNI152", (12, 12, 12), 2.0))
    want = np.zeros_like(mask)
    want[3:10, 1:6, 2:9] = True
    np.testing.assert_array_equal(new.mask(0), want)
    kept = np.argwhere(mask)[:, 0] != 11
    np.testing.assert_array_equal(new.values(0), old.values(0)[:, kept])
    values, attributes = bold[:, kept].astype(np.float64), new.attributes(0)
    assert attributes["global_mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert attributes["global_std"] == pytest.approx(values.std(), rel=1e-5)
    assert attributes["global_max"] == pytest.approx(values.max(), rel=1e-6)
    assert "moved from a store of format version 1 by [1, -2, 0] voxels" in attributes["notes"]
    assert verify(tmp_path / "moved") == []
    with pytest.raises(UserError, match="is of format version 2 already"):
        place(tmp_path / "moved", tmp_path / "x")


def test_where_phases_do_not_agree_the_sources_are_asked_for(tmp_path: Path) -> None:
    version_1(tmp_path / "old", (0.0, 0.5, 0.0))
    with pytest.raises(UserError, match=r"1 of 2 scans do not coincide .*sub-01_task-rest.* ingest the sources again"):
        place(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UserError, match="--space MNI153: known are MNI, "):
        place(tmp_path / "old", tmp_path / "new", "MNI153")
    place(tmp_path / "old", tmp_path / "own", "T1w")
    assert Store(tmp_path / "own").placement == "own mask"
    np.testing.assert_array_equal(Store(tmp_path / "own").affine(1), Store(tmp_path / "old").affine(1))


@pytest.mark.slow
def test_four_points_of_a_job_array_and_a_kill(tmp_path: Path) -> None:
    """Four processes, one killed in the middle and started again, a join killed and started again."""
    dataset = scans.dataset(tmp_path / "d", subjects=9, frames=60)
    words = ["swift.data", "ingest", str(dataset), "--grid", "24", "--spacing", "4"]
    words += ["--workers", "1", "--quiet", "--shard-gb", str(SHARD / 1e9)]

    def point(number: int) -> Forked:
        more = ["--part", f"{number}/4", "--out", str(tmp_path / f"part{number}")]
        return Forked(as_command, *words, *more, cwd=tmp_path, env=environment())

    running = {number: point(number) for number in (1, 2, 3, 4)}
    until = time.monotonic() + 120
    while not list((tmp_path / "part2").glob("staging/[!.]*.h5")) and running[2].alive():
        assert time.monotonic() < until
        time.sleep(0.002)
    running[2].send_signal(signal.SIGKILL)
    ended = {number: process.wait() for number, process in running.items()}
    assert [ended[number] for number in (1, 3, 4)] == [0, 0, 0]
    parts = [tmp_path / f"part{number}" for number in (1, 2, 3, 4)]
    if ended[2] == -signal.SIGKILL:
        with pytest.raises(UserError):
            join(parts, tmp_path / "joined", SHARD)
    assert point(2).wait() == 0
    child = os.fork()
    if child == 0:
        commit, left = StoreWriter._commit, [2]

        def last(*arguments: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return commit(*arguments)  # type: ignore[arg-type]

        StoreWriter._commit = last  # type: ignore[assignment,method-assign]
        join(parts, tmp_path / "joined", SHARD)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert join(parts, tmp_path / "joined", SHARD)["scans"] == 9
    ingest(find_sources([dataset]), tmp_path / "whole", RECIPE, shard_bytes=SHARD)
    assert data(tmp_path / "joined") == data(tmp_path / "whole")

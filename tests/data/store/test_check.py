"""Verify finds every flipped byte; repair restores the very bytes; copies are verified; export comes back."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.ingest.repair import repair
from swift.data.ingest.sources import Source
from swift.data.store.check import copy, describe, verify
from swift.data.store.export import export_scan
from swift.data.store.reader import Damage, Store
from swift.utils.errors import UserError
from tests.data import scans

RECIPE = Recipe(grid=(24, 24, 24), spacing=4.0)
FLIPS = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(store of 3 scans in 2 shards, the data set it came from)."""
    root = tmp_path_factory.mktemp("maintain")
    data = scans.dataset(root / "d", subjects=3)
    ingest(find_sources([data]), root / "s", RECIPE, shard_bytes=40_000)
    assert len(list((root / "s" / "shards").iterdir())) == 2
    return root / "s", data


@pytest.fixture
def store(made: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(made[0], tmp_path / "s")
    return tmp_path / "s"


def flip(file: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    file.write_bytes(raw)


def bold_place(store: Path, scan: int) -> tuple[Path, int, int]:
    """(shard, offset of the scan's first frame, bytes a frame), by plain h5py."""
    info = Store(store).scans[scan]
    file = store / "shards" / info.shard
    with h5py.File(file) as opened:
        return file, opened[f"scans/{info.scan_id}/bold"].id.get_offset(), 2 * info.voxels


def shard_bytes(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((store / "shards").iterdir())}


def test_a_sound_store(made: tuple[Path, Path]) -> None:
    seen: list[str] = []
    assert verify(made[0], workers=2, progress=seen.append) == []
    assert sorted(seen) == ["00000.h5", "00001.h5"]


def test_a_frame_is_named(store: Path) -> None:
    file, offset, row = bold_place(store, 1)
    flip(file, offset + 5 * row + 17)
    name = Store(store).scans[1].scan_id
    assert verify(store) == [Damage(file.name, name, "bold", 5)]
    assert describe(verify(store)[0]) == f"shard {file.name}, scan {name}, frame 5"


@pytest.mark.slow
def test_every_single_byte_flip_is_found_and_mended(store: Path, made: tuple[Path, Path]) -> None:
    """Anywhere in the shards, HDF5's own structures and padding included; alternately one by one from the replica."""
    rng = random.Random(1)
    before = shard_bytes(store)
    for number in range(FLIPS):
        file = store / "shards" / rng.choice(sorted(before))
        place = rng.randrange(len(before[file.name]))
        flip(file, place, rng.randrange(8))
        damage = verify(store)
        assert {one.shard for one in damage} == {file.name}, place
        if number % 20 == 0:
            assert repair(store, replica=made[0]).left == []
            assert shard_bytes(store) == before
        else:
            file.write_bytes(before[file.name])


def test_many_flips_in_frames_are_named_one_by_one_and_mended_from_source(store: Path, made: tuple[Path, Path]) -> None:
    before, rng = shard_bytes(store), random.Random(2)
    want = set()
    for _ in range(12):
        scan, frame = rng.randrange(3), rng.randrange(8)
        if (scan, frame) in want:
            continue
        want.add((scan, frame))
        file, offset, row = bold_place(store, scan)
        flip(file, offset + frame * row + rng.randrange(row))
    names = [scan.scan_id for scan in Store(store).scans]
    damage = verify(store)
    assert {(names.index(one.scan), one.frame) for one in damage} == want
    outcome = repair(store, sources=find_sources([made[1]]))
    assert outcome.left == []
    assert {(one, giver) for one, giver in outcome.fixed} == {(one, "source") for one in damage}
    assert shard_bytes(store) == before


@pytest.mark.parametrize("part", ["mask", "scale", "checksum", "stats/median", "confounds"])
@pytest.mark.parametrize("giver", ["source", "replica"])
def test_arrays_are_mended(store: Path, made: tuple[Path, Path], part: str, giver: str, tmp_path: Path) -> None:
    before = shard_bytes(store)
    info = Store(store).scans[0]
    file = store / "shards" / info.shard
    with h5py.File(file) as opened:
        offset = opened[f"scans/{info.scan_id}/{part}"].id.get_offset()
    flip(file, offset + 9, 3)
    assert any(one.part == part for one in verify(store))
    if giver == "source":
        outcome = repair(store, sources=find_sources([made[1]]))
    else:  # the same scans in other shards: no shard can be taken as a whole
        ingest(find_sources([made[1]]), tmp_path / "other", RECIPE, shard_bytes=1)
        outcome = repair(store, replica=tmp_path / "other")
    assert outcome.left == []
    assert giver in [label for _, label in outcome.fixed]
    assert shard_bytes(store) == before


def test_what_cannot_be_mended_is_said(store: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    file, offset, row = bold_place(store, 0)
    flip(file, offset + row)
    with pytest.raises(UserError, match="--replica STORE or --source PATH"):
        repair(store)
    wrong = scans.save(tmp_path / "w.nii.gz", scans.bold(seed=77))
    outcome = repair(store, sources=[Source(Store(store).scans[0].scan_id, wrong, "x")])
    assert outcome.fixed == []
    ((damage, why),) = outcome.left
    assert damage.frame == 1
    assert "not the file that was ingested" in why


def test_missing_and_short_shards(store: Path, made: tuple[Path, Path]) -> None:
    before = shard_bytes(store)
    (store / "shards" / "00000.h5").unlink()
    second = store / "shards" / "00001.h5"
    second.write_bytes(second.read_bytes()[:-100])
    assert [(one.shard, one.part) for one in verify(store)] == [("00000.h5", "missing"), ("00001.h5", "size")]
    assert len(repair(store, sources=find_sources([made[1]])).left) == 2
    assert repair(store, replica=made[0]).left == []
    assert shard_bytes(store) == before


def test_a_changed_line_of_the_manifest_is_found(store: Path) -> None:
    manifest = store / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("sub-02,1,rest", "sub-20,1,rest"))
    assert [one.part for one in verify(store)] == ["manifest"]


def test_copy_is_verified_and_goes_on(made: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "copy"
    (target / "shards").mkdir(parents=True)
    shutil.copy(made[0] / "shards" / "00000.h5", target / "shards")  # a copy that was stopped after one shard
    figures = copy(made[0], target)
    assert (figures["copied"], figures["kept"]) == (1, 1)
    assert verify(target) == []
    assert (target / "manifest.csv").read_bytes() == (made[0] / "manifest.csv").read_bytes()
    flip(target / "shards" / "00001.h5", 5000)  # damaged since: copied again
    assert copy(made[0], target)["copied"] == 1
    assert shard_bytes(target) == shard_bytes(made[0])


def test_copy_of_damaged_or_onto_another_is_refused(store: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    file, offset, _ = bold_place(store, 0)
    flip(file, offset)
    with pytest.raises(UserError, match="differs from its checksum"):
        copy(store, tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.csv").exists()
    with pytest.raises(UserError, match="is the store itself"):
        copy(store, store)
    ingest(find_sources([made[1]])[:1], tmp_path / "other", RECIPE)
    with pytest.raises(UserError, match="holds another store"):
        copy(made[0], tmp_path / "other")


def test_export_comes_back(made: tuple[Path, Path], tmp_path: Path) -> None:
    """NIfTI out, read by nibabel: values, affine, TR. Ingested again: the same mask and, to a code step, values."""
    store = Store(made[0])
    bold, mask = export_scan(store, 1, tmp_path / "out")
    image = nib.load(bold)
    np.testing.assert_array_equal(image.affine, store.affine(1))
    assert image.header.get_zooms() == (4.0, 4.0, 4.0, 2.0)
    assert image.header.get_xyzt_units() == ("mm", "sec")
    data, brain = image.get_fdata(dtype=np.float32), store.mask(1)
    np.testing.assert_array_equal(nib.load(mask).get_fdata() > 0, brain)
    np.testing.assert_array_equal(data[brain].T, store.values(1))
    assert (data[~brain] == 0).all()
    again = prepare(Source("x", bold, "x", mask=mask), RECIPE)
    np.testing.assert_array_equal(again.mask, brain)
    np.testing.assert_allclose(again.header.affine, store.affine(1), atol=1e-5)
    np.testing.assert_array_equal(again.bold, store.values(1))

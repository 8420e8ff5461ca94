"""Where grids lie: boxes of templates, and what refuses scans that are not in one space."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from swift.data.clips.mixture import Stores
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.ingest.sources import Source
from swift.data.store.format import decode_manifest, encode_json
from swift.data.store.reader import Store, StoreWriter
from swift.data.store.spaces import OWN, TEMPLATES, box_affine, placement_of
from swift.utils.errors import UserError
from tests.data import scans
from tests.data.stores import GRID, build, scan

RECIPE = Recipe(grid=(24, 24, 24), spacing=4.0)
MNI = "MNI152NLin2009cAsym"


def source(folder: Path, name: str, brain: np.ndarray | None = None, space: str | None = MNI, code: int = 2) -> Source:
    brain = scans.ellipsoid() if brain is None else brain
    path = scans.save(folder / f"{name}.nii.gz", scans.bold(4, seed=len(name)))
    mask = scans.save(folder / f"{name}_mask.nii.gz", brain, dtype=np.uint8)
    if code != 2:
        image = nib.load(path)
        image.set_sform(image.affine, code=code)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    return Source(name, path, name, mask=mask, space=space)


def as_version_1(path: Path) -> Path:
    """Make a small store of today say what one of format version 1 said; what is in its shards stays."""
    told = json.loads((path / "store.json").read_text())
    told = {name: value for name, value in told.items() if name not in ("placement", "spaces", "xxh3_64")}
    (path / "store.json").write_bytes(encode_json(told | {"format_version": 1}))
    return path


@pytest.mark.parametrize(("grid", "spacing"), [((96, 96, 96), 2.0), ((48, 48, 48), 4.0), ((64, 77, 65), 3.0)])
def test_a_box_lies_around_the_middle_on_whole_multiples(grid: tuple[int, ...], spacing: float) -> None:
    affine = box_affine("MNI152", grid, spacing)
    np.testing.assert_array_equal(affine[:3, :3], np.diag([spacing] * 3))
    np.testing.assert_array_equal(affine[:3, 3] % spacing, 0)
    middle = affine[:3, 3] + (np.asarray(grid) - 1) / 2 * spacing
    assert np.abs(middle - TEMPLATES[0].centre).max() <= spacing / 2


def test_the_middle_of_the_box_is_that_of_the_brain() -> None:
    """Against the mask of the template that nilearn ships; all of it fits into 96 voxels of 2 mm."""
    from nilearn.datasets import load_mni152_brain_mask

    image = load_mni152_brain_mask(resolution=1)
    world = np.argwhere(np.asarray(image.dataobj) > 0) @ image.affine[:3, :3].T + image.affine[:3, 3]
    np.testing.assert_allclose((world.min(0) + world.max(0)) / 2, TEMPLATES[0].centre)
    voxels = (world - box_affine("MNI152", (96, 96, 96), 2.0)[:3, 3]) / 2
    assert voxels.min() >= 0
    assert voxels.max() <= 95


def test_names() -> None:
    assert {placement_of(name) for name in (MNI, "MNI152NLin6ASym", "MNI", "MNI305")} == {"MNI152"}
    assert {placement_of(name) for name in ("T1w", "", "UNCInfant")} == {OWN}


def test_scans_of_a_template_share_a_box_whatever_their_masks(tmp_path: Path) -> None:
    """A brain without its lower slices, and one with a stray voxel, stay where they are; on own masks they do not."""
    cut, stray = scans.ellipsoid(), scans.ellipsoid()
    cut[:, :, :4] = False
    stray[8, 0, 7] = True
    brains = {"whole": None, "cut": cut, "stray": stray}
    own = [prepare(source(tmp_path, name, brain, None), RECIPE).header for name, brain in brains.items()]
    assert len({header.affine.tobytes() for header in own}) == 3
    assert {(header.space, header.placement) for header in own} == {("", OWN)}
    template = [prepare(source(tmp_path, name, brain), RECIPE) for name, brain in brains.items()]
    for ready in template:
        np.testing.assert_array_equal(ready.header.affine, box_affine("MNI152", (24, 24, 24), 4.0))
        assert (ready.header.space, ready.header.placement) == (MNI, "MNI152")
        assert f"space {MNI}: grid in the fixed box of MNI152" in ready.header.notes
    world = np.argwhere(template[0].mask) @ np.diag([4.0] * 3) + template[0].header.affine[:3, 3]
    brain = np.argwhere(scans.ellipsoid()) @ scans.AFFINE[:3, :3].T + scans.AFFINE[:3, 3]
    np.testing.assert_allclose(world.mean(0), brain.mean(0), atol=0.5)


def test_the_code_of_the_header_counts_where_no_name_does(tmp_path: Path) -> None:
    header = prepare(source(tmp_path, "a", space=None, code=4), RECIPE).header
    assert (header.space, header.placement) == ("MNI", "MNI152")
    assert any("which of them is not said" in note for note in header.notes)
    header = prepare(source(tmp_path, "b", space="T1w", code=4), RECIPE).header
    assert (header.space, header.placement) == ("T1w", OWN)


def test_a_store_holds_one_kind_and_says_which(tmp_path: Path) -> None:
    report = ingest([source(tmp_path, "a"), source(tmp_path, "b", space="MNI152NLin6Asym")], tmp_path / "s", RECIPE)
    assert report.exit_code == 0
    store = Store(tmp_path / "s")
    assert (store.version, store.placement, store.spaces) == (2, "MNI152", (MNI, "MNI152NLin6Asym"))
    assert [store.attributes(place)["space"] for place in (0, 1)] == [MNI, "MNI152NLin6Asym"]
    with pytest.raises(UserError, match=r"two kinds of space .* 1 scans in MNI.*; 1 scans in T1w .*--space"):
        ingest([source(tmp_path, "c"), source(tmp_path, "d", space="T1w")], tmp_path / "t", RECIPE)
    assert not (tmp_path / "t").exists()
    other = ingest([source(tmp_path, "e", space="T1w")], tmp_path / "s", RECIPE)
    assert "two kinds of space do not go into one store" in other.results[0].reason
    with pytest.raises(UserError, match="use another folder"):
        StoreWriter(tmp_path / "s", (24, 24, 24), 4.0)
    # Of scans whose names do not tell, the first header decides; one of another kind is left out by name.
    mixed = [source(tmp_path, "f", space=None, code=4), source(tmp_path, "g", space=None)]
    report = ingest(mixed, tmp_path / "u", RECIPE)
    assert [row.status for row in report.results] == ["added", "failed"]
    assert Store(tmp_path / "u").placement == "MNI152"


def placed(path: Path, placement: str, numbers: list[int]) -> Path:
    with StoreWriter(path, GRID, 2.0, placement=placement) as writer:
        for number in numbers:
            header, mask, bold = scan(number)
            writer.add(replace(header, placement=placement), mask, bold)
    return path


def test_comparing_voxel_by_voxel_wants_one_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Stores([placed(tmp_path / "a", "MNI152", [0, 1])]).check_one_space([0, 1], "a mean")
    own = placed(tmp_path / "b", OWN, [2, 3])
    with pytest.raises(UserError, match=r"a mean compares scans voxel by voxel, .* not in one space: .*b \(own mask\)"):
        Stores([own]).check_one_space([0, 1], "a mean")
    Stores([own]).check_one_space([1], "a mean")
    assert not caplog.records
    both = Stores([tmp_path / "a", own])
    assert both.placements == ["MNI152", OWN]
    assert "stores of several spaces are mixed" in caplog.text
    both.check_one_space([0, 1], "a mean")
    with pytest.raises(UserError, match="not in one space"):
        both.check_one_space([0, 2], "a mean")


def test_version_1_is_read_with_a_warning_where_it_matters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = as_version_1(build(tmp_path / "s", [0, 1]))
    store = Store(path)
    assert (store.version, store.placement, store.spaces) == (1, OWN, ())
    assert store.values(0).shape == (24, store.scans[0].voxels)
    with caplog.at_level(logging.WARNING):
        Stores([path]).check_one_space([0, 1], "a mean")
    assert "made by format version 1" in caplog.text
    assert "swift.data place" in caplog.text
    with pytest.raises(UserError, match=r"format version 1; .*swift\.data place"):
        StoreWriter(path, GRID, 2.0)


def test_a_store_that_plain_h5py_has_open_is_read(tmp_path: Path) -> None:
    path = build(tmp_path / "s", [0])
    shard = decode_manifest(path / "manifest.csv")[0].shard
    with h5py.File(path / "shards" / shard) as file:  # as docs/store.md shows
        want = file["scans"]["sub-00_task-rest"]["bold"][0]
        np.testing.assert_array_equal(Store(path).read(0, 0, 1)[0], want)

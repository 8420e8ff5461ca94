"""Scans into a store: values, orientation, bad scans, stopping and going on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from swift.data.ingest import pipeline as ingest_module
from swift.data.ingest.bids import find_sources
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe, prepare
from swift.data.ingest.sources import Source
from swift.data.store.reader import Store, StoreWriter
from swift.utils.errors import BadScan, UserError
from tests.data import scans
from tests.forked import Forked, as_command, python_m
from tests.runs import environment

RECIPE = Recipe(grid=(24, 24, 24), spacing=4.0)


def one(tmp_path: Path, name: str = "a", seed: int = 0, frames: int = 8) -> Source:
    path = scans.save(tmp_path / "in" / f"{name}.nii.gz", scans.bold(frames, seed=seed))
    mask = scans.save(tmp_path / "in" / f"{name}_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    return Source(name, path, f"sub-{name}", mask=mask)


def shard_bytes(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((store / "shards").iterdir())}


def test_values_come_through(tmp_path: Path) -> None:
    """Same spacing: the store holds the source's own values at the same world places, to half a step of its code."""
    report = ingest([one(tmp_path)], tmp_path / "s", RECIPE)
    assert (report.exit_code, len(report.having("added"))) == (0, 1)
    store = Store(tmp_path / "s")
    data, values = scans.bold(), store.values(0)
    places = np.argwhere(store.mask(0))
    source = np.linalg.inv(scans.AFFINE) @ store.affine(0) @ np.c_[places, np.ones(len(places))].T
    x, y, z = np.round(source[:3]).astype(int)
    np.testing.assert_allclose(source[:3], [x, y, z], atol=1e-5)
    assert scans.ellipsoid()[x, y, z].all()
    assert len(places) == scans.ellipsoid().sum()
    want = data[x, y, z].T
    bound = (want.max(0) - want.min(0)) / 65534 / 2
    assert (np.abs(values - want) <= bound * 1.01 + 1e-4).all()
    assert store.scans[0].tr == 2.0


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "SRP"])
@pytest.mark.parametrize("angle", [0.0, 0.25])
def test_a_marker_comes_back_at_its_place_in_the_world(tmp_path: Path, codes: str, angle: float) -> None:
    """A bright spot on the right, in front, above: it must not change sides, whatever the order of the voxels."""
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ scans.AFFINE
    data = scans.bold()
    spot = np.array([11, 13, 8])
    data[tuple(spot)] += 5000
    where = affine[:3, :3] @ spot + affine[:3, 3]
    path = scans.save(tmp_path / "m.nii.gz", data, affine, codes)
    mask = scans.save(tmp_path / "m_mask.nii.gz", scans.ellipsoid(), affine, codes, dtype=np.uint8)
    ready = prepare(Source("m", path, "m", mask=mask), Recipe(grid=(40, 40, 40), spacing=2.0))
    brightest = np.argwhere(ready.mask)[ready.bold.mean(0).argmax()]
    found = ready.header.affine[:3, :3] @ brightest + ready.header.affine[:3, 3]
    assert np.linalg.norm(found - where) <= np.sqrt(3)  # half the diagonal of a 2 mm voxel
    np.testing.assert_array_equal(ready.header.affine[:3, :3], np.diag([2.0, 2.0, 2.0]))
    assert any("brought to RAS+" in note for note in ready.header.notes) == (codes != "RAS")


def test_nan_and_constant_voxels_are_counted_and_masked_out(tmp_path: Path) -> None:
    data = scans.bold()
    data[8, 10, 7, 3] = np.nan
    data[8, 10, 8, :] = 500.0
    source = one(tmp_path)
    scans.save(source.path, data)
    ready = prepare(source, RECIPE)
    assert (ready.header.nan_voxels, ready.header.flat_voxels) == (1, 1)
    assert ready.mask.sum() == scans.ellipsoid().sum() - 2
    notes = " ".join(ready.header.notes)
    assert "1 of 1824 brain voxels hold NaN" in notes.replace(str(scans.ellipsoid().sum()), "1824")
    assert "hold constant values" in notes
    data[..., 2] = np.nan
    scans.save(source.path, data)
    with pytest.raises(BadScan, match="frames without a finite value: 2 of 8"):
        prepare(source, RECIPE)


def test_missing_mask_is_computed_and_said(tmp_path: Path) -> None:
    shape = (40, 44, 36)
    path = scans.save(tmp_path / "n.nii.gz", scans.bold(3, shape))
    ready = prepare(Source("n", path, "n"), replace(RECIPE, grid=(48, 48, 48)))
    assert any(note.startswith("no brain mask given: computed") for note in ready.header.notes)
    assert ready.mask.sum() == pytest.approx(scans.ellipsoid(shape).sum(), rel=0.05)


def test_a_bad_scan_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = one(tmp_path, "bad")
    bad.path.write_bytes(bad.path.read_bytes()[:3000])
    wrong = replace(one(tmp_path, "wrong"), mask=scans.save(tmp_path / "w.nii.gz", np.ones((4, 5, 6)), dtype=np.uint8))
    gone = replace(one(tmp_path, "gone"), path=tmp_path / "none.nii.gz")
    twice = [one(tmp_path, "twice"), replace(one(tmp_path, "other"), scan_id="twice")]
    report = ingest([bad, one(tmp_path, "good"), wrong, gone, *twice], tmp_path / "s", RECIPE)
    assert report.exit_code == 1
    assert [scan.scan_id for scan in Store(tmp_path / "s").scans] == ["good"]
    reasons = {row.source: row.reason for row in report.having("failed")}
    assert "truncated" in reasons[str(bad.path)]
    assert "another grid" in reasons[str(wrong.path)]
    assert "no such file" in reasons[str(gone.path)]
    for source in twice:
        assert all(str(other.path) in reasons[str(source.path)] for other in twice)
    saved = json.loads((tmp_path / "s" / "ingest_report.json").read_text())
    assert {row["scan_id"]: row["status"] for row in saved["scans"]} == {
        "bad": "failed", "good": "added", "gone": "failed", "twice": "failed", "wrong": "failed"
    }  # fmt: skip
    with (tmp_path / "s" / "ingest_report.csv").open() as stream:
        assert {row["scan_id"]: row["reason"] for row in csv.DictReader(stream)}["bad"] == reasons[str(bad.path)]


def test_going_on_leaves_what_is_there_and_mends_what_failed(tmp_path: Path) -> None:
    sources = [one(tmp_path, name, seed) for seed, name in enumerate("abc")]
    whole = sources[1].path.read_bytes()
    sources[1].path.write_bytes(whole[:2000])
    first = ingest(sources, tmp_path / "s", RECIPE)
    assert [row.status for row in first.results] == ["added", "failed", "added"]
    sources[1].path.write_bytes(whole)
    second = ingest(sources, tmp_path / "s", RECIPE)
    assert [row.status for row in second.results] == ["present", "added", "present"]
    assert second.exit_code == 0
    assert second.results[0].frames == 8  # kept from the first report
    assert [scan.scan_id for scan in Store(tmp_path / "s").scans] == ["a", "c", "b"]
    assert Store(tmp_path / "s").values(1).mean() == pytest.approx(1000, abs=2)


def test_a_source_that_has_changed_since_is_named(tmp_path: Path) -> None:
    sources = [one(tmp_path, name, seed) for seed, name in enumerate("ab")]
    ingest(sources, tmp_path / "s", RECIPE)
    before = shard_bytes(tmp_path / "s")
    os.utime(sources[0].path)  # another date, the same bytes
    assert [row.status for row in ingest(sources, tmp_path / "s", RECIPE).results] == ["present", "present"]
    sources[1].path.write_bytes(sources[0].path.read_bytes())
    for _ in range(2):  # the second time the line of the first must still tell
        again = ingest(sources, tmp_path / "s", RECIPE)
        assert [row.status for row in again.results] == ["present", "changed"]
        assert again.results[1].reason == (
            f"{sources[1].path.name} has changed since; the store has the old scan: use another folder"
        )
        assert again.exit_code == 1
    assert shard_bytes(tmp_path / "s") == before


def test_two_workers_give_the_bytes_of_one(tmp_path: Path) -> None:
    sources = [one(tmp_path, name, seed) for seed, name in enumerate("abc")]
    ingest(sources, tmp_path / "one", RECIPE, workers=1)
    ingest(list(reversed(sources)), tmp_path / "two", RECIPE, workers=2)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert (tmp_path / "one" / "manifest.csv").read_bytes() == (tmp_path / "two" / "manifest.csv").read_bytes()


def killed_after(scans: int, words: list[str]) -> None:
    """`python -m swift.data`, which kills itself with the scan after these in hand."""
    add, left = StoreWriter.add, [scans]

    def last(*args: Any) -> Any:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return add(*args)

    StoreWriter.add = last  # type: ignore[method-assign]
    as_command("swift.data", *words)


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_store(tmp_path: Path) -> None:
    """kill -9 with a scan in hand, twice; then to the end: the bytes of an undisturbed run."""
    dataset = scans.dataset(tmp_path / "d", subjects=5)
    words = ["ingest", str(dataset), "--out", str(tmp_path / "s")]
    words += ["--grid", "24", "--spacing", "4", "--workers", "1", "--quiet"]
    for more, whole in ((1, 1), (2, 3)):  # scans staged by this start and by all
        killed = Forked(killed_after, more, words, cwd=tmp_path, env=environment())
        assert killed.wait() == -signal.SIGKILL, killed.stderr
        assert len(list((tmp_path / "s" / "staging").glob("[!.]*.h5"))) == whole
    done = python_m("swift.data", *words, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    ingest(find_sources([dataset]), tmp_path / "whole", RECIPE)
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "whole")
    assert (tmp_path / "s" / "manifest.csv").read_bytes() == (tmp_path / "whole" / "manifest.csv").read_bytes()


def test_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [one(tmp_path, name, seed) for seed, name in enumerate("ab")]
    add = ingest_module.StoreWriter.add

    def full(self: object, header: object, mask: object, bold: object) -> object:
        if header.scan_id == "b":  # type: ignore[attr-defined]
            raise UserError("cannot be written: No space left on device")
        return add(self, header, mask, bold)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ingest_module.StoreWriter, "add", full)
        with pytest.raises(UserError, match="No space left"):
            ingest(sources, tmp_path / "s", RECIPE)
    report = ingest(sources, tmp_path / "s", RECIPE)
    assert [row.status for row in report.results] == ["present", "added"]
    ingest(sources, tmp_path / "whole", RECIPE)
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "whole")


def test_memory_stays_under_one_scan(tmp_path: Path) -> None:
    """Peak of one more scan, in a process of its own, is below the scan's dense float32 size on the grid."""
    frames, grid = 120, 64
    path = scans.save(tmp_path / "big.nii.gz", np.repeat(scans.bold(4), frames // 4, axis=3), dtype=np.int16)
    mask = scans.save(tmp_path / "big_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    code = f"""
import re
from pathlib import Path
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.ingest.sources import Source
# Not ru_maxrss: a process takes over that of the one that started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
source = Source("big", Path({str(path)!r}), "b", mask=Path({str(mask)!r}))
ingest([source], {str(tmp_path / "s")!r}, Recipe(({grid},) * 3, 1.0))
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 4 * frames * grid**3


def test_tr_resampling(tmp_path: Path) -> None:
    source = one(tmp_path, frames=9)
    ready = prepare(source, replace(RECIPE, tr_resample=4.0))
    assert ready.header.tr == 4.0
    assert len(ready.bold) == 5
    assert any("TR 2 s resampled to 4 s: 9 frames became 5" in note for note in ready.header.notes)
    ingest([source], tmp_path / "s", RECIPE)
    with pytest.raises(UserError, match="--tr-resample None, not 4"):
        ingest([source], tmp_path / "s", replace(RECIPE, tr_resample=4.0))


def test_v1_frames(tmp_path: Path) -> None:
    """SwiFT v1: float16 frames, background of one value. Brain = what changes; no resampling; nothing unpickled."""
    data, brain = scans.bold(4), scans.ellipsoid()
    data[~brain] = -3.0
    folder = tmp_path / "v1" / "img" / "sub1"
    folder.mkdir(parents=True)
    for t in range(4):
        torch.save(torch.from_numpy(data[..., t]).half()[..., None], folder / f"frame_{t}.pt")
    (source,) = find_sources([tmp_path / "v1"])
    assert (source.scan_id, source.subject) == ("sub1", "sub1")
    with pytest.raises(BadScan, match="give --tr"):
        prepare(source, RECIPE)
    ready = prepare(source, replace(RECIPE, tr=0.8))
    assert ready.mask.sum() == brain.sum()
    np.testing.assert_array_equal(ready.bold[2], data[..., 2].astype(np.float16)[brain].astype(np.float32))
    assert any("no affine: RAS+ and 4 mm assumed" in note for note in ready.header.notes)
    torch.save(ready, folder / "frame_2.pt")  # a pickle that would run code of any class
    with pytest.raises(BadScan, match=r"sub1/frame_2\.pt: not a plain tensor file"):
        prepare(source, replace(RECIPE, tr=0.8))
    (folder / "frame_2.pt").unlink()
    with pytest.raises(BadScan, match=r"frame_2\.pt is missing among 3 frames"):
        prepare(source, replace(RECIPE, tr=0.8))


def test_mistakes(tmp_path: Path) -> None:
    source = one(tmp_path)
    (tmp_path / "file").write_text("")
    cases = [
        (lambda: ingest([source], tmp_path / "file" / "s", RECIPE), "cannot be made a store"),
        (lambda: ingest([], tmp_path / "s", RECIPE), "no scans"),
        (lambda: ingest([source], tmp_path / "s", replace(RECIPE, spacing=0.0)), "spacing 0 mm"),
        (lambda: ingest([source], tmp_path / "s", replace(RECIPE, grid=(1, 2, 3))), "grid"),
        (lambda: ingest([source], tmp_path / "s", replace(RECIPE, tr=2000.0)), "--tr 2000"),
        (lambda: ingest([source], tmp_path / "s", RECIPE, workers=0), "workers 0"),
    ]
    for run, words in cases:
        with pytest.raises(UserError, match=words):
            run()


def test_a_brain_larger_than_the_grid_is_said(tmp_path: Path) -> None:
    ready = prepare(one(tmp_path), replace(RECIPE, grid=(10, 24, 24)))
    assert any("of the brain lies outside the (10, 24, 24) grid" in note for note in ready.header.notes)
    image = nib.load(one(tmp_path).path)
    assert image.shape[:3] == scans.SHAPE

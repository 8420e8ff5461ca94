"""The store: what comes back, what is found broken, what a reader refuses. Writing and kills: test_writer.py."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from swift.data.store.format import encode_json
from swift.data.store.reader import KINDS, CorruptData, Store
from swift.data.store.stats import LEVELS, fold, quantize, summarize, voxel_code
from swift.utils.errors import BadScan, UserError
from tests.data.stores import build, forget_sizes, scan

NUMBERS = [3, 1, 4, 0, 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("data") / "store", NUMBERS)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return build(tmp_path / "store", NUMBERS)


# ------------------------------------------------------------------------------------------------- int16 codes
@settings(max_examples=200)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=12),
    st.sampled_from([0.0, 1.0, 1e4, -3e6]),
)
def test_error_bound_of_the_codes(values: list[float], offset: float) -> None:
    x = (np.array(values, np.float32) + np.float32(offset)).astype(np.float32)[:, None]
    low, high = x.min(0).astype(np.float64), x.max(0).astype(np.float64)
    scale, centre = voxel_code(low, high)
    codes = quantize(x, scale, centre)
    assert codes.dtype == np.dtype("<i2")
    assert np.abs(codes.astype(int)).max() <= LEVELS
    exact = codes.astype(np.float64) * scale.astype(np.float64) + centre.astype(np.float64)
    error = np.abs(exact - x).max()
    assert error <= scale[0] / 2 * (1 + 1e-9)
    # The bound in the values' own terms; the second addend is what float32 costs where it cannot hold the middle.
    spacing = np.spacing(np.abs(x).max())
    assert error <= ((high - low)[0] + spacing) / 65534 / 2 * (1 + 1e-6) + 1e-45


def test_error_bound_on_bold_like_values() -> None:
    _, _, bold = scan(0, frames=200)
    code = summarize(bold)
    back = quantize(bold, code.scale, code.offset) * code.scale + code.offset  # float32, as readers do it
    span = bold.max(0).astype(float) - bold.min(0)
    assert (np.abs(back - bold) <= span / 65534 / 2 + 1.5 * np.spacing(bold)).all()


def test_statistics_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, bold = scan(5, frames=37)
    monkeypatch.setattr("swift.data.store.stats.BLOCK_BYTES", 8 * 37 * 11)  # many blocks of 11 voxels
    got = summarize(bold)
    x = bold.astype(np.float64)
    first, median, third = np.percentile(x, [25, 50, 75], axis=0)
    want = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0), "median": median}
    for name, array in (want | {"iqr": third - first}).items():
        np.testing.assert_allclose(got.voxel[name], array, rtol=1e-6, atol=1e-6, err_msg=name)
    assert got.voxel["std"][1] == 0
    assert got.voxel["mean"][1] == np.float32(77.25)
    assert got.constant == 1
    assert got.brain["global_mean"] == pytest.approx(x.mean(), rel=1e-12)
    assert got.brain["global_std"] == pytest.approx(x.std(), rel=1e-10)
    assert (got.brain["global_min"], got.brain["global_max"]) == (x.min(), x.max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    _, _, bold = scan(0)
    bold[3, 5] = bad
    with pytest.raises(BadScan, match="NaN or infinite"):
        summarize(bold)


def test_normalizers_against_their_definitions(made: Path) -> None:
    store = Store(made)
    _, _, bold = scan(4)
    x = bold.astype(np.float64)
    first, median, third = np.percentile(x, [25, 50, 75], axis=0)
    with np.errstate(all="ignore"):
        want = {
            "zscore_voxel": (x - x.mean(0)) / x.std(0),
            "zscore_global": (x - x.mean()) / x.std(),
            "percent": 100 * (x - x.mean(0)) / x.mean(0),
            "minmax": (x - x.min()) / (x.max() - x.min()),
            "robust": (x - median) / ((third - first) / 1.3489795),
        }
    place = store.find("sub-04_task-rest")
    q = store.read(place, 0, 24)
    assert set(want) | {"none"} == set(KINDS)
    for kind, values in want.items():
        values[:, 1] = 0  # the constant voxel
        a, b = store.normalizer(place, kind)
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(q * a + b, values, atol=2e-3 if kind == "robust" else 3e-4, err_msg=kind)
        assert not (q * a + b)[:, 1].any()
    np.testing.assert_allclose(store.values(place), bold, atol=2e-3)


def test_percent_change_needs_a_baseline() -> None:
    _, _, bold = scan(0)
    code = summarize((bold - bold.mean(0)).astype(np.float32))
    with pytest.raises(UserError, match="zscore_voxel"):
        fold("percent", code.scale, code.offset, code.voxel, code.brain)
    with pytest.raises(UserError, match="zscore_voxel, zscore_global, percent, minmax, robust, none"):
        fold("zscore", code.scale, code.offset, code.voxel, code.brain)


# ------------------------------------------------------------------------------------------------------ reading
def test_manifest_and_attributes(made: Path) -> None:
    store = Store(made)
    assert [s.scan_id for s in store.scans] == [f"sub-{n:02d}_task-rest" for n in range(5)]
    one = store.scans[3]
    assert (one.subject, one.task, one.site, one.frames, one.tr) == ("03", "rest", "B", 24, 0.72)
    assert one.phenotypes == {"age": "23", "sex": "F"}
    assert one.voxels == int(scan(3)[1].sum())
    assert len({s.shard for s in store.scans}) > 1  # several shards, several scans in one
    assert len({s.shard for s in store.scans}) < 5
    np.testing.assert_array_equal(store.affine(3), scan(3)[0].affine)
    assert json.loads(store.attributes(3)["notes"]) == ["TR taken from the sidecar", "µ"]
    np.testing.assert_array_equal(store.mask(3), scan(3)[1])
    np.testing.assert_array_equal(store.indices(3), np.flatnonzero(scan(3)[1].ravel()))


def test_a_shard_is_plain_hdf5(made: Path) -> None:
    """Everything that README tells a reader in another language, with h5py alone."""
    info = Store(made).scans[2]
    header, mask, bold = scan(2)
    with h5py.File(made / "shards" / info.shard, "r") as file:
        group = file["scans"][info.scan_id]
        assert group["bold"].dtype == np.dtype("<i2")
        assert group["bold"].chunks is None
        assert group["bold"].id.get_offset() % 8 == 0
        values = group["bold"][...] * group["scale"][...] + group["offset"][...]
        np.testing.assert_allclose(values, bold, atol=2e-3)
        np.testing.assert_array_equal(group["mask"][...].astype(bool), mask)
        hashes = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in group["bold"][...]]
        assert group["checksum"][...].tolist() == hashes
        np.testing.assert_array_equal(group.attrs["affine"], header.affine)
        assert (group.attrs["orientation"], group.attrs["tr"]) == (b"RAS", 0.72)
        assert group.attrs["tool_version"]
        assert group.attrs["source"] == b"sub-02.nii.gz"


@settings(max_examples=60)
@given(data=st.data())
def test_read_equals_slicing(made: Path, data: st.DataObject) -> None:
    store = Store(made)
    place = data.draw(st.integers(0, 4))
    start = data.draw(st.integers(0, 23))
    stop = data.draw(st.integers(start + 1, 24))
    step = data.draw(st.integers(1, 5))
    with h5py.File(made / "shards" / store.scans[place].shard, "r") as file:
        want = file["scans"][store.scans[place].scan_id]["bold"][start:stop:step]
    out = np.full(want.shape, 12345, np.int16)
    got = store.read(place, start, stop, step, out=out, verify=True)
    assert got is out
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(store.read(place, start, stop, step), want)


@pytest.mark.parametrize("frames", [(-1, 3, 1), (0, 25, 1), (5, 5, 1), (0, 5, 0)])
def test_frames_outside_the_scan(made: Path, frames: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="it has frames 0:24"):
        Store(made).read(0, *frames)
    with pytest.raises(UserError, match="no scan 'sub-99'"):
        Store(made).find("sub-99")


def test_handles_do_not_cross_processes(made: Path) -> None:
    store = Store(made)
    want = store.read(0, 0, 5)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.read(0, 0, 5), want)
    parent = store._shard(store.scans[0].shard).handle
    child = os.fork()
    if child == 0:  # the child must not use, or close, the parent's handle
        good = np.array_equal(store.read(0, 0, 5, verify=True), want)
        os._exit(0 if good and store._shard(store.scans[0].shard).handle != parent else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(store.read(0, 0, 5), want)
    store.close()
    np.testing.assert_array_equal(store.read(0, 0, 5), want)


def test_tables_and_few_handles(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift.data.store.shards.OPEN_SHARDS", 1)
    store = Store(made)
    for place in [0, 4, 2, 0, 3, 1, 4]:
        store.read(place, 0, 2, verify=True)
        table = store.table(place, "zscore_voxel")
        np.testing.assert_array_equal(table[0], np.flatnonzero(scan(place)[1]))
        np.testing.assert_array_equal(table[1:].view(np.float32), Store(made).normalizer(place, "zscore_voxel"))
        assert len(store._shards) == 1


# ------------------------------------------------------------------------------------------------------- damage
def flip(file: Path, place: int, bit: int = 0) -> None:
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ (1 << bit)]))


def test_a_flipped_bit_is_named(own: Path) -> None:
    store = Store(own)
    assert all(store.check(place) == [] for place in range(5))
    info, place = store.scans[2], store._layout(2).bold
    flip(own / "shards" / info.shard, place + 2 * info.voxels * 7 + 3)
    assert store.read(2, 0, 7, verify=True).shape == (7, info.voxels)
    with pytest.raises(CorruptData, match=rf"{info.shard}.*{info.scan_id}, frame 7") as caught:
        store.read(2, 1, 20, 2, verify=True)
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes out of a process pool
    assert (again.shard, again.scan, again.frame) == (info.shard, info.scan_id, 7)
    assert [(d.part, d.frame) for d in Store(own).check(2)] == [("bold", 7)]
    assert Store(own).check(1) == []


def test_every_random_flip_is_found(own: Path) -> None:
    rng = np.random.default_rng(0)
    shards = sorted((own / "shards").iterdir())
    for _ in range(150):
        shard = shards[rng.integers(len(shards))]
        place, bit = int(rng.integers(shard.stat().st_size)), int(rng.integers(8))
        flip(shard, place, bit)
        assert Store(own).check_file(shard.name), (shard, place)
        flip(shard, place, bit)
        assert not Store(own).check_file(shard.name)


def test_flips_in_the_arrays_are_named_by_part(own: Path) -> None:
    info = Store(own).scans[1]
    shard = own / "shards" / info.shard
    with h5py.File(shard, "r") as file:
        group = file["scans"][info.scan_id]
        spots = {name: group[name].id.get_offset() for name in ("mask", "scale", "offset", "stats/median", "checksum")}
    for part, place in spots.items():
        flip(shard, place + 1)
        assert part in {damage.part for damage in Store(own).check(1)}, part
        flip(shard, place + 1)
    raw = shard.read_bytes()
    flip(shard, raw.index(b"TR taken from", raw.index(b"TR taken from") + 1))  # the notes of the second scan in it
    assert [d.part for d in Store(own).check(1)] == ["header"]


# ----------------------------------------------------------------------------------------- what a reader refuses
def test_stores_that_cannot_be_read(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a swift store"):
        Store(tmp_path / "nothing")
    description = json.loads((own / "store.json").read_text())
    (own / "store.json").write_text(json.dumps(description | {"format_version": 3}))
    with pytest.raises(UserError, match="format version 3; this swift reads versions 1 and 2: update swift"):
        Store(own)
    (own / "store.json").write_text("{")
    with pytest.raises(UserError, match="not the description"):
        Store(own)
    (own / "store.json").write_bytes(encode_json(description))
    shard = own / "shards" / "00001.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"00001.h5: has {len(whole) - 1} bytes instead of {len(whole)}"):
        Store(own)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001.h5: this shard is missing"):
        Store(own)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("00000.h5", "../00000.h5", "line 2.*not legal"),
        ("sub-00_task-rest,", "sub-01_task-rest,", "line 3: a second scan sub-01_task-rest"),
        (",24,", ",many,", "must be numbers"),
        ("scan_id,", "name,", "no column scan_id"),
        (",0.72", "", "has not"),
    ],
)
def test_manifests_that_cannot_be_read(own: Path, old: str, new: str, message: str) -> None:
    manifest = own / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Store(own)


def _replace(own: Path, name: str, how: str) -> None:
    """Put something that reads elsewhere, or needs other code, in the place of a dataset or group."""
    info = Store(own).scans[0]
    with h5py.File(own / "shards" / info.shard, "r+") as file:
        group = file["scans"][info.scan_id]
        parent, key = (file["scans"], info.scan_id) if name == "scan" else (group, name)
        old = parent[key][...] if name != "scan" else None
        parent.move(key, "old")
        if how == "external link":
            parent[key] = h5py.ExternalLink("other.h5", "/x")
        elif how == "soft link":
            parent[key] = h5py.SoftLink("/scans/old")
        elif how == "virtual":
            layout = h5py.VirtualLayout(old.shape, old.dtype)
            layout[...] = h5py.VirtualSource("other.h5", "x", old.shape)
            parent.create_virtual_dataset(key, layout)
        elif how == "external bytes":
            parent.create_dataset(key, old.shape, old.dtype, external=[("/etc/hostname", 0, old.nbytes)])
        elif how == "filter":
            parent.create_dataset(key, data=old, chunks=old.shape, compression="gzip")
        elif how == "chunks":
            parent.create_dataset(key, data=old, chunks=old.shape)
        elif how == "kind":
            parent.create_dataset(key, data=old.astype(np.int32))
    forget_sizes(own)


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("bold", "external link", "bold is a ExternalLink"),
        ("scan", "external link", "is a ExternalLink"),
        ("scan", "soft link", "is a SoftLink"),
        ("mask", "soft link", "mask is a SoftLink"),
        ("bold", "virtual", "virtual dataset"),
        ("bold", "external bytes", "in another file"),
        ("scale", "external bytes", "in another file"),
        ("bold", "filter", "HDF5 filters"),
        ("bold", "chunks", "chunked"),
        ("bold", "kind", "should be int16 .* by the manifest"),
        ("mask", "filter", "HDF5 filters"),
    ],
)
def test_foreign_files_are_refused_by_name(own: Path, name: str, how: str, message: str) -> None:
    _replace(own, name, how)
    store = Store(own)
    with pytest.raises(UserError, match=rf"00000.h5.*{message}"):
        store.normalizer(0, "none")
    assert store.read(1, 0, 2, verify=True).shape[0] == 2  # the scan beside it is still good
    assert store.check(0)


def test_the_store_needs_neither_torch_nor_a_trainer() -> None:
    code = "import sys, swift.data.store.reader\n"
    code += "print({'torch', 'lightning', 'hydra', 'omegaconf', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

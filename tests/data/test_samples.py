"""The sample scans, with a small wheel of our own in place of the published one and no network."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from swift.config.schema_data import DataConfig
from swift.data import samples
from swift.data.ingest.prepare import Recipe
from swift.data.samples import CorruptDownload, SamplesUnavailable, Wheel, fetch_samples, pip_download, sample_store
from swift.data.store.reader import Store
from swift.utils.errors import UserError
from tests.data import scans
from tests.data.stores import PLAIN


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SWIFT_OFFLINE", raising=False)
    return tmp_path / "cache"


class Registry:
    """Answers like pip: leaves a wheel in the folder, the first `spoiled` times with a wrong byte."""

    def __init__(self, folder: Path, spoiled: int = 0) -> None:
        self.calls, self.spoiled = 0, spoiled
        made = folder / "made"
        happy = scans.save(made / "sub-HAPPYTEST.nii", scans.bold(4, (30, 34, 28)), dtype=np.int16)
        scans.patch(happy, sform_code=0, qform_code=0)
        data = happy.read_bytes()
        (made / "sub-HAPPYTEST.nii.gz").write_bytes(gzip.compress(data))
        scans.save(made / "sub-RAPIDTIDETEST.nii.gz", scans.bold(6), tr=1.5, dtype=np.int16)
        scans.save(made / "sub-RAPIDTIDETEST_brainmask.nii.gz", scans.ellipsoid(), dtype=np.float32)
        self.path = folder / "rapidtide-2.0.9-py2.py3-none-any.whl"
        with zipfile.ZipFile(self.path, "w") as archive:
            for name in samples.FILES:
                archive.write(made / name, f"{samples.FOLDER}/{name}")
        digests = {name: hashlib.sha256((made / name).read_bytes()).hexdigest() for name in samples.FILES}
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.wheel = Wheel(sha256=digest, files=tuple(digests.items()))

    def __call__(self, requirement: str, folder: Path) -> None:
        assert requirement == "rapidtide==2.0.9"
        self.calls += 1
        raw = bytearray(self.path.read_bytes())
        if self.calls <= self.spoiled:
            raw[len(raw) // 2] ^= 1
        (folder / self.path.name).write_bytes(raw)


def unreachable(requirement: str, folder: Path) -> None:
    raise SamplesUnavailable("no registry")


def config(**changes: object) -> DataConfig:
    fields: dict[str, object] = {
        **PLAIN,
        "name": "sample", "path": None, "grid": [24, 24, 24], "spacing": 4.0, "frames": 4, "frame_stride": 1,
        "clip_stride": 4, "normalization": "zscore_voxel", "background": 0.0, "batch_size": 1, "workers": 0,
        "val_fraction": 0.2, "val_gap": 1, "split": None, "verify": True,
    }  # fmt: skip
    return DataConfig(**{**fields, **changes})  # type: ignore[arg-type]


def test_fetched_once_and_cached(tmp_path: Path, cache: Path) -> None:
    registry = Registry(tmp_path)
    folder = fetch_samples(download=registry, wheel=registry.wheel)
    assert sorted(path.name for path in folder.iterdir()) == sorted(samples.FILES)  # the wheel is not kept
    assert folder.parent.parent == cache
    assert fetch_samples(download=unreachable, wheel=registry.wheel) == folder
    assert registry.calls == 1


def test_corrupt_download_is_fetched_again_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(tmp_path, spoiled=1)
    fetch_samples(download=registry, wheel=registry.wheel)
    assert registry.calls == 2
    assert "was corrupt: deleted, fetching again" in caplog.text


def test_corrupt_twice_is_a_clear_error(tmp_path: Path, cache: Path) -> None:
    registry = Registry(tmp_path, spoiled=5)
    with pytest.raises(CorruptDownload, match="arrived corrupt twice"):
        fetch_samples(download=registry, wheel=registry.wheel)
    assert registry.calls == 2
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    folder = fetch_samples(download=registry, wheel=registry.wheel)
    (folder / "sub-HAPPYTEST.nii.gz").write_bytes(b"spoiled")
    fetch_samples(download=registry, wheel=registry.wheel)
    assert registry.calls == 2


def test_offline_and_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    with pytest.raises(SamplesUnavailable, match="no registry"):
        fetch_samples(download=unreachable, wheel=registry.wheel)
    monkeypatch.setenv("SWIFT_OFFLINE", "1")
    with pytest.raises(SamplesUnavailable, match="SWIFT_OFFLINE"):
        fetch_samples(download=registry, wheel=registry.wheel)
    assert registry.calls == 0
    with pytest.raises(SamplesUnavailable):
        sample_store(config())


def test_pip_is_asked_for_a_wheel_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SamplesUnavailable, match=r"no registry that has rapidtide==2\.0\.9 .*No matching distribution"):
        pip_download("rapidtide==2.0.9", tmp_path)
    want = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "rapidtide==2.0.9"]
    assert asked[0][: len(want)] == want


def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match="SWIFT_CACHE"):
        sample_store(config())


def test_store_is_made_once_with_its_notes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tmp_path)
    fetch_samples(download=registry, wheel=registry.wheel)
    monkeypatch.setattr(samples, "Wheel", lambda: registry.wheel)
    caplog.set_level("INFO", logger="swift.data")
    path = sample_store(config())
    assert path.parent == cache / "stores"
    store = Store(path)
    assert [(scan.scan_id, scan.frames, scan.tr) for scan in store.scans] == [
        ("sub-HAPPYTEST", 4, 2.0),
        ("sub-RAPIDTIDETEST", 6, 1.5),
    ]
    for text in (store.attributes(0)["notes"], caplog.text):
        assert "no orientation code in the header" in text
        assert "LAS assumed" in text
        assert "no brain mask given: computed" in text
    made = path.stat().st_mtime_ns
    monkeypatch.setattr(samples, "fetch_samples", unreachable)
    assert sample_store(config()) == path  # nothing is fetched or made again
    assert path.stat().st_mtime_ns == made
    with pytest.raises(UserError, match=r"another data\.path"):
        sample_store(config(path=str(path), spacing=2.0))


def test_other_parameters_are_another_store() -> None:
    names = {
        samples.store_name(Recipe(grid=(g, g, g), spacing=s), r) for r in (1, 2) for g in (48, 96) for s in (2.0, 4.0)
    }
    assert len(names) == 8
    assert all(name.startswith("sample-") for name in names)

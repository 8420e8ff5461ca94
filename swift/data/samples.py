"""The two real scans that swift is tried out on, taken from a wheel on the package registry, once.

The wheel (rapidtide 2.0.9, Apache-2.0) is a download of files, not a dependency: nothing of it is installed or run. The
files are checked against the hashes below, kept in the cache folder, and ingested into a store there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swift.config.schema_data import DataConfig
from swift.data.ingest.nifti import sha256_file
from swift.data.ingest.pipeline import ingest
from swift.data.ingest.prepare import Recipe
from swift.data.ingest.sources import Source
from swift.data.store import format as fmt
from swift.data.store.writer import tool_version
from swift.utils.cache import cache_dir, check_revision, only_here
from swift.utils.errors import UserError

log = logging.getLogger("swift.data")

REQUIREMENT = "rapidtide==2.0.9"
WHEEL_SHA256 = "d8d4639b372c7c53f18badf68e5704812f5fac1e6d449525203b3ada3d6b25d7"
WHEEL_MB = 99.8
FOLDER = "rapidtide/data/examples/src"
FILES = {
    "sub-RAPIDTIDETEST.nii.gz": "6d36e81652bab1275075562879433883cff8bd4a42cc9de54ee2c36a2a696ad6",
    "sub-RAPIDTIDETEST_brainmask.nii.gz": "fe30303668d6ca73986cba603a8362447c408849ed8f16089a75f7611e546bb8",
    "sub-HAPPYTEST.nii.gz": "e670ebe43980436c3490297f0a24677f6d2edf2ce38e3245a923f1ec2ccc101e",
}
"""Name in the wheel's folder -> SHA-256."""


class SamplesUnavailable(UserError):
    """The sample scans are not here and cannot be fetched (no registry, or offline by wish): use synthetic ones."""


class CorruptDownload(UserError):
    """What the registry sent twice is not the file that was published."""


@dataclass(frozen=True)
class Wheel:
    """What to fetch; a test puts a small one in its place."""

    requirement: str = REQUIREMENT
    sha256: str = WHEEL_SHA256
    folder: str = FOLDER
    files: tuple[tuple[str, str], ...] = tuple(FILES.items())


Downloader = Callable[[str, Path], None]
"""(requirement, folder): leave one .whl in the folder, or raise SamplesUnavailable."""


def pip_download(requirement: str, folder: Path) -> None:
    """Fetch a wheel with this Python's pip; no dependency, nothing built, nothing installed.

    Raises:
        SamplesUnavailable: pip is not there or reaches no registry.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", requirement]
    options = ["--dest", str(folder), "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=1800, check=False)
    except subprocess.TimeoutExpired as error:
        raise SamplesUnavailable(f"sample scans: no {requirement} within {error.timeout:g} s") from error
    if done.returncode != 0:
        if shutil.disk_usage(folder).free < 200e6:
            raise UserError(f"{folder}: {WHEEL_MB:g} MB are to be fetched and the disk is nearly full; set SWIFT_CACHE")
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        reason = lines[-1].strip()
        raise SamplesUnavailable(f"sample scans: pip reached no registry that has {requirement} ({reason})")


def fetch_samples(cache: Path | None = None, download: Downloader = pip_download, wheel: Wheel | None = None) -> Path:
    """The folder with the verified sample files, fetched when they are not there.

    Args:
        cache: Cache folder; None: swift's.
        download: Gets the wheel.
        wheel: What to get; None: the published one.

    Raises:
        SamplesUnavailable: not cached, and offline (SWIFT_OFFLINE=1) or no registry reachable.
        CorruptDownload: wrong bytes twice.
        UserError: the cache folder cannot be written.
    """
    wheel = wheel or Wheel()
    folder = (cache or cache_dir()) / "samples" / wheel.requirement.replace("==", "-")
    with only_here(folder):
        if _verified(folder, wheel):
            return folder
        if os.environ.get("SWIFT_OFFLINE", "") not in ("", "0"):
            raise SamplesUnavailable("sample scans: not in the cache, and SWIFT_OFFLINE is set")
        log.info("fetching the sample scans: %s, %.1f MB, once, into %s", wheel.requirement, WHEEL_MB, folder)
        for attempt in (1, 2):
            if _fetch(folder, wheel, download):
                return folder
            if attempt == 1:
                log.warning("the download of %s was corrupt: deleted, fetching again", wheel.requirement)
    raise CorruptDownload(
        f"sample scans: {wheel.requirement} arrived corrupt twice (SHA-256 is not {wheel.sha256[:12]}...); deleted. "
        "Is there a proxy that changes files? data=synthetic needs no download"
    )


def _fetch(folder: Path, wheel: Wheel, download: Downloader) -> bool:
    """One try: download, verify, unpack. False: corrupt. The wheel itself is not kept."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
            download(wheel.requirement, Path(name))
            found = sorted(Path(name).glob("*.whl"))
            if len(found) != 1 or sha256_file(found[0]) != wheel.sha256:
                return False
            with zipfile.ZipFile(found[0]) as archive:
                for file, _ in wheel.files:
                    target = Path(name) / file
                    with archive.open(f"{wheel.folder}/{file}") as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    os.replace(target, folder / file)
    except OSError as error:
        raise UserError(f"{folder}: the sample scans cannot be written ({error.strerror or error})") from error
    return _verified(folder, wheel)


def _verified(folder: Path, wheel: Wheel) -> bool:
    """Whether all files are there with the right bytes; a wrong one is deleted."""
    whole = True
    for file, digest in wheel.files:
        path = folder / file
        if not path.is_file():
            whole = False
        elif sha256_file(path) != digest:
            log.warning("%s is damaged: deleted", path)
            path.unlink()
            whole = False
    return whole


def sample_sources(folder: Path) -> list[Source]:
    """The two scans with what belongs to them. For sub-HAPPYTEST no whole-brain mask is published: one is computed.

    Neither is in a template space: sub-RAPIDTIDETEST has the oblique affine of the scanner (code 1), the header of
    sub-HAPPYTEST names no space (codes 0). So each is centred on its own mask, and what compares scans voxel by voxel
    refuses the pair.
    """
    mask = folder / "sub-RAPIDTIDETEST_brainmask.nii.gz"
    return [
        Source("sub-HAPPYTEST", folder / "sub-HAPPYTEST.nii.gz", "sub-HAPPYTEST"),
        Source("sub-RAPIDTIDETEST", folder / "sub-RAPIDTIDETEST.nii.gz", "sub-RAPIDTIDETEST", mask=mask),
    ]


def sample_store(data: DataConfig) -> Path:
    """The store with both sample scans on the grid of `data`, made when it is not there.

    Args:
        data: `grid`, `spacing` and `revision` count; `path` is the store's folder, null: one in the cache,
            named by what went into it.

    Returns:
        Folder of the store.

    Raises:
        SamplesUnavailable: the scans cannot be had; use the synthetic cohort.
        UserError: unwritable folder, corrupt download, `path` is a store of another grid.
    """
    x, y, z = data.grid
    recipe = Recipe(grid=(x, y, z), spacing=float(data.spacing))
    recipe.check()
    path = Path(data.path) if data.path else cache_dir() / "stores" / store_name(recipe, data.revision)
    if _complete(path, recipe):
        return path
    check_revision(data.revision, False, path)
    with only_here(path.parent / f".{path.name}.lock"):
        if _complete(path, recipe):
            return path
        folder = fetch_samples()
        log.info(
            "bringing the sample scans to %s voxels of %g mm, once", "x".join(map(str, recipe.grid)), recipe.spacing
        )
        # In this process: a worker would import the caller's main module, which takes longer than it saves.
        report = ingest(sample_sources(folder), path, recipe, workers=1, progress=sys.stderr.isatty())
    for failed in report.having("failed"):
        raise UserError(f"sample scan {failed.scan_id}: {failed.reason}")
    return path


def store_name(recipe: Recipe, revision: int) -> str:
    """Name of the cached store: readable, and different for whatever would change its bytes."""
    if revision == 1:  # as it was written then: runs of that time name it so
        told = f"Recipe(grid={recipe.grid}, spacing={recipe.spacing}, tr=None, tr_resample=None, frame_spacing=None, "
        told += f"confounds=True), 1, 1, {tool_version()!r}, {tuple(FILES.items())!r}"
    else:
        told = f"{recipe!r}, {fmt.FORMAT_VERSION}, {revision}, {tool_version()!r}, {tuple(FILES.items())!r}"
    digest = hashlib.sha256(f"({told})".encode()).hexdigest()[:8]
    return f"sample-{'x'.join(map(str, recipe.grid))}-{recipe.spacing:g}mm-{digest}"


def _complete(path: Path, recipe: Recipe) -> bool:
    """Whether the store is there with both scans."""
    if not (path / "store.json").is_file() or not (path / "manifest.csv").is_file():
        return False
    description = fmt.read_json(path / "store.json")
    if tuple(description["grid"]) != recipe.grid or float(description["spacing"]) != recipe.spacing:
        raise UserError(
            f"{path}: holds scans of grid {description['grid']} at {description['spacing']:g} mm, not "
            f"{list(recipe.grid)} at {recipe.spacing:g} mm; name another data.path"
        )
    have = {scan.scan_id for scan in fmt.decode_manifest(path / "manifest.csv")}
    return {"sub-HAPPYTEST", "sub-RAPIDTIDETEST"} <= have

"""Several stores made one: what the points of a job array ingested, or moved to where version 2 places scans.

Every frame and array is compared with its checksum while it is read, and hashed again while it is written. The shards
are those that one ingest of all scans gives: scans in the order of their names, cut at the same sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from swift.data.store import format as fmt
from swift.data.store.reader import Store
from swift.data.store.tables import read_report, write_report
from swift.data.store.writer import BLOCK, Staged, StoreWriter
from swift.utils.errors import UserError

RECIPE = ("tr_resample", "drop_first", "confounds", "any_size", "cropped")
"""What stores must have been made with alike to be one."""


def join(parts: Sequence[Path], out: Path, shard_bytes: int = 4 << 30) -> dict[str, Any]:
    """Make one store of several; run it again after a kill to go on.

    Args:
        parts: Folders of the stores.
        out: Folder of the new store.
        shard_bytes: Target size of a shard.

    Returns:
        Counts: parts, scans, shards, bytes.

    Raises:
        UserError: stores of other grids, spacings, spaces, versions or recipes; a scan twice; a part that is not
            finished, or missing of those that were planned; `out` holds other scans. Nothing is written then.
        CorruptData: a part is damaged; names the place.
    """
    if out.resolve() in [part.resolve() for part in parts]:
        raise UserError(f"{out}: is one of the parts; name another folder")
    stores = [store for part in parts if (store := _finished(part)) is not None]
    if not stores:
        raise UserError(f"{parts[0]}: there is no scan in any of the parts")
    _check_alike(stores)
    reports = [read_report(part) for part in parts]
    _check_all_there(parts, reports)
    found: dict[str, tuple[Store, int]] = {}
    for store in stores:
        for place, info in enumerate(store.scans):
            if info.scan_id in found:
                raise UserError(
                    f"scan {info.scan_id} is in {found[info.scan_id][0].path} and in {store.path}: a scan can be in "
                    "one part only"
                )
            found[info.scan_id] = store, place
    names = sorted(found)
    _check_out(out, names)
    first = stores[0]
    writer = StoreWriter(out, first.grid, first.spacing, shard_bytes, first.placement)
    writer.take([(found[name][0].scans[found[name][1]], partial(read_verified, *found[name])) for name in names])
    write_report(out, _joined(out, reports))
    for store in stores:
        store.close()
    shards = fmt.read_json(out / "store.json")["shards"]
    size = sum(entry["bytes"] for entry in shards.values())
    return {"parts": len(parts), "scans": len(names), "shards": len(shards), "bytes": size}


def _finished(part: Path) -> Store | None:
    """A part opened; None: its ingest ended, and none of its scans could be used."""
    fmt.read_json(part / "store.json")
    staged = len(list((part / "staging").glob("[!.]*.h5")))
    if staged:
        raise UserError(f"{part}: {staged} scans are not packed yet: run its ingest again to finish it")
    if (part / "manifest.csv").is_file() and not fmt.decode_manifest(part / "manifest.csv"):
        return None
    store = Store(part)
    if store.version != fmt.FORMAT_VERSION:
        raise UserError(f"{part}: is of format version {store.version}; move it first: python -m swift.data place")
    return store


def _check_alike(stores: Sequence[Store]) -> None:
    first = stores[0]
    for store in stores[1:]:
        for what, mine, theirs in (
            ("grid", list(first.grid), list(store.grid)),
            ("spacing", first.spacing, store.spacing),
            ("placement", first.placement, store.placement),
        ):
            if mine != theirs:
                raise UserError(f"{store.path} has {what} {theirs}, {first.path} has {mine}: they cannot be joined")


def _check_all_there(parts: Sequence[Path], reports: Sequence[dict[str, Any]]) -> None:
    """Parts of one plan, all of them, and made alike."""
    recipes = [{name: report.get("recipe", {}).get(name) for name in RECIPE} for report in reports]
    for part, recipe in zip(parts, recipes, strict=True):
        if recipe != recipes[0]:
            name = next(name for name in RECIPE if recipe[name] != recipes[0][name])
            raise UserError(
                f"{part} was made with {name} {recipe[name]}, {parts[0]} with {recipes[0][name]}: they cannot be joined"
            )
    told = {str(part): str(report["part"]) for part, report in zip(parts, reports) if report.get("part")}
    if not told:
        return
    totals = sorted({text.partition("/")[2] for text in told.values()})
    if len(told) < len(parts) or len(totals) > 1:
        said = ", ".join(f"{path}: {part}" for path, part in told.items())
        raise UserError(f"these are not the parts of one ingest ({said}): they cannot be joined")
    numbers = [int(text.partition("/")[0]) for text in told.values()]
    missing = sorted(set(range(1, int(totals[0]) + 1)) - set(numbers))
    if missing:
        raise UserError(f"part {', '.join(map(str, missing))} of {totals[0]} is missing: run it, then join all")


def _check_out(out: Path, names: Sequence[str]) -> None:
    if not (out / "store.json").is_file():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out}: holds something else; name a new folder")
        return
    manifest = out / "manifest.csv"
    have = {scan.scan_id for scan in fmt.decode_manifest(manifest)} if manifest.exists() else set()
    other = sorted(have - set(names))
    if other:
        raise UserError(f"{out}: holds scans that are not of these stores ({other[0]}, ...); name a new folder")


def _joined(out: Path, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The reports of all parts as one."""
    rows = sorted((row for report in reports for row in report.get("scans", [])), key=lambda row: str(row["scan_id"]))
    recipe: dict[str, Any] = next((report["recipe"] for report in reports if report.get("recipe")), {})
    return {"recipe": recipe, "store": str(out), "joined": len(reports), "scans": rows}


def read_verified(store: Store, place: int) -> Staged:
    """Everything of a scan as the writer takes it; what differs from its checksum is named when it is read.

    Raises:
        CorruptData: header, an array or a frame.
    """
    info = store.scans[place]
    arrays = {"mask": store.mask(place).astype(np.uint8)}  # the header is compared with its checksum here
    arrays |= {name: store.array(place, name) for name in fmt.VECTORS}
    if confounds := store.confounds(place):
        arrays["confounds"] = np.stack(list(confounds.values()), axis=1)
        arrays["confound_names"] = fmt.encode_names(list(confounds))
    attributes = store.attributes(place)
    attributes.pop("header_xxh3_64")

    def blocks() -> Iterator[np.ndarray]:
        step = max(1, BLOCK // (2 * info.voxels))
        for start in range(0, info.frames, step):
            yield store.read(place, start, min(start + step, info.frames), verify=True).astype("<i2", copy=False)

    return attributes, arrays, (info.frames, info.voxels), blocks

"""A store of format version 1 moved to where version 2 places its scans, without the sources.

Version 1 laid the grid around each scan's own brain mask. Where its voxels coincide with those of the template's box
(the grid phases agree), a scan is moved by whole voxels: its values are not touched. Else they would have to be
interpolated a second time, so the sources are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from swift.data.store import format as fmt
from swift.data.store.join import read_verified
from swift.data.store.reader import Store
from swift.data.store.spaces import OWN, box_affine, is_known, known_spaces, placement_of
from swift.data.store.tables import read_report, write_report
from swift.data.store.writer import Staged, StoreWriter
from swift.utils.errors import UserError

PHASE_MM = 1e-3
"""Voxel centres closer than this are the same place."""
MOST_LOST = 0.10
"""Part of a brain that may lie outside the new box."""


def place(path: Path, out: Path, space: str | None = None, shard_bytes: int = 4 << 30) -> dict[str, Any]:
    """Make a store of version 2 of one of version 1; run it again after a kill to go on.

    Args:
        path: The store of version 1.
        out: Folder of the new store.
        space: That all its scans are in; None: what the names of their source files say.
        shard_bytes: Target size of a shard.

    Returns:
        Counts: scans, voxels_lost; placement.

    Raises:
        UserError: not version 1; scans whose space is not known, or of two kinds; grid phases that do not agree; much
            of a brain outside the box. Nothing is written then.
    """
    store = Store(path)
    if store.version != 1:
        raise UserError(f"{path}: is of format version {store.version} already, its grid in {store.placement!r}")
    if space is not None and not is_known(space):
        raise UserError(f"--space {space}: known are {known_spaces()}")
    if (out / "store.json").is_file() and fmt.read_json(out / "store.json")["format_version"] == 1:
        raise UserError(f"{out}: holds a store of version 1; name a new folder")
    spaces = [space or _space_of(store, number) for number in range(len(store.scans))]
    unknown = [scan.scan_id for scan, found in zip(store.scans, spaces, strict=True) if not found]
    if unknown:
        raise UserError(f"{path}: the space of {len(unknown)} scans is not known ({unknown[0]}, ...): give --space")
    placements = sorted({placement_of(found) for found in spaces})
    if len(placements) > 1:
        raise UserError(
            f"{path}: scans of two kinds of space ({', '.join(sorted(set(spaces)))}) do not go into one store"
        )
    shifts = [_shift(store, number, placements[0]) for number in range(len(store.scans))]
    lost = _check(store, placements[0], shifts)
    writer = StoreWriter(out, store.grid, store.spacing, shard_bytes, placements[0])
    order = sorted(range(len(store.scans)), key=lambda number: store.scans[number].scan_id)
    todo = []
    for number in order:
        info = store.scans[number]
        kept = replace(info, voxels=info.voxels - lost[number])
        todo.append((kept, partial(_moved, store, number, spaces[number], placements[0], shifts[number])))
    writer.take(todo)
    write_report(out, {**read_report(path), "store": str(out), "placed_from_version": 1})
    store.close()
    return {"scans": len(order), "voxels_lost": int(sum(lost)), "placement": placements[0]}


def _space_of(store: Store, number: int) -> str:
    found = re.search(r"(?:^|_)space-([A-Za-z0-9+]+)", str(store.attributes(number)["source"]))
    return found.group(1) if found else ""


def _shift(store: Store, number: int, placement: str) -> np.ndarray:
    """(3,) float: voxels from the scan's place in its own grid to that in the box."""
    if placement == OWN:
        return np.zeros(3)
    box = box_affine(placement, store.grid, store.spacing)
    return np.asarray((store.affine(number)[:3, 3] - box[:3, 3]) / store.spacing)


def _check(store: Store, placement: str, shifts: list[np.ndarray]) -> list[int]:
    """Voxels of each scan that fall outside the box; UserError where a scan cannot be moved."""
    off = [
        info.scan_id
        for info, shift in zip(store.scans, shifts, strict=True)
        if np.abs(shift - np.round(shift)).max() * store.spacing > PHASE_MM
    ]
    if off:
        raise UserError(
            f"{store.path}: voxels of {len(off)} of {len(shifts)} scans do not coincide with those of the box of "
            f"{placement} ({off[0]}, ...): ingest the sources again: python -m swift.data ingest SOURCES --out NEW"
        )
    lost = []
    for number, shift in enumerate(shifts):
        info = store.scans[number]
        lost.append(info.voxels - int(_inside(store.mask(number), np.round(shift).astype(int))[1].sum()))
        if lost[-1] > MOST_LOST * info.voxels:
            raise UserError(
                f"{store.path}: {100 * lost[-1] / info.voxels:.3g} % of the brain of {info.scan_id} would lie outside "
                f"the box of {placement}: are its scans in that space?"
            )
    return lost


def _inside(mask: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask (X, Y, Z) moved by whole voxels, and (V,) bool: which of its voxels are still inside."""
    places = np.argwhere(mask) + shift
    inside = ((places >= 0) & (places < mask.shape)).all(axis=1)
    moved = np.zeros_like(mask)
    moved[tuple(places[inside].T)] = True
    return moved, inside


def _moved(store: Store, number: int, space: str, placement: str, shift: np.ndarray) -> Staged:
    """A scan of version 1 as version 2 keeps it."""
    attributes, arrays, (frames, _), read = read_verified(store, number)
    whole = np.round(shift).astype(int)
    mask, inside = _inside(arrays["mask"].astype(bool), whole)
    notes = json.loads(attributes["notes"])
    notes.append(
        f"space {space}: moved from a store of format version 1 by {whole.tolist()} voxels, grid in {placement}"
    )
    if not inside.all():
        notes.append(f"{int((~inside).sum())} brain voxels lie outside the box of {placement}: left out")
    names = attributes.pop("confound_names", "[]")
    if "confounds" in arrays:
        arrays["confound_names"] = fmt.encode_names(json.loads(names))
    arrays["mask"] = mask.astype(np.uint8)
    for name in fmt.VECTORS:
        arrays[name] = np.ascontiguousarray(arrays[name][inside])
    affine = attributes["affine"].copy()
    if placement != OWN:
        affine = box_affine(placement, store.grid, store.spacing)
    attributes |= {
        "affine": affine,
        "voxels": np.int64(inside.sum()),
        "notes": json.dumps(notes),
        "space": space,
        "placement": placement,
        "dropped": np.int64(0),
        "start_time": np.float64(attributes.get("start_time", 0.0)),
    }
    if not inside.all():
        attributes |= _brain_figures(arrays)
    return attributes, arrays, (frames, int(inside.sum())), _columns(read, inside)


def _brain_figures(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Figures over all brain voxels from those of each voxel, as `stats.summarize` makes them."""
    stats = {name: arrays[f"stats/{name}"].astype(np.float64) for name in fmt.STATS}
    mean = stats["mean"].mean()
    spread = np.sqrt(np.mean(stats["std"] ** 2 + (stats["mean"] - mean) ** 2))
    figures = {"mean": mean, "std": spread, "min": stats["min"].min(), "max": stats["max"].max()}
    figures |= {name: np.median(stats[name]) for name in ("median", "iqr")}
    told = {f"global_{name}": np.float64(value) for name, value in figures.items()}
    return told | {"constant_voxels": np.int64((arrays["scale"] == 0).sum())}


def _columns(read: Callable[[], Any], inside: np.ndarray) -> Callable[[], Any]:
    if inside.all():
        return read
    return lambda: (np.ascontiguousarray(block[:, inside]) for block in read())

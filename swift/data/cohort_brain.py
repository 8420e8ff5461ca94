"""The cells of the grid that hold brain in any scan of the stores of a run: the tokens of data.brain=cohort."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from swift.config.check import check_cohort
from swift.config.schema import Config
from swift.data.locate import store_path
from swift.data.store.reader import CorruptData, Store
from swift.utils.bits import from_text, to_text
from swift.utils.cache import cache_dir, only_here
from swift.utils.errors import UserError
from swift.utils.files import replace_text

log = logging.getLogger("swift.data")
FOLDER = "brains"
"""In the cache."""


def union(store: Store, places: Sequence[int]) -> tuple[np.ndarray, bool]:
    """Voxels that any of these scans has in its brain mask, bool (X, Y, Z), and whether all masks could be read.

    One scan at a time; a damaged mask is named and left out, and stops the training that comes to read it.
    """
    found, whole = np.zeros(store.grid, bool), True
    for place in places:
        try:
            found |= store.mask_alone(place)
        except CorruptData as error:
            log.warning("data.brain=cohort goes on without a damaged mask: %s", error)
            whole = False
    return found, whole


def _kept_union(path: Path, exclude: Sequence[str]) -> np.ndarray:
    """`union` of a store but for data.exclude, made once and kept in the cache; ranks of a job wait for it.

    It is kept under what the store holds and the scans that are left out. Where there is no cache that can be written,
    it is made anew.
    """
    with closing(Store(path)) as store:
        return _looked_up(store, set(exclude))


def _looked_up(store: Store, exclude: set[str]) -> np.ndarray:
    # A name that is nowhere is refused where the scans are chosen; here it may be one of another store of a mixture.
    places = [n for n, scan in enumerate(store.scans) if exclude.isdisjoint((scan.scan_id, scan.subject))]
    try:
        folder = cache_dir() / FOLDER
    except UserError:
        return union(store, places)[0]
    told = hashlib.sha256(b"".join((store.path / name).read_bytes() for name in ("store.json", "manifest.csv")))
    if len(places) < len(store.scans):
        told.update(str(places).encode())
    kept = folder / f"{told.hexdigest()[:32]}.txt"
    with only_here(folder):
        if kept.exists():
            try:
                found = from_text(kept.read_text(encoding="ascii"))
            except ValueError:
                found = None
            if found is not None and found.shape == store.grid:
                return found
        found, whole = union(store, places)
        if whole:
            replace_text(kept, to_text(found))
    share = 100 * found.mean()
    log.info("data.brain=cohort: %s: brain of %d scans in %.1f %% of the grid", store.path, len(places), share)
    return found


def cells_of(brain: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """Voxels (X, Y, Z) -> which patches have one, bool (x, y, z); the last ones may reach beyond the grid."""
    found = np.pad(brain, [(0, -n % p) for n, p in zip(brain.shape, patch)])
    for axis, size in enumerate(patch[:3]):
        found = np.logical_or.reduceat(found, np.arange(0, found.shape[axis], size), axis=axis)
    return found


def with_cohort(cfg: Config) -> Config:
    """The settings with model.cohort filled in, where data.brain=cohort asks for it and the run has none yet.

    Raises:
        UserError: a store that cannot be opened, or of another grid than data.grid.
    """
    if cfg.data.brain == "scan" or cfg.model.cohort is not None:
        return cfg
    paths = [Path(cohort.path) for cohort in cfg.data.mixture] or [store_path(cfg.data, cfg.seed)]
    brain = np.zeros(cfg.data.grid, bool)
    for path in paths:
        found = _kept_union(path, cfg.data.exclude)
        if found.shape != brain.shape:
            raise UserError(
                f"data.brain=cohort: the masks of {path} have the grid {list(found.shape)}, not "
                f"data.grid={cfg.data.grid}"
            )
        brain |= found
    cells = cells_of(brain, cfg.model.patch_size)
    log.info("data.brain=cohort: %d of %d patches have brain in some scan", cells.sum(), cells.size)
    filled = replace(cfg, model=replace(cfg.model, cohort=to_text(cells)))
    check_cohort(filled)
    return filled

"""One scan, from a source to what a store keeps: mask and packed values on the grid, header, and notes.

Legend: X Y Z voxels of the grid (RAS+), T frames, V in-brain voxels. At most one packed scan (T, V) is in memory, and
the source one frame at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from swift.data.ingest.head import Meant, check_head
from swift.data.ingest.mask import Survey, changing_voxels, compute_mask, read_mask, survey
from swift.data.ingest.nifti import Volumes, plan_scan, sha256_file
from swift.data.ingest.place import GridPlan, Sampler, plan_grid
from swift.data.ingest.sidecar import Timing, read_timing
from swift.data.ingest.sources import Source
from swift.data.ingest.steady import FLAG, frames_to_drop, standing_out
from swift.data.ingest.tr import resample_tr
from swift.data.ingest.v1_frames import FrameFolder, plan_frames
from swift.data.store.format import MAX_ATTRIBUTE, ScanHeader, printable
from swift.data.store.spaces import MNI_CODE, OWN, is_known, placement_of
from swift.utils.errors import BadScan, UserError

TR_RANGE = (0.05, 30.0)


@dataclass(frozen=True)
class Recipe:
    """How scans are brought to a store. The same recipe and source give the same bytes."""

    grid: tuple[int, int, int] = (96, 96, 96)
    """Voxels x, y, z."""
    spacing: float = 2.0
    """Isotropic voxel size, mm."""
    tr: float | None = None
    """Seconds, for scans whose files do not say; wins over header and sidecar."""
    tr_resample: float | None = None
    """Bring every scan to this TR, seconds."""
    frame_spacing: float | None = None
    """Voxel size of SwiFT v1 frames, mm; None: `spacing`, so that they are not resampled."""
    confounds: bool = True
    """Keep fMRIPrep's confounds."""
    mask: str | None = None
    """Brain mask of all NIfTI scans, on their own grid; None: the one beside a scan, or a computed one."""
    drop_first: int = 0
    """Frames at the start of every scan to leave out; those flagged as no steady state are left out anyway."""
    any_size: bool = False
    """Take brains of any volume."""
    cropped: bool = False
    """Take brains of which a large part lies outside the grid or the scan."""
    as_version_1: bool = False
    """Place, keep frames and take what format version 1 did: to repair such a store."""

    def check(self) -> None:
        """Raises UserError for values that make no sense."""
        if len(self.grid) != 3 or min(self.grid) < 2:
            raise UserError(f"grid {list(self.grid)}: three voxel counts of 2 or more")
        if self.mask is not None and not Path(self.mask).is_file():
            raise UserError(f"--mask {self.mask}: no such file")
        if not 0.1 <= self.spacing <= 20:
            raise UserError(f"spacing {self.spacing:g} mm: legal is 0.1 to 20")
        for name, value in (("tr", self.tr), ("tr-resample", self.tr_resample)):
            if value is not None and not TR_RANGE[0] <= value <= TR_RANGE[1]:
                raise UserError(f"--{name} {value:g}: legal is {TR_RANGE[0]:g} to {TR_RANGE[1]:g} seconds")
        if self.drop_first < 0:
            raise UserError(f"--drop-first {self.drop_first}: legal is 0 or more frames")
        if self.frame_spacing is not None and not 0.1 <= self.frame_spacing <= 20:
            raise UserError(f"--frame-spacing {self.frame_spacing:g} mm: legal is 0.1 to 20")


@dataclass
class Prepared:
    """A scan ready for StoreWriter.add."""

    header: ScanHeader
    mask: np.ndarray
    """(X, Y, Z) bool."""
    bold: np.ndarray
    """(T, V) float32."""


def prepare(source: Source, recipe: Recipe) -> Prepared:
    """Read, check, mask and resample one scan. The source is read twice: once to look, once to take values.

    Raises:
        BadScan: with a one-line reason.
    """
    name = printable(source.path.name)
    scan = plan(source, recipe)
    table, notes = _read_confounds(source, scan.frames)
    flags = {key: column for key, column in table.items() if key.startswith(FLAG)}
    dropped, said = frames_to_drop({} if recipe.as_version_1 else flags, recipe.drop_first, scan.frames, name)
    seen = survey(_kept(scan, dropped), name)
    if recipe.mask is not None and not source.is_frames:
        source = replace(source, mask=Path(recipe.mask))
    brain, how = _brain(source, scan, seen)
    space, placement, where = place_of(source, scan, recipe)
    grid = plan_grid(brain, scan.affine, recipe.grid, recipe.spacing, placement)
    timing = timing_of(source, recipe)
    notes = [
        *source.notes,
        *timing.notes,
        *scan.notes,
        *notes,
        *said,
        *how,
        where,
        *_remarks(scan, seen, brain),
        *_head(name, scan, seen, brain, grid, recipe),
    ]
    sampler = Sampler(grid, brain, seen.good, name)
    bold = np.empty((seen.frames, int(sampler.mask.sum())), dtype=np.float32)
    for frame, volume in enumerate(_kept(scan, dropped)):
        bold[frame] = sampler(volume)
    if not np.isfinite(bold).all():  # the source's own values are finite, so only overflow can do this
        raise BadScan(f"{name}: values beyond 32-bit floats")
    if out := standing_out(bold.mean(axis=1, dtype=np.float64)):
        notes.append(
            f"the first {len(out)} frames stand out from the rest and are not flagged: no steady state? --drop-first"
        )
    confounds, names = _confounds(table, recipe, dropped)
    events = _events(source, notes)
    tr = scan.tr
    if recipe.tr_resample is not None and abs(recipe.tr_resample - tr) > 1e-6:
        bold = resample_tr(bold, tr, recipe.tr_resample)
        notes.append(f"TR {tr:g} s resampled to {recipe.tr_resample:g} s: {seen.frames} frames became {len(bold)}")
        if confounds is not None:
            notes.append("confounds left out: they belong to the frames before the TR was resampled")
        tr, confounds, names = recipe.tr_resample, None, []
    header = ScanHeader(
        scan_id=source.scan_id,
        subject=source.subject,
        session=source.session,
        task=source.task,
        run=source.run,
        site=source.site,
        tr=tr,
        affine=grid.affine,
        source=name,
        source_sha256=scan.digest() if isinstance(scan, FrameFolder) else sha256_file(source.path),
        nan_voxels=int((seen.nan & brain).sum()),
        flat_voxels=int((seen.flat & brain).sum()),
        notes=notes,
        phenotypes=source.phenotypes,
        confounds=confounds,
        confound_names=names,
        events=events,
        space=space,
        placement=placement,
        start_time=round((timing.start_time or 0.0) + dropped * scan.tr, 9),
        dropped=dropped,
    )
    return Prepared(header, sampler.mask, bold)


def _kept(scan: Volumes | FrameFolder, dropped: int) -> Iterator[np.ndarray]:
    """The frames of a scan but the first few."""
    return islice(scan.read(), dropped, None)


def place_of(source: Source, scan: Volumes | FrameFolder, recipe: Recipe) -> tuple[str, str, str]:
    """The space of a scan ("" where it is not known), where its grid lies, and the sentence that says so."""
    space, why = source.space or "", ""
    if isinstance(scan, FrameFolder):
        space = ""  # its affine is made up: no place of a template's box is known
    elif not space and scan.code == MNI_CODE:
        space, why = "MNI", "; the header says MNI 152 (code 4), which of them is not said"
    placement = OWN if recipe.as_version_1 else placement_of(space)
    if placement != OWN:
        return space, placement, f"space {space}: grid in the fixed box of {placement}{why}"
    if space and not is_known(space):
        why = f"; no box is known for space {space}"
    return space, OWN, f"space {space or 'not known'}: grid centred on the scan's own brain mask{why}"


def plan(source: Source, recipe: Recipe) -> Volumes | FrameFolder:
    """Check a source's header; no frame of a NIfTI file is read.

    Raises:
        BadScan: with a one-line reason.
    """
    if source.problem:
        raise BadScan(source.problem)
    tr = source.tr if source.tr is not None else recipe.tr
    sidecar = timing_of(source, recipe).tr
    if source.is_frames:
        return plan_frames(source.path, recipe.frame_spacing or recipe.spacing, tr, sidecar)
    return plan_scan(source.path, tr=tr, sidecar_tr=sidecar)


def timing_of(source: Source, recipe: Recipe) -> Timing:
    """What the source's JSON sidecars say of its TR and of the time that frame 0 stands for.

    Raises:
        BadScan: with a one-line reason.
    """
    told = source.tr is not None or recipe.tr is not None
    timing = read_timing(source.sidecars, source.path.name, told)
    return timing if source.start_time is None else replace(timing, start_time=source.start_time)


def _brain(source: Source, scan: Volumes | FrameFolder, seen: Survey) -> tuple[np.ndarray, list[str]]:
    """The brain mask on the source's grid, and how it was come by."""
    name = source.path.name
    if source.mask is not None:
        brain = read_mask(source.mask, scan.shape, scan.affine, name)
        return brain, [f"brain mask: {source.mask.name}"]
    if isinstance(scan, FrameFolder):
        brain = ~seen.flat  # v1 fills the background with one value in all frames
        if not brain.any():
            raise BadScan(f"{name}: no voxel changes over time")
        return brain, [f"no brain mask given: the {int(brain.sum())} voxels that change over time taken as brain"]
    if seen.centred:
        brain = changing_voxels(seen, name)
        return brain, [
            f"no brain mask given: values are centred (mean near 0), so the {int(brain.sum())} voxels that change over "
            "time taken as brain"
        ]
    brain = compute_mask(seen.mean, scan.affine, name)
    return brain, [
        f"no brain mask given: computed from the mean image (nilearn compute_epi_mask), {int(brain.sum())} voxels"
    ]


def _remarks(scan: Volumes | FrameFolder, seen: Survey, brain: np.ndarray) -> list[str]:
    notes = []
    if scan.orientation != "RAS":
        notes.append(f"orientation {scan.orientation} brought to RAS+")
    inside = int(brain.sum())
    for what, voxels in (("NaN or infinite", seen.nan), ("constant", seen.flat)):
        if count := int((voxels & brain).sum()):
            notes.append(f"{count} of {inside} brain voxels hold {what} values: left out of the mask")
    if seen.flat_frames:
        notes.append(f"{seen.flat_frames} of {seen.frames} frames hold one single value in every voxel")
    return notes


def _head(
    name: str, scan: Volumes | FrameFolder, seen: Survey, brain: np.ndarray, grid: GridPlan, recipe: Recipe
) -> list[str]:
    meant = Meant(recipe.any_size, recipe.cropped)
    if recipe.as_version_1 or isinstance(scan, FrameFolder):  # the voxel size of v1 frames is assumed, and said
        meant = Meant(any_size=True, cropped=meant.cropped or recipe.as_version_1)
    text = f"{grid.grid} grid of {grid.spacing:g} mm"
    return check_head(name, brain, scan.affine, seen.flat | seen.nan, grid.outside, text, meant)


def _events(source: Source, notes: list[str]) -> str:
    """The text of the scan's events.tsv, "" where there is none or it is too long to be kept."""
    if source.events is None:
        return ""
    try:
        text = source.events.read_text(encoding="utf-8-sig").strip() + "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise BadScan(f"{source.path.name}: events {source.events.name} not readable ({error})") from error
    if len(text.encode()) > MAX_ATTRIBUTE:
        notes.append(
            f"events left out: {source.events.name} has more than {MAX_ATTRIBUTE} bytes; give task.target.events"
        )
        return ""
    return text


def _read_confounds(source: Source, frames: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Numeric columns of the scan's confounds, (T,) each, NaN for n/a; none, and said, where lines are not frames."""
    if source.confounds is None:
        return {}, []
    import pandas as pd

    try:
        table = pd.read_csv(source.confounds, sep="\t", na_values=["n/a"]).select_dtypes("number")
    except (OSError, ValueError) as error:
        raise BadScan(f"{source.path.name}: confounds {source.confounds.name} not readable ({error})") from error
    if len(table) != frames:
        said = f"confounds left out: {source.confounds.name} has {len(table)} lines, the scan {frames} frames"
        return {}, [said]
    return {str(name): table[name].to_numpy(dtype=np.float32) for name in table.columns}, []


def _confounds(table: dict[str, Any], recipe: Recipe, dropped: int) -> tuple[np.ndarray | None, list[str]]:
    """(T, K) float32 of the kept frames, and the K names."""
    if not table or not recipe.confounds:
        return None, []
    return np.ascontiguousarray(np.stack(list(table.values()), axis=1)[dropped:]), list(table)

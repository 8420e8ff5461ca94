"""A single scan brought to what a trained model must be given, by the code that ingestion uses.

A NIfTI file goes through the steps of `python -m swift.data ingest` (orientation, mask, grid, TR, statistics, int16
codes) in memory, so that its clips are, bit for bit, those that a store of the same scan gives.

Legend: B clips, X Y Z grid, T frames of a clip, V brain voxels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from swift.data.clips.index import ClipIndex
from swift.data.clips.scatter import Layout, to_dense
from swift.data.ingest.nifti import Volumes
from swift.data.ingest.prepare import Recipe, plan, prepare
from swift.data.ingest.sources import Source, duplicates
from swift.data.ingest.tr import resample_tr
from swift.data.ingest.v1_frames import FrameFolder
from swift.data.store.reader import Store
from swift.data.store.spaces import MNI, V1, v1_box
from swift.data.store.stats import fold, quantize, summarize
from swift.inference.contract import Contract
from swift.utils.errors import BadScan, UserError

OTHER_TR = ("refuse", "resample", "keep")


@dataclass(frozen=True)
class Fitting:
    """How scans are brought to a contract.

    Attributes:
        tr: Seconds, for scans whose files do not say; wins over header and sidecar.
        other_tr: refuse | resample | keep scans of another TR than the model was trained on.
        mask: Brain mask of NIfTI scans, on their own grid; None: the one beside a scan, or a computed one.
        any_size, cropped: Take brains of a size that no head has, and brains of which more than 10 % are cut off.
    """

    tr: float | None = None
    other_tr: str = "refuse"
    mask: Path | None = None
    any_size: bool = False
    cropped: bool = False

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        if self.other_tr not in OTHER_TR:
            raise UserError(f"--other-tr {self.other_tr}: legal are {', '.join(OTHER_TR)}")
        self.recipe.check()

    @property
    def recipe(self) -> Recipe:
        """How ingestion would be told."""
        mask = str(self.mask) if self.mask is not None else None
        return Recipe(tr=self.tr, mask=mask, any_size=self.any_size, cropped=self.cropped)


@dataclass(frozen=True)
class StoredScan:
    """A scan of a store, by its place there."""

    store: Store
    place: int

    @property
    def scan_id(self) -> str:
        """Name of the scan."""
        return self.store.scans[self.place].scan_id

    @property
    def subject(self) -> str:
        """Whose scan it is."""
        return self.store.scans[self.place].subject


Scan = Source | StoredScan


@dataclass(frozen=True)
class FittedScan:
    """A scan as a model takes it.

    Attributes:
        scan_id, subject: Names.
        frames: Of the whole scan.
        tr: Seconds between them.
        affine: (4, 4) from the model's grid to world mm.
        mask: (X, Y, Z) bool, on the model's grid.
        notes: What was assumed or corrected.
        origin: The file's own grid; None for a scan of a store.
        contract: What it was brought to.
        space: Name of the space that it lies in; "": not known.
        placement: Where the grid that it is kept on lies, a name of `swift.data.store.spaces`.
    """

    scan_id: str
    subject: str
    frames: int
    tr: float
    affine: np.ndarray
    mask: np.ndarray
    notes: tuple[str, ...]
    origin: Volumes | FrameFolder | None
    contract: Contract
    space: str
    placement: str
    _cells: np.ndarray
    """(V,) flat cells of the brain voxels on the grid that they are kept on, which `_layout` brings to the model's."""
    _layout: Layout
    _background: float
    _a: np.ndarray
    _b: np.ndarray
    _read: Callable[[int], np.ndarray]
    """First frame -> codes (T, V) int16 of the clip that begins there."""

    def starts(self) -> list[int]:
        """First frames of its clips: one after the other without overlap, and one more that ends with the scan."""
        index = ClipIndex([0], [0], [self.frames], self.contract.span, self.contract.span)
        return [int(start) for start in index.locate(np.arange(len(index)))[1]]

    @property
    def layout(self) -> Layout:
        """How the cells of the grid that it is kept on lie to those of the model's."""
        return self._layout

    def packed(self) -> dict[str, np.ndarray]:
        """All its clips as they are kept.

        Returns:
            codes (N, T, V) int16 of the clips of `starts`, index (V,) int32, a and b (V,) float32, and background (),
            for `swift.data.clips.scatter.to_dense`.
        """
        codes = np.stack([self._read(start) for start in self.starts()])
        background = np.asarray(self._background, np.float32)
        return {"codes": codes, "index": self._cells, "a": self._a, "b": self._b, "background": background}

    def clips(self, starts: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Normalized clips.

        Args:
            starts: First frame of each, B of them.
            device: Where to.

        Returns:
            bold (B, 1, X, Y, Z, T) float32, brain (B, X, Y, Z) bool, and what `swift.data.clips.scatter.to_dense` adds.
        """
        count = len(starts)
        meta = np.stack([np.arange(count), np.zeros(count), np.asarray(starts), np.ones(count)], axis=1)
        packed = {
            "codes": np.concatenate([self._read(start).reshape(-1) for start in starts]),
            "table": np.stack([self._cells, self._a.view(np.int32), self._b.view(np.int32)]),
            "meta": meta.astype(np.int64),
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(array).to(device) for name, array in packed.items()}
        tensors |= {"voxels": [len(self._cells)] * count, "tables": [tensors["table"]] * count}
        grid, frames = self.contract.grid, self.contract.frames
        return to_dense(tensors, grid, frames, self._background, layout=self._layout)


def fitted_values(
    bold: np.ndarray,
    mask: np.ndarray,
    affine: np.ndarray,
    tr: float,
    name: str,
    contract: Contract,
    space: str,
    placement: str,
) -> FittedScan:
    """A scan whose values are on the model's grid already, with statistics and codes as a store would keep them.

    Args:
        bold: (T, V) float32, finite; V the True cells of mask (X, Y, Z) in C order.
        mask: On the grid of `affine`.
        affine: (4, 4) of that grid.
        tr: Seconds.
        name: Of the scan.
        contract: Of the model.
        space, placement: Of the scan and of the grid.
    """
    source = Source(name, Path(name), name)
    return _packed(bold, mask, affine, tr, source, (), None, contract, (space, placement))


def find_scans(inputs: Sequence[str | Path], contract: Contract) -> list[Scan]:
    """The scans of the named places.

    Args:
        inputs: NIfTI files, folders of them, BIDS derivatives, tables, SwiFT v1 folders, stores, or STORE:SCAN_ID.
        contract: Stores must have its grid and spacing.

    Raises:
        UserError: no such place, no scan in it, a store of another grid, or two scans of one name.
    """
    found: list[Scan] = []
    together: list[Path] = []  # the folders of files that are named together tell two of one name apart
    for place in inputs:
        folder, _, wanted = str(place).rpartition(":")
        if (Path(place) / "store.json").is_file():
            found += _sources(together)
            found += _stored(Path(place), None, contract)
        elif folder and (Path(folder) / "store.json").is_file():
            found += _sources(together)
            found += _stored(Path(folder), wanted, contract)
        else:
            if together and Path(place).is_dir() != together[-1].is_dir():
                found += _sources(together)
            together.append(Path(place))
    found += _sources(together)
    twice = duplicates([scan for scan in found if isinstance(scan, Source)])
    for name, same in twice.items():
        raise UserError(f"{len(same)} scans have the name {name}: {' and '.join(str(one.path) for one in same)}")
    for name, count in Counter(scan.scan_id for scan in found).items():
        if count > 1:
            raise UserError(f"{count} scans have the name {name}: name each once")
    return found


def _sources(places: list[Path]) -> list[Source]:
    """The scans of some places, which are then forgotten."""
    from swift.data.ingest.bids import find_sources

    sources = find_sources(places) if places else []
    places.clear()
    return sources


def _stored(path: Path, wanted: str | None, contract: Contract) -> list[Scan]:
    store = Store(path)
    if store.grid != contract.grid or store.spacing != contract.spacing:
        raise UserError(
            f"{path} has grid {list(store.grid)} at {store.spacing:g} mm, the model takes {list(contract.grid)} at "
            f"{contract.spacing:g} mm: name the NIfTI files, or ingest them again"
        )
    places = range(len(store.scans)) if wanted is None else [store.find(wanted)]
    return [StoredScan(store, place) for place in places]


def fit(scan: Scan, contract: Contract, fitting: Fitting) -> FittedScan:
    """Bring a scan to a contract; one scan is in memory (of a store: one batch of clips).

    Raises:
        BadScan: with a one-line reason.
    """
    fitted = (
        _fit_stored(scan, contract, fitting) if isinstance(scan, StoredScan) else _fit_source(scan, contract, fitting)
    )
    if fitted.frames < contract.span:
        raise BadScan(
            f"{fitted.scan_id}: {fitted.frames} frames, but the model takes clips over {contract.span} "
            f"({contract.frames} frames, {contract.frame_stride} apart)"
        )
    return fitted


def _fit_source(source: Source, contract: Contract, fitting: Fitting) -> FittedScan:
    # Of what only ingestion keeps, confounds are looked at for frames that are no steady state.
    source = replace(source, events=None)
    recipe = replace(fitting.recipe, grid=contract.grid, spacing=contract.spacing, confounds=False)
    origin = plan(source, recipe)
    recipe = replace(recipe, tr_resample=contract.resampled_tr(origin.tr, source.path.name, fitting.other_tr))
    scan = prepare(source, recipe)
    head = scan.header
    return _packed(
        scan.bold,
        scan.mask,
        head.affine,
        head.tr,
        source,
        tuple(head.notes),
        origin,
        contract,
        (head.space, head.placement),
    )


def _fit_stored(scan: StoredScan, contract: Contract, fitting: Fitting) -> FittedScan:
    store, place = scan.store, scan.place
    info, mask = store.scans[place], store.mask(place)
    wanted = contract.resampled_tr(info.tr, info.scan_id, fitting.other_tr)
    notes: tuple[str, ...] = ()
    where = (str(store.attributes(place).get("space", "")), store.placement)
    if wanted is not None:
        bold = resample_tr(store.values(place), info.tr, wanted)
        notes = (f"TR {info.tr:g} s resampled to {wanted:g} s: {info.frames} frames became {len(bold)}",)
        return _packed(bold, mask, store.affine(place), wanted, scan, notes, None, contract, where)
    a, b = store.normalizer(place, contract.normalization)

    def read(start: int) -> np.ndarray:
        return store.read(place, start, start + contract.span, contract.frame_stride, verify=True)

    background = contract.background_of(store.attributes(place))
    head = (info.scan_id, info.subject, info.frames, info.tr)
    return _laid_out(head, mask, store.affine(place), notes, None, contract, background, a, b, read, where)


def _packed(
    bold: np.ndarray,
    mask: np.ndarray,
    affine: np.ndarray,
    tr: float,
    scan: Scan,
    notes: tuple[str, ...],
    origin: Volumes | FrameFolder | None,
    contract: Contract,
    where: tuple[str, str],
) -> FittedScan:
    """Values (T, V) float32 as a store would keep them: statistics, and int16 codes."""
    summary = summarize(bold)
    try:
        a, b = fold(contract.normalization, summary.scale, summary.offset, summary.voxel, summary.brain)
    except UserError as error:
        raise BadScan(f"{scan.scan_id}: {error}") from error
    codes = quantize(bold, summary.scale, summary.offset)

    def read(start: int) -> np.ndarray:
        return np.ascontiguousarray(codes[start : start + contract.span : contract.frame_stride])

    background = contract.background_of(summary.brain)
    head = (scan.scan_id, scan.subject, len(bold), tr)
    return _laid_out(head, mask, affine, notes, origin, contract, background, a, b, read, where)


def _laid_out(
    head: tuple[str, str, int, float],
    mask: np.ndarray,
    affine: np.ndarray,
    notes: tuple[str, ...],
    origin: Volumes | FrameFolder | None,
    contract: Contract,
    background: float,
    a: np.ndarray,
    b: np.ndarray,
    read: Callable[[int], np.ndarray],
    where: tuple[str, str],
) -> FittedScan:
    """The scan in the orientation and the box that the model knows; mask and affine are those it is kept with.

    `where` is the name of its space, and of the placement of its grid.
    """
    shift, said = _shift(affine, contract, where[1])
    layout = Layout(contract.orientation == "LAS", shift)
    cells = np.flatnonzero(mask).astype(np.int32)
    there, on = layout.cells(torch.from_numpy(cells).long(), mask.shape)
    if on is not None:
        there = there[on]
        said += (f"{100 * (1 - len(there) / len(cells)):.2g} % of its brain lies outside the model's grid",)
    own: np.ndarray = np.zeros(mask.size, bool)
    own[there.numpy()] = True
    moved = np.eye(4)
    moved[:3, 3] = shift
    if layout.mirrored:
        moved[0] = (-1, 0, 0, mask.shape[0] - 1 + shift[0])
    own = own.reshape(mask.shape)
    return FittedScan(
        *head, affine @ moved, own, notes + said, origin, contract, *where, cells, layout, background, a, b, read
    )


def _shift(affine: np.ndarray, contract: Contract, placement: str) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Cells from the first of the grid that a scan is kept on to that of the model's box, and what is to be said.

    Args:
        affine: (4, 4) of the grid that it is kept on, RAS+.
        contract: Of the model.
        placement: Where that grid lies, a name of `swift.data.store.spaces`.
    """
    if contract.placement != V1:
        other = contract.placement and contract.placement != placement
        differs = (f"grid placed by {placement}, but the model was trained on {contract.placement}",) if other else ()
        return (0, 0, 0), differs
    if placement != MNI:
        return (0, 0, 0), (
            "not known to lie in MNI space: its grid is not moved to the box that the model was trained on, of "
            f"{contract.placement}",
        )
    exact = (v1_box(contract.grid, contract.spacing) - affine[:3, 3]) / contract.spacing
    x, y, z = (int(cells) for cells in np.rint(exact))
    off = float(np.abs(exact - np.rint(exact)).max()) * contract.spacing
    said = (f"the box of {contract.placement} is met to {off:.1f} mm",) if off > 0.01 else ()
    return (x, y, z), said


def mean_image(scan: Scan, fitted: FittedScan) -> nib.Nifti1Image:
    """The scan's mean over time, to draw maps on."""
    if isinstance(scan, StoredScan):
        mean = np.zeros(fitted.mask.shape, np.float32)
        mean[scan.store.mask(scan.place)] = scan.store.array(scan.place, "stats/mean")
        return nib.Nifti1Image(mean, scan.store.affine(scan.place))
    assert fitted.origin is not None
    total, count = np.zeros(fitted.origin.shape), 0
    for frame in fitted.origin.read():
        total += np.nan_to_num(frame)
        count += 1
    return nib.Nifti1Image((total / count).astype(np.float32), fitted.origin.affine)

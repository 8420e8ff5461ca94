"""NIfTI files read defensively: the header is checked before anything is allocated, frames stream one at a time.

Legend: X Y Z voxels along right, anterior, superior (RAS+); T frames. Memory follows the bytes that are really in a
file, never the shape that its header declares.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt2axcodes, ornt_transform
from nibabel.spatialimages import HeaderDataError

from swift.data.ingest.tr import resolve_tr
from swift.utils.errors import BadScan

SUFFIXES = (".nii", ".nii.gz")
GZIP_MAX_RATIO = 1100
"""Deflate cannot shrink by more than about 1032; a header that asks for more lies."""
PIECE = 1 << 24
"""Bytes asked of a stream at once, so that a lying header costs at most this much memory."""
VOXEL_MM = (0.1, 20.0)
LONGEST_QUATERNION = 1.001
"""Beyond, a q-form is not a matter of rounding."""
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_LENGTH_NAME = {1: "metre", 3: "micron"}


@dataclass(frozen=True)
class Volumes:
    """What the header of one file says, checked, with the orientation brought to RAS+."""

    path: Path
    shape: tuple[int, int, int]
    """Voxels X, Y, Z after reorientation."""
    frames: int
    affine: np.ndarray
    """(4, 4) float64, voxel (RAS+ order) to world mm."""
    orientation: str
    """Axis codes in the file, such as LAS."""
    code: int
    """NIfTI code of the affine: 0 none, 1 scanner, 2 aligned, 3 Talairach, 4 MNI 152."""
    tr: float
    """Seconds between frames; 0 for a single volume."""
    notes: tuple[str, ...]
    """Corrections and assumptions, one sentence each."""
    stored_shape: tuple[int, int, int]
    ornt: np.ndarray
    """(3, 2) nibabel orientation that turns the stored voxel order into RAS+."""
    dtype: np.dtype[Any]
    slope: float
    inter: float
    offset: int

    @property
    def spacing(self) -> np.ndarray:
        """(3,) voxel size in mm along the RAS+ axes."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    def read(self) -> Iterator[np.ndarray]:
        """Yield float32 (X, Y, Z) frames; see iter_frames."""
        return iter_frames(self)


def strip_suffix(path: Path) -> str:
    """Name of a file without .nii or .nii.gz."""
    for suffix in reversed(SUFFIXES):
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def plan_scan(path: str | Path, *, tr: float | None = None, sidecar_tr: float | None = None) -> Volumes:
    """Read and check the header of a 4D scan; no voxel is read.

    Args:
        path: A .nii or .nii.gz file.
        tr: Seconds between frames as told by the user; wins over everything.
        sidecar_tr: RepetitionTime of the JSON sidecar; wins over the header.

    Returns:
        The plan, orientation RAS+, `tr` in seconds.

    Raises:
        BadScan: with a one-line reason.
    """
    path = Path(path)
    header = _read_header(path)
    shape = _shape(header, path)
    if shape[3] == 1:
        raise BadScan(f"{path.name}: 3D, shape {shape[:3]}; a scan needs 4 dimensions (x, y, z, time)")
    seconds, notes = resolve_tr(path.name, float(header["pixdim"][4]), int(header["xyzt_units"]) & 0x38, tr, sidecar_tr)
    return _volumes(path, header, shape, seconds, notes)


def plan_volume(path: str | Path) -> Volumes:
    """Read and check the header of a 3D image such as a mask (a fourth dimension of 1 is fine).

    Raises:
        BadScan: with a one-line reason.
    """
    path = Path(path)
    header = _read_header(path)
    shape = _shape(header, path)
    if shape[3] != 1:
        raise BadScan(f"{path.name}: {shape[3]} frames; a mask or a map has one volume")
    return _volumes(path, header, shape, 0.0, [])


def iter_frames(plan: Volumes) -> Iterator[np.ndarray]:
    """Yield each frame as a float32 (X, Y, Z) array in RAS+ order, scaled by slope and intercept; NaN kept.

    After the last frame the rest of the file is read: only at its end does a gzip stream tell that a byte was changed.

    Raises:
        BadScan: the data end early, are not readable or differ from the checksum of the gzip file.
    """
    count = int(np.prod(plan.stored_shape))
    nbytes = count * plan.dtype.itemsize
    with _open(plan.path) as stream:
        _skip(stream, plan)
        for frame in range(plan.frames):
            data = _read_exactly(stream, nbytes, plan, frame)
            values = np.frombuffer(data, dtype=plan.dtype).reshape(plan.stored_shape, order="F").astype(np.float32)
            if plan.slope != 1.0:
                values *= np.float32(plan.slope)
            if plan.inter != 0.0:
                values += np.float32(plan.inter)
            yield apply_orientation(values, plan.ornt)
        _read_to_end(stream, plan)


def read_volume(plan: Volumes) -> np.ndarray:
    """The single volume of a 3D image: float32 (X, Y, Z), RAS+."""
    (volume,) = iter_frames(plan)
    return volume


def as_stored(values: np.ndarray, affine: np.ndarray, ornt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn a volume back into the voxel order of a file: what `Volumes` did to it, undone.

    Args:
        values: (X, Y, Z) in RAS+ order.
        affine: (4, 4) voxel (RAS+ order) to world mm.
        ornt: Of `Volumes`.

    Returns:
        The volume as stored, and the affine of the file.
    """
    ras = np.array([[0, 1], [1, 1], [2, 1]])
    stored = np.ascontiguousarray(apply_orientation(values, ornt_transform(ras, ornt)))
    return stored, affine @ np.linalg.inv(inv_ornt_aff(ornt, stored.shape))


def _read_header(path: Path) -> nib.Nifti1Header:
    """The unchecked header: our own checks follow, so that every correction is said."""
    if not path.is_file():
        raise BadScan(f"{path}: no such file")
    if not path.name.endswith(SUFFIXES):
        raise BadScan(f"{path.name}: not a .nii or .nii.gz file")
    with _open(path) as stream:
        try:
            head = stream.read(540)
        except (EOFError, OSError, zlib.error) as error:
            raise BadScan(f"{path.name}: header not readable ({_one_line(error)})") from error
    if len(head) < 348:
        raise BadScan(f"{path.name}: {len(head)} bytes; a NIfTI header has 348 (truncated, or not NIfTI)")
    size = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    try:
        if 540 in size:
            header: nib.Nifti1Header = nib.Nifti2Header(head[:540], check=False)
        elif 348 in size and head[344:346] in (b"n+", b"ni"):
            header = nib.Nifti1Header(head[:348], check=False)
        else:
            raise BadScan(f"{path.name}: not NIfTI (header size field {size[0]}, magic {head[344:348]!r})")
    except (HeaderDataError, ValueError) as error:
        raise BadScan(f"{path.name}: not a NIfTI header ({_one_line(error)})") from error
    if bytes(header["magic"].tobytes())[:2] == b"ni":
        raise BadScan(f"{path.name}: header of an .hdr/.img pair; convert it to one .nii.gz file")
    return header


def _shape(header: nib.Nifti1Header, path: Path) -> tuple[int, int, int, int]:
    """(X, Y, Z, T) as stored; T is 1 for a 3D image. Dimensions beyond the fourth must be 1, but for (X, Y, Z, 1, T).

    So few as 3 values a voxel are a vector (a warp, a colour) and no series.
    """
    dim = [int(value) for value in header["dim"]]
    rank = dim[0]
    if not 1 <= rank <= 7 or any(size < 1 for size in dim[1 : rank + 1]):
        raise BadScan(f"{path.name}: wrong dimensions in the header, dim = {dim}; sizes are 1 or more")
    sizes = dim[1 : rank + 1] + [1] * (7 - rank)
    if sizes[3] == 1 and sizes[4] > 3 and sizes[5:] == [1, 1]:
        sizes[3:5] = sizes[4], 1  # (X, Y, Z, 1, T): how torchio and ANTs write a series; the bytes lie alike
    if any(size != 1 for size in sizes[4:]):
        raise BadScan(f"{path.name}: {rank}D, shape {tuple(sizes[:rank])}; a scan has 4 dimensions (x, y, z, time)")
    if min(sizes[:3]) < 2:
        raise BadScan(f"{path.name}: shape {tuple(sizes[:rank])}; a volume has at least 2 voxels along x, y and z")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _volumes(
    path: Path, header: nib.Nifti1Header, shape: tuple[int, int, int, int], tr: float, notes: list[str]
) -> Volumes:
    dtype = _dtype(header, path)
    offset = _check_size(header, path, shape, dtype)
    slope, inter = _scaling(header, path, dtype, notes)
    affine = _affine(header, path, notes)
    code = int(header["sform_code"]) if int(header["sform_code"]) > 0 else max(0, int(header["qform_code"]))
    ornt = io_orientation(affine)
    stored = shape[:3]
    x, y, z = (stored[int(axis)] for axis in np.argsort(ornt[:, 0]))
    return Volumes(
        path=path,
        shape=(x, y, z),
        frames=shape[3],
        affine=affine @ inv_ornt_aff(ornt, stored),
        orientation="".join(str(code) for code in ornt2axcodes(ornt)),
        code=code,
        tr=tr,
        notes=tuple(notes),
        stored_shape=stored,
        ornt=ornt,
        dtype=dtype,
        slope=slope,
        inter=inter,
        offset=offset,
    )


def _dtype(header: nib.Nifti1Header, path: Path) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise BadScan(f"{path.name}: unknown data type code {code}") from error
    if dtype.kind not in "iuf" or dtype.itemsize == 0 or dtype.itemsize > 8:
        raise BadScan(f"{path.name}: data type {dtype} (code {code}); only real numbers of at most 64 bits can be read")
    return dtype


def _check_size(header: nib.Nifti1Header, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The byte where the data begin; refuses a file that cannot hold what its header declares."""
    first, raw = int(header.sizeof_hdr) + 4, float(header["vox_offset"])
    if not np.isfinite(raw) or raw != int(raw) or not first <= raw <= 1 << 40:
        raise BadScan(f"{path.name}: vox_offset {raw:g}; data begin at a whole byte from {first} on")
    need = int(raw) + dtype.itemsize * math.prod(shape)  # Python integers: no overflow, however mad the header
    have = path.stat().st_size
    zipped = path.name.endswith(".gz")
    if need > have * (GZIP_MAX_RATIO if zipped else 1):
        raise BadScan(
            f"{path.name}: truncated or false header: shape {tuple(shape)} of {dtype} needs {need:,} bytes"
            f"{' uncompressed' if zipped else ''}, the file has {have:,}"
        )
    return int(raw)


def _scaling(header: nib.Nifti1Header, path: Path, dtype: np.dtype[Any], notes: list[str]) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0.0:
        return 1.0, 0.0  # the standard's way of saying "no scaling"
    if np.isnan(slope):
        notes.append("scl_slope is NaN: values taken as stored, unscaled")
        return 1.0, 0.0
    if np.isnan(inter):
        notes.append("scl_inter is NaN: taken as 0")
        inter = 0.0
    largest = max(abs(float(np.iinfo(dtype).min)), float(np.iinfo(dtype).max)) if dtype.kind in "iu" else 1.0
    bound = abs(slope) * largest + abs(inter)
    if not np.isfinite(bound) or bound > float(np.finfo(np.float32).max):
        raise BadScan(f"{path.name}: scl_slope {slope:g}, scl_inter {inter:g} take {dtype} values out of 32-bit floats")
    return slope, inter


def _affine(header: nib.Nifti1Header, path: Path, notes: list[str]) -> np.ndarray:
    """(4, 4) voxel-to-world matrix in mm, in the stored voxel order, with what had to be assumed said in notes."""
    pixdim = np.asarray(header["pixdim"], dtype=np.float64)
    if (pixdim[1:4] < 0).any():
        notes.append(f"negative voxel sizes {pixdim[1:4].tolist()} in the header: taken as positive")
        header["pixdim"][1:4] = np.abs(pixdim[1:4])
    if pixdim[0] not in (-1.0, 1.0):
        header["pixdim"][0] = 1.0  # as the standard says for 0; it matters for the q-form only
    affine, kind = _matrix(header, path)
    if not np.isfinite(affine).all():
        raise BadScan(f"{path.name}: affine ({kind}) holds NaN or infinity: {np.round(affine[:3], 3).tolist()}")
    unit = int(header["xyzt_units"]) & 0x07
    factor = _MM.get(unit, 1.0)
    if factor != 1.0:
        affine = np.diag([factor, factor, factor, 1.0]) @ affine
        notes.append(f"lengths in the header are in {_LENGTH_NAME[unit]}s: converted to mm")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if (sizes == 0).any() or abs(np.linalg.det(affine[:3, :3] / np.where(sizes > 0, sizes, 1))) < 1e-3:
        raise BadScan(f"{path.name}: singular affine ({kind}): {np.round(affine[:3], 3).tolist()}")
    if sizes.min() < VOXEL_MM[0] or sizes.max() > VOXEL_MM[1]:
        raise BadScan(
            f"{path.name}: voxel size {np.round(sizes, 4).tolist()} mm ({kind}) is not between "
            f"{VOXEL_MM[0]} and {VOXEL_MM[1]} mm"
        )
    if kind == "none":
        codes = "".join(nib.orientations.aff2axcodes(affine))
        notes.append(
            f"no orientation code in the header (qform_code = sform_code = 0): left and right are not certain; "
            f"{codes} assumed, the direction of the NIfTI default affine{_leftover(header, codes)}"
        )
    return affine


def _matrix(header: nib.Nifti1Header, path: Path) -> tuple[np.ndarray, str]:
    """The header's affine and where it came from: sform, qform or none."""
    if int(header["sform_code"]) > 0:
        return np.asarray(header.get_sform(), dtype=np.float64), "sform"
    try:
        if int(header["qform_code"]) > 0:
            return _qform(header), "qform"
    except (HeaderDataError, ValueError) as error:
        raise BadScan(f"{path.name}: q-form not readable ({_one_line(error)})") from error
    if not np.isfinite(header["pixdim"][1:4]).all():
        raise BadScan(f"{path.name}: no orientation code and voxel sizes {header['pixdim'][1:4].tolist()}: no affine")
    return np.asarray(header.get_base_affine(), dtype=np.float64), "none"


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    """(4, 4) of the q-form; a quaternion that rounding made longer than 1 is brought back to 1 (as NIfTI's C code)."""
    parts = np.asarray([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    length = float(np.linalg.norm(parts))
    if 1.0 < length <= LONGEST_QUATERNION:
        header = header.copy()
        # A hair shorter than 1, so that the float32 numbers of the header do not make it longer again.
        for axis, value in zip("bcd", parts / length * (1 - 1e-7), strict=True):
            header[f"quatern_{axis}"] = value
    return np.asarray(header.get_qform(), dtype=np.float64)


def _read_to_end(stream: IO[bytes], plan: Volumes) -> None:
    if not plan.path.name.endswith(".gz"):
        return
    try:
        while stream.read(PIECE):
            pass
    except (EOFError, OSError, zlib.error) as error:
        raise BadScan(f"{plan.path.name}: damaged: {_one_line(error)}; get the file again") from error


def _leftover(header: nib.Nifti1Header, codes: str) -> str:
    """Whether an uncoded s-form left in the header points the same way as what is assumed."""
    with contextlib.suppress(HeaderDataError, ValueError, np.linalg.LinAlgError):
        matrix = np.asarray(header.get_sform(), dtype=np.float64)
        if np.isfinite(matrix).all() and abs(np.linalg.det(matrix[:3, :3])) > 1e-6:
            found = "".join(str(code) for code in nib.orientations.aff2axcodes(matrix))
            return f" (an uncoded s-form in the header {'agrees' if found == codes else f'says {found} instead'})"
    return ""


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        stream = cast("IO[bytes]", gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb"))  # noqa: SIM115
    except OSError as error:
        raise BadScan(f"{path}: cannot be opened ({error.strerror or error})") from error
    with stream:
        yield stream


def _skip(stream: IO[bytes], plan: Volumes) -> None:
    left = plan.offset
    while left:
        try:
            piece = stream.read(min(left, PIECE))
        except (EOFError, OSError, zlib.error) as error:
            raise BadScan(f"{plan.path.name}: truncated before the data begin ({_one_line(error)})") from error
        if not piece:
            raise BadScan(f"{plan.path.name}: truncated before the data begin")
        left -= len(piece)


def _read_exactly(stream: IO[bytes], nbytes: int, plan: Volumes, frame: int) -> bytearray:
    data = bytearray()
    while len(data) < nbytes:
        reason = "the file ends"
        try:
            piece = stream.read(min(nbytes - len(data), PIECE))
        except (EOFError, OSError, zlib.error) as error:
            piece, reason = b"", _one_line(error)
        if not piece:
            raise BadScan(f"{plan.path.name}: truncated or damaged: holds {frame} of {plan.frames} frames ({reason})")
        data += piece
    return data


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

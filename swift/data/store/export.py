"""Out of a store again: NIfTI files with the right affine.

Legend: X Y Z voxels of the grid (RAS+), T frames, V in-brain voxels.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from swift.data.store import format as fmt
from swift.data.store.reader import Store
from swift.data.store.spaces import MNI_CODE
from swift.data.store.tables import EXPORTED
from swift.utils.errors import UserError


def export_scan(store: Store, scan: int, folder: Path) -> tuple[Path, Path]:
    """Write <scan_id>_bold.nii.gz (float32, 0 outside the brain) and <scan_id>_mask.nii.gz, one frame in memory.

    Args:
        store: An open store.
        scan: Place in store.scans.
        folder: Where to; made if need be.

    Returns:
        The two files.

    Raises:
        UserError: unwritable, or damaged data (every frame is checked).
    """
    info = store.scans[scan]
    affine, mask = store.affine(scan), store.mask(scan)
    a, b = store.normalizer(scan, "none")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    bold, brain = folder / f"{info.scan_id}_bold.nii.gz", folder / f"{info.scan_id}_mask.nii.gz"
    code = MNI_CODE if store.placement == "MNI152" else 1
    header = _header((*store.grid, info.frames), np.float32, affine, info.tr, code)
    volume = np.zeros(store.grid, np.float32)
    with fmt.atomic(bold) as temp, temp.open("wb") as raw, gzip.GzipFile("", "wb", 4, raw, mtime=0) as stream:
        stream.write(header.binaryblock + bytes(4))
        for frame in range(info.frames):
            volume[mask] = store.read(scan, frame, frame + 1, verify=True)[0] * a + b
            stream.write(volume.tobytes(order="F"))
    with fmt.atomic(brain) as temp, temp.open("wb") as raw, gzip.GzipFile("", "wb", 4, raw, mtime=0) as stream:
        stream.write(_header(store.grid, np.uint8, affine, None, code).binaryblock + bytes(4))
        stream.write(mask.astype(np.uint8).tobytes(order="F"))
    return bold, brain


def export_table(store: Store, scans: Sequence[int], folder: Path) -> Path:
    """Write what the image files cannot say, so that `ingest` of the folder gives the same scans again.

    exported.csv has a line a scan: names, mask, TR, start time, space, phenotypes; lines of scans that were exported
    there before stay. Confounds and events go into TSV files beside it.

    Args:
        store: An open store.
        scans: Places in store.scans that `export_scan` wrote to the folder.
        folder: That folder.

    Returns:
        The table.

    Raises:
        UserError: unwritable.
    """
    target = folder / EXPORTED
    rows: dict[str, dict[str, str]] = {}
    if target.exists():
        rows = {
            row["scan_id"]: row for row in csv.DictReader(io.StringIO(target.read_text(encoding="utf-8"), newline=""))
        }
    for scan in scans:
        info, attributes = store.scans[scan], store.attributes(scan)
        row = {"path": f"{info.scan_id}_bold.nii.gz", "scan_id": info.scan_id, "subject": info.subject}
        row |= {name: getattr(info, name) for name in ("session", "task", "run", "site")}
        row |= {"mask": f"{info.scan_id}_mask.nii.gz", "tr": repr(info.tr)}
        row |= {name: str(attributes.get(name, "")) for name in ("start_time", "space")}
        confounds = store.confounds(scan)
        if confounds:
            row["confounds"] = f"{info.scan_id}_desc-confounds_timeseries.tsv"
            lines = ["\t".join(confounds)]
            for values in zip(*confounds.values(), strict=True):
                lines.append("\t".join("n/a" if np.isnan(value) else str(value) for value in values))
            fmt.write_bytes(folder / row["confounds"], ("\n".join(lines) + "\n").encode())
        if events := store.events(scan):
            row["events"] = f"{info.scan_id}_events.tsv"
            fmt.write_bytes(folder / row["events"], events.encode())
        rows[info.scan_id] = row | {name: value for name, value in info.phenotypes.items() if name not in row}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, names, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows[name] for name in sorted(rows))
    fmt.write_bytes(target, text.getvalue().encode())
    return target


def _header(shape: tuple[int, ...], dtype: type, affine: np.ndarray, tr: float | None, code: int) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_qform(affine, code=code)
    header.set_sform(affine, code=code)
    header.set_xyzt_units("mm", "sec")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_zooms((*spacing, tr) if tr is not None else tuple(spacing))
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 1, 0, 352
    return header

"""SwiFT v1's way of keeping a scan: a folder of frame_0.pt, frame_1.pt, ... one tensor a frame.

Nothing but tensors is unpickled (weights_only). Such a folder knows neither TR nor affine: both are told or assumed,
and that is said in the notes.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swift.data.ingest.names import FRAME
from swift.data.ingest.tr import resolve_tr
from swift.utils.errors import BadScan


@dataclass(frozen=True)
class FrameFolder:
    """A planned v1 folder; the same face as swift.data.ingest.nifti.Volumes."""

    path: Path
    shape: tuple[int, int, int]
    frames: int
    affine: np.ndarray
    orientation: str
    tr: float
    notes: tuple[str, ...]
    files: tuple[Path, ...]

    def read(self) -> Iterator[np.ndarray]:
        """Yield float32 (X, Y, Z) frames."""
        for file in self.files:
            frame = _load(file)
            if frame.shape != self.shape:
                raise BadScan(f"{self.path.name}: {file.name} is {frame.shape}, frame 0 is {self.shape}")
            yield frame

    def digest(self) -> str:
        """SHA-256 over the files in frame order."""
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(file.read_bytes())
        return whole.hexdigest()


def plan_frames(path: Path, spacing: float, tr: float | None = None, sidecar_tr: float | None = None) -> FrameFolder:
    """Check a folder of frames; only the first is loaded.

    Args:
        path: Folder with frame_<n>.pt, n = 0 ... T - 1 without a gap.
        spacing: Voxel size in mm, assumed isotropic.
        tr: Seconds between frames; a folder does not know it.
        sidecar_tr: RepetitionTime of a JSON sidecar.

    Raises:
        BadScan: a gap, fewer than 2 frames, no TR, no tensor.
    """
    numbered = {int(match.group(1)): file for file in path.iterdir() if (match := FRAME.fullmatch(file.name))}
    files = tuple(numbered[number] for number in sorted(numbered))
    missing = sorted(set(range(len(files))) - set(numbered))
    if missing:
        raise BadScan(f"{path.name}: frame_{missing[0]}.pt is missing among {len(files)} frames")
    if len(files) < 2:
        raise BadScan(f"{path.name}: {len(files)} frame; a scan has at least 2")
    seconds, notes = resolve_tr(path.name, 0.0, 0, tr, sidecar_tr)
    shape = _load(files[0]).shape
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [-spacing * (size - 1) / 2 for size in shape]
    notes.append(f"SwiFT v1 frames hold no affine: RAS+ and {spacing:g} mm assumed, the middle of the box at 0, 0, 0")
    return FrameFolder(path, (shape[0], shape[1], shape[2]), len(files), affine, "RAS", seconds, tuple(notes), files)


def _load(file: Path) -> np.ndarray:
    import torch

    where = f"{file.parent.name}/{file.name}"
    try:
        tensor: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).split("\n")[0].split(". ")[0] or type(error).__name__).strip()
        raise BadScan(f"{where}: not a plain tensor file ({reason})") from error
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
        raise BadScan(f"{where}: holds {type(tensor).__name__}, not a real tensor")
    volume = np.asarray(tensor.float().numpy())
    while volume.ndim > 3 and 1 in (volume.shape[0], volume.shape[-1]):
        volume = volume[..., 0] if volume.shape[-1] == 1 else volume[0]
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise BadScan(f"{where}: shape {tuple(tensor.shape)}; a frame has 3 dimensions (and others of size 1)")
    return volume

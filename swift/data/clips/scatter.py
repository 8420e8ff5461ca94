"""From packed brain voxels to the dense grid, on the device that the model runs on.

4 to 8 times fewer bytes cross to the device than of dense clips, and no CPU time goes into zeros.
Legend: B batch, T frames, X Y Z grid, V brain voxels of a clip, N = X * Y * Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PACKED = ("codes", "index", "a", "b", "meta")
"""Tensors of a packed batch, see `swift.data.clips.dataset.ClipDataset`."""


def to_dense(
    packed: dict[str, Any],
    grid: Sequence[int],
    frames: int,
    background: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Scatter a packed batch.

    Args:
        packed: codes (sum T V,) int16, index (sum V,) int32, a and b (sum V,) float32, meta (B, 4) int64, on one
            device; voxels: B ints (0: padding row).
        grid: X, Y, Z.
        frames: T.
        background: Value outside the brain.
        dtype: Of the result; the multiply-add is done in float32.

    Returns:
        bold (B, 1, X, Y, Z, T), a permuted view of (B, T, X, Y, Z) memory: codes * a + b in the brain, background
        elsewhere; brain (B, X, Y, Z) bool; sample_id, scan, start (B,) int64 (scan and start -1 in padding rows);
        valid (B,) bool.
    """
    voxels: list[int] = packed["voxels"]
    codes, index, a, b, meta = (packed[name] for name in PACKED)
    cells = grid[0] * grid[1] * grid[2]
    dense = torch.full((len(voxels), frames, cells), background, dtype=dtype, device=codes.device)
    brain = torch.zeros((len(voxels), cells), dtype=torch.bool, device=codes.device)
    row = at = 0
    for place, count in enumerate(voxels):
        if count:
            part = slice(at, at + count)
            where = index[part].long()
            clip = codes[row : row + frames * count].view(frames, count)
            _scatter(dense[place], where, clip, a[part], b[part])
            brain[place].index_fill_(0, where, True)
        row, at = row + frames * count, at + count
    bold = dense.view(len(voxels), frames, *grid).permute(0, 2, 3, 4, 1).unsqueeze(1)
    sample, scan, start, valid = meta.unbind(1)
    return {
        "bold": bold,
        "brain": brain.view(len(voxels), *grid),
        "sample_id": sample.contiguous(),
        "scan": scan.contiguous(),
        "start": start.contiguous(),
        "valid": valid.bool(),
    }


def _scatter(dense: torch.Tensor, where: torch.Tensor, clip: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Make dense (T, N) at `where` (V,) clip (T, V) * a + b."""
    if dense.device.type == "cpu":  # frame by frame stays in the cache: half the time of the whole clip at once
        for frame, codes in zip(dense, clip, strict=True):
            frame.scatter_(0, where, torch.addcmul(b, codes.float(), a).to(dense.dtype))
    else:
        dense.index_copy_(1, where, torch.addcmul(b, clip.float(), a).to(dense.dtype))

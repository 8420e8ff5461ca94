"""The clips of a micro-batch that went wrong: scan and frames, and whether they are what the store has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.data.clips.scatter import to_dense
from swift.data.store.format import CorruptData
from swift.train.callbacks.nonfinite import describe

CLOSE = 1e-3
"""Relative difference of two values that were computed from the same codes on different devices."""


def clips_of(data: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry a clip of a batch: sample, scan, subject, shard, frames, statistics, checksum and comparison.

    The frames are read from the store again, now with their checksums, and made into a clip again.

    Args:
        data: The DataModule (`swift.data.module.ClipDataModule`).
        batch: Dense, with sample_id, scan, start and valid.
    """
    names = ("sample_id", "scan", "start", "valid")
    if any(name not in batch for name in names):
        return []
    rows = zip(*(batch[name].tolist() for name in names))
    return [_clip(data, batch, place, *row) for place, row in enumerate(rows) if row[3]]


def _clip(
    data: Any, batch: Mapping[str, Any], place: int, sample: int, scan: int, start: int, _: int
) -> dict[str, Any]:
    info, spec = data.store.scans[scan], data.spec
    entry = {
        "sample": sample,
        "scan": info.scan_id,
        "subject": info.subject,
        "shard": info.shard,
        "frames": {"first": start, "last": start + spec.span - 1, "step": spec.frame_stride},
        "values": describe(batch["bold"][place]),
    }
    checksum, differing = "ok", None
    try:
        data.store.read(scan, start, start + spec.span, spec.frame_stride, None, True)
    except CorruptData as error:
        checksum = str(error)
    try:
        again = read_again(data, [(sample, scan, start, 1)])["bold"][0]
        differing = different(batch["bold"][place].detach().cpu(), again)
    except (CorruptData, OSError) as error:
        checksum = str(error)
    return {**entry, "checksum": checksum, "voxels_unlike_the_store": differing}


def different(clip: Tensor, again: Tensor) -> int:
    """Values of two clips that differ by more than rounding."""
    near = (clip - again).abs() <= CLOSE * (1 + again.abs())
    return int((~(near | (clip.isnan() & again.isnan()) | (clip == again))).sum())


def read_again(data: Any, rows: list[tuple[int, int, int, int]]) -> dict[str, Tensor]:
    """The dense training batch of clips (sample_id, scan, start, valid), made anew on the CPU."""
    codes, tables, voxels = [], [], []
    for _, scan, start, valid in rows:
        count = data.store.scans[scan].voxels if valid else 0
        voxels.append(count)
        if valid:
            span, stride = data.spec.span, data.spec.frame_stride
            codes.append(data.store.read(scan, start, start + span, stride).ravel())
            index, (a, b) = np.empty(count, np.int32), np.empty((2, count), np.float32)
            data.store.tables(scan, data.data.normalization, index, a, b)
            tables.append((index, a, b))
    packed: dict[str, Any] = {"codes": torch.from_numpy(np.concatenate(codes)), "voxels": voxels}
    for name, parts in zip(("index", "a", "b"), zip(*tables)):
        packed[name] = torch.from_numpy(np.concatenate(parts))
    packed["meta"] = torch.tensor(rows, dtype=torch.int64)
    dense = to_dense(packed, data.store.grid, data.data.frames, data.data.background, data.dtype)
    return dense if data.augment is None else data.augment(dense)

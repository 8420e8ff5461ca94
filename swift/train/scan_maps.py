"""Spatial maps from training frames: one set that all scans share, or each scan's own.

A clip in training gets maps that were fitted without its own frames (cross-fitting): else they would fit it better than
any held-out clip, and the network would learn what such maps leave.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from swift.data.module import ClipDataModule
from swift.evaluate.linear_baselines import KEEP, MOST_FRAMES, TrainingFrames, add_scans, union_of
from swift.models.low_rank import LowRank, Sketch
from swift.models.maps import Maps
from swift.train.base import Batch
from swift.utils.errors import UserError

CACHE_BYTES = 512e6
"""Maps of scans that are kept in memory."""


def _scaled(model: LowRank, maps: int) -> Tensor:
    """(K, V) float32, each map times the standard deviation of its course; 0 beyond the model's rank."""
    out = torch.zeros(maps, len(model.basis))
    out[: model.rank] = (model.basis * model.variance.sqrt().float()).T
    return out


def shared_maps(data: ClipDataModule, maps: int) -> dict[str, Tensor]:
    """First values of the shared maps: a low-rank Gaussian of frames dealt evenly to the training scans.

    Returns:
        maps (K, X, Y, Z) and log_noise (1,).

    Raises:
        UserError: more maps than the training frames can give, or scans that are not in one space.
    """
    frames = TrainingFrames(data)
    scans = sorted(frames.parts)
    data.store.check_one_space(scans, "model.maps_of=shared")
    scans = scans[:: -(-len(scans) // MOST_FRAMES)]
    grid = data.store.grid
    index = union_of(frames, scans, int(np.prod(grid)))
    sketch = Sketch(max(KEEP, 2 * maps))
    add_scans(sketch, frames, scans, index, max(MOST_FRAMES // len(scans), 1))
    model = sketch.fit(maps)
    out = torch.zeros(maps, int(np.prod(grid)))
    out[:, torch.from_numpy(index)] = _scaled(model, maps)
    return {"maps": out.view(maps, *grid), "log_noise": torch.tensor([model.noise]).log()}


class ScanMaps:
    """The maps of each scan, made when they are asked for.

    They follow from the training frames alone, so that a resumed run makes the same ones again.

    Args:
        data: Of the run.
        maps: K.
    """

    def __init__(self, data: ClipDataModule, maps: int) -> None:
        self.frames, self.maps = TrainingFrames(data), maps
        self.grid, self.span = data.store.grid, data.spec.span
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor, float]] = {}
        self._bytes = 0

    def __call__(self, batch: Batch, training: bool) -> Maps:
        """Maps (B, K, X, Y, Z) and s2 (B,) of a batch, on its device; zeros in padding rows.

        Raises:
            UserError: a scan without training frames, or with fewer than can give a map.
        """
        device = batch["bold"].device
        cells = int(np.prod(self.grid))
        out = torch.zeros(len(batch["scan"]), self.maps, cells, device=device)
        noise = torch.ones(len(batch["scan"]), device=device)
        for row, (scan, start) in enumerate(zip(batch["scan"].tolist(), batch["start"].tolist())):
            if scan < 0:
                continue
            index, maps, noise[row] = self.of(scan, start if training else -1)
            out[row].index_copy_(1, index.to(device), maps.to(device))
        return out.view(-1, self.maps, *self.grid), noise

    def of(self, scan: int, start: int) -> tuple[Tensor, Tensor, float]:
        """(V,) flat places, (K, V) maps and s2 of a scan, fitted without the clip at `start` (-1: to all)."""
        if (scan, start) in self._kept:
            return self._kept[scan, start]
        found = self._fit(scan, start)
        size = found[1].numel() * 4
        if self._bytes + size <= CACHE_BYTES:
            self._kept[scan, start] = found
            self._bytes += size
        return found

    def _fit(self, scan: int, start: int) -> tuple[Tensor, Tensor, float]:
        name = self.frames.store.scans[scan].scan_id
        if scan not in self.frames.parts:
            raise UserError(
                f"model.maps_of=scan: maps belong to each scan, and {name} has no training frames to make them from; "
                "subjects that are held out need model.maps_of=shared"
            )
        first, length = self.frames.parts[scan]
        begin = start - first if start >= 0 else length
        sketch = Sketch(max(KEEP, 2 * self.maps))
        left = 0
        for low, high in ((max(begin - MOST_FRAMES, 0), begin), (begin + self.span, length)):
            if high > low:
                sketch.add(self.frames.read(scan, low, high))
                left += high - low
        if left < 3:
            raise UserError(
                f"model.maps={self.maps}: scan {name} has {length} training frames, which leave {left} beside a clip "
                f"of {self.span}: too few to make maps from"
            )
        model = sketch.fit(min(self.maps, left - 2))
        return torch.from_numpy(self.frames.index(scan)).long(), _scaled(model, self.maps), model.noise

"""Random changes of dense training clips: MONAI's flip, affine and intensity transforms, and noise.

One draw holds for all frames of a clip, which are the channels that MONAI sees. A draw is a function of the run's seed
and the sample's identity, so it does not depend on batches, ranks or workers, and a resumed run repeats it. Outside the
brain, clips keep the background value; the brain mask moves with the clip.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from swift.config.schema_data import AugmentConfig
from swift.data.clips.order import UINT64


def is_on(cfg: AugmentConfig) -> bool:
    """Whether anything is ever changed."""
    return max(cfg.flip, cfg.affine, cfg.intensity, cfg.noise) > 0


class Augment:
    """Changes batches as `swift.data.clips.scatter.to_dense` makes them; gives new tensors, on the device of the batch.

    Args:
        cfg: Which changes, how large, how often.
        seed: Of the run.
        spacing: Voxel size, mm.
        background: Value outside the brain, of batches that do not carry their own (`background`, (B,)).
    """

    def __init__(self, cfg: AugmentConfig, seed: int, spacing: float, background: float) -> None:
        self.cfg, self.seed, self.spacing, self.background = cfg, seed, spacing, background
        self._made: dict[torch.device, tuple[Any, Any]] = {}

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give bold (B, 1, X, Y, Z, T) and brain (B, X, Y, Z) anew, and hand the rest on."""
        frames = batch["bold"][:, 0].permute(0, 4, 1, 2, 3).contiguous()  # (B, T, X, Y, Z), the memory as it lies
        bold, brain = torch.empty_like(frames), torch.empty_like(batch["brain"])
        for place, sample in enumerate(batch["sample_id"].tolist()):
            outside = float(batch["background"][place]) if "background" in batch else self.background
            bold[place], brain[place] = self._one(frames[place], batch["brain"][place], sample, outside)
        return {**batch, "bold": bold.permute(0, 2, 3, 4, 1).unsqueeze(1), "brain": brain}

    def _one(
        self, bold: torch.Tensor, brain: torch.Tensor, sample: int, outside: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change bold (T, X, Y, Z) and brain (X, Y, Z) of one sample."""
        key = np.array([self.seed & UINT64, sample], np.uint64)
        words = np.random.Philox(key=key).random_raw(4)  # for MONAI, to seed the noise, its strength, its chance
        space, values = self._transforms(bold.device)
        space.set_random_state(int(words[0]) & 0xFFFFFFFF)
        values.set_random_state(int(words[0]) >> 32)
        moved = space({"bold": bold, "brain": brain[None].to(bold.dtype)})
        inside = _plain(moved["brain"])[0] > 0.5
        changed = _plain(values(_plain(moved["bold"])))
        strength, chance = (int(word) / 2.0**64 for word in words[2:])
        if chance < self.cfg.noise:
            # Not MONAI's: it draws on the CPU, in float64, for voxels outside the brain too (measured: docs/data.md).
            generator = torch.Generator(bold.device).manual_seed(int(words[1]) >> 1)
            noise = torch.randn(bold.shape, generator=generator, device=bold.device, dtype=bold.dtype)
            changed = changed.add(noise, alpha=float(strength) * self.cfg.noise_std)
        background = torch.tensor(outside, dtype=bold.dtype, device=bold.device)
        return torch.where(inside, changed, background), inside

    def _transforms(self, device: torch.device) -> tuple[Any, Any]:
        """MONAI's transforms of place, and of values; imported when the first batch needs them."""
        if device not in self._made:
            from monai import transforms as monai

            cfg, voxels = self.cfg, self.cfg.shift / self.spacing
            keys, angle = ("bold", "brain"), math.radians(cfg.rotate)
            place = [
                monai.RandFlipd(keys, prob=cfg.flip, spatial_axis=0),
                monai.RandAffined(
                    keys,
                    prob=cfg.affine,
                    rotate_range=(angle,) * 3,
                    translate_range=(voxels,) * 3,
                    scale_range=(cfg.zoom,) * 3,
                    mode=("bilinear", "nearest"),
                    padding_mode=("border", "zeros"),
                    device=device,
                ),
            ]
            values = [
                monai.RandScaleIntensity(cfg.intensity_scale, prob=cfg.intensity),
                monai.RandShiftIntensity(cfg.intensity_shift, prob=cfg.intensity),
            ]
            self._made[device] = monai.Compose(place), monai.Compose(values)
        return self._made[device]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without MONAI's metadata."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor

"""Reconstruction of held-out clips next to honest baselines, and the clip that the figure shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.config.schema import Config
from swift.evaluate.linear_baselines import LinearBaselines
from swift.evaluate.reconstruction_baselines import BaselineScores, masked_l1_sum
from swift.models.masking import mask_voxels

Batch = dict[str, Tensor]


@torch.no_grad()
def compare(
    cfg: Config,
    batches: Iterable[Batch],
    tr: Sequence[float],
    figure_npz: Path | None,
    reconstruct: Callable[[Batch], tuple[Tensor, Tensor]],
    device: torch.device,
    add_up: Callable[[Tensor], Tensor] = lambda part: part,
    linear: LinearBaselines | None = None,
) -> dict[str, Any]:
    """L1 on masked brain voxels of the model and of each baseline, over all batches of all ranks.

    Args:
        cfg: of the run.
        batches: dense held-out batches on the model's device.
        tr: repetition time of every scan of the store, s (for the figure's axis).
        figure_npz: where to keep the first clip for the reconstruction figure; None: nowhere.
        reconstruct: a batch to the model's prediction and the token mask it was made under.
        device: of the model.
        add_up: the sum of a tensor over all ranks.
        linear: fitted baselines to score beside those that need no fit; None: none.

    Returns:
        {"val_l1": float, "baselines": {name: float}, "baseline_notes": [sentences], "beats": [names], "clips": int}.
    """
    scores = BaselineScores()
    data = cfg.data
    total, count, clips = 0.0, 0.0, 0.0
    if linear is not None:
        linear.agree(add_up, device)
    for index, batch in enumerate(batches):
        prediction, mask = reconstruct(batch)
        masked = mask_voxels(mask, cfg.model.patch_size, (*data.grid, data.frames))
        part, voxels = masked_l1_sum(prediction.float(), batch["bold"], masked, batch["brain"], batch["valid"])
        total, count, clips = total + float(part), count + int(voxels), clips + int(batch["valid"].sum())
        fitted = linear.predict(batch["bold"], masked, batch["brain"], batch["scan"], batch["valid"]) if linear else {}
        scores.update(batch["bold"], masked, batch["brain"], batch["valid"], fitted)
        if index == 0 and figure_npz is not None:
            _keep_clip(
                figure_npz, batch, prediction, masked, data.frame_stride * tr[int(batch["scan"][0])], data.spacing
            )
    sums = torch.tensor([total, count, clips], dtype=torch.float64, device=device)
    total, count, clips = (float(value) for value in add_up(sums))
    scores.sums = {name: add_up(value) for name, value in scores.sums.items()}
    scores.count = add_up(torch.as_tensor(scores.count, device=device))
    val_l1 = total / max(count, 1)
    baselines = scores.compute()
    return {
        "val_l1": val_l1,
        "baselines": baselines,
        "baseline_notes": linear.notes if linear is not None else [],
        "beats": [name for name, value in baselines.items() if val_l1 < value],
        "clips": int(clips),
    }


def _keep_clip(
    path: Path, batch: Batch, prediction: torch.Tensor, masked: torch.Tensor, tr: float, spacing: float
) -> None:
    """The first clip of a batch as arrays (X, Y, Z, T); tr: seconds between its frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        original=batch["bold"][0, 0].cpu().numpy().astype(np.float32),
        masked=masked[0].cpu().numpy(),
        reconstructed=prediction[0, 0].float().cpu().numpy(),
        brain=batch["brain"][0].cpu().numpy(),
        tr=tr,
        spacing=spacing,
        frame=batch["bold"].shape[-1] // 2,
    )

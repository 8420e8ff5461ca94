"""How slowly BOLD and the features of every layer change, into RUN/temporal.json.

A scan is cut into clips one after the other, encoded with nothing hidden, and the features of its clips are joined to
series over the whole scan, one for each token that sees brain and each channel (a random part of them). BOLD: the mean
of each patch of stage 1. The control encodes the same frames in a random order: what is then left of the
autocorrelation is made by the model (windows, positions), not by the signal.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.utils.errors import UserError
from swift.utils.files import replace_text

if TYPE_CHECKING:
    import numpy as np

    from swift.inference.fit_scan import FittedScan, Fitting
    from swift.inference.model import Trained

log = logging.getLogger("swift.series")

SERIES = 512
"""Series a layer, drawn at random: enough for a mean, whatever the width."""


def scan_series(
    trained: Trained, scan: FittedScan, frames: int, order: np.ndarray | None, seed: int, device: Any
) -> dict[str, np.ndarray]:
    """Layer -> (T, K) series of one scan.

    Args:
        trained: The model.
        scan: Brought to its input.
        frames: Of the scan to use, a multiple of the clip.
        order: (frames,) order to show them in; None: as they are.
        seed: Which series are kept.
        device: Of the model.
    """
    import numpy as np
    import torch

    from swift.models.pooling import brain_tokens

    length, patch = scan.contract.frames, trained.config.model.patch_size
    starts = range(0, frames, length)
    clips = torch.cat([scan.clips([start], torch.device("cpu"))["bold"] for start in starts])
    brain = torch.from_numpy(scan.mask)[None]
    bold = clips[:, 0].permute(1, 2, 3, 0, 4).flatten(3)  # (X, Y, Z, all frames)
    if order is not None:
        bold = bold[..., torch.from_numpy(order)]
        clips = bold.unflatten(-1, (len(starts), length)).permute(3, 0, 1, 2, 4)[:, None]
    generator = np.random.default_rng(seed)
    found = {"bold": _patches(bold.numpy(), scan.mask, patch[:3], generator)}
    parts: dict[str, list[np.ndarray]] = {}
    chosen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with torch.inference_mode():
        for clip in clips:
            for stage, feature in enumerate(trained.encoder(clip[None].to(device), brain.to(device))):
                name = f"stage{stage + 1}"
                tokens = feature[0][brain_tokens(brain, patch, stage)[0].to(device)].float().cpu().numpy()
                if name not in chosen:
                    flat = generator.permutation(tokens.shape[0] * tokens.shape[2])[:SERIES]
                    chosen[name] = flat // tokens.shape[2], flat % tokens.shape[2]
                token, channel = chosen[name]
                parts.setdefault(name, []).append(tokens[token, :, channel].T)
    return found | {name: np.concatenate(values) for name, values in parts.items()}


def _patches(bold: np.ndarray, mask: np.ndarray, patch: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """(X, Y, Z, T) -> (T, K) means over the brain voxels of patches, at most SERIES of them."""
    import numpy as np

    cells = np.stack(np.nonzero(mask), -1) // np.asarray(patch)
    _, place, count = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    total = np.zeros((len(count), bold.shape[-1]))
    np.add.at(total, place.reshape(-1), bold[mask])
    keep = generator.permutation(len(count))[:SERIES]
    return (total / count[:, None])[keep].T


def describe_scan(
    trained: Trained, scan: FittedScan, frames: int, lag: float, seed: int, device: Any
) -> dict[str, Any]:
    """Autocorrelation, spectrum slope and Hurst exponent of every layer, frames in order and shuffled.

    Raises:
        UserError: too few frames.
    """
    import numpy as np

    from swift.report.temporal import describe

    contract = scan.contract
    available = min(scan.frames, frames) if frames else scan.frames
    used = available // contract.frames * contract.frames
    if contract.frame_stride != 1:
        raise UserError(f"data.frame_stride={contract.frame_stride}: series over a scan need clips without gaps")
    orders = {"ordered": None, "shuffled": np.random.default_rng(seed).permutation(used)}
    layers: dict[str, dict[str, Any]] = {}
    for condition, order in orders.items():
        for name, series in scan_series(trained, scan, used, order, seed, device).items():
            step = scan.tr * used / len(series)
            entry = layers.setdefault(name, {"seconds": step})
            entry[condition] = describe(series, step, max(int(lag / step), 1))
    return {"scan": scan.scan_id, "subject": scan.subject, "frames": used, "tr": scan.tr, "layers": layers}


def write_series(
    run: Path,
    scans: Sequence[str | Path],
    count: int,
    frames: int,
    lag: float,
    seed: int,
    fitting: Fitting | None = None,
) -> Path:
    """Describe scans with a run's model and write RUN/temporal.json; `fitting`: how scans are brought to its input.

    Raises:
        UserError: no model, no scans, or scans that are too short.
    """
    from swift.inference.fit_scan import Fitting, find_scans, fit
    from swift.inference.model import load_trained
    from swift.report.temporal import FILE
    from swift.utils import device as here

    fitting = fitting or Fitting()
    fitting.check()
    trained = load_trained(run)
    device = here.torch_device(here.kind_here())
    trained.encoder.to(device).eval()
    found = find_scans(scans, trained.contract)[: count or None]
    if not found:
        raise UserError(f"{', '.join(map(str, scans))}: no scan in it")
    described = []
    for index, scan in enumerate(found):
        fitted = fit(scan, trained.contract, fitting)
        for note in fitted.notes:
            log.info("%s: %s", fitted.scan_id, note)
        described.append(describe_scan(trained, fitted, frames, lag, seed + index, device))
        log.info("%s: %s described", run.name, fitted.scan_id)
    content = {
        "model": trained.config.model.name,
        "variant": trained.config.model.variant,
        "position": trained.config.model.position,
        "step": trained.step,
        "clip_seconds": described[0]["tr"] * trained.contract.frames,
        "scans": described,
    }
    out = run / FILE
    replace_text(out, json.dumps(content) + "\n")
    return out

"""An encoder for Brainmarks, the public evaluation suite of fMRI models: its samples become what the model was given.

Brainmarks (0.1.1) gives each volume model the brain voxels of the MNI152NLin6Asym mask of 2 mm in (Z, Y, X) order, RAS,
z-scored over time, with the mean and standard deviation of each voxel. Here that is put back into a volume and goes
through the steps of `swift.inference.fit_scan`. The registration is in brainmarks/models/swift_v2.py; this file needs
nothing of Brainmarks.

Legend: B samples, T frames, V voxels of the template's mask, v brain voxels on the model's grid, E width of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swift.data.clips.scatter import to_dense
from swift.data.ingest.head import MOST_CUT
from swift.data.ingest.nifti import plan_volume, read_volume
from swift.data.ingest.place import GridPlan, Sampler, plan_grid
from swift.data.ingest.tr import resample_tr
from swift.data.store.spaces import placement_of
from swift.inference.fit_scan import FittedScan, Fitting, fitted_values
from swift.inference.model import Trained, load_trained
from swift.inference.pretrained import load_model
from swift.models.pooling import brain_tokens, pool
from swift.utils.errors import BadScan, UserError

SPACE = "MNI152NLin6Asym"
GRID = (91, 109, 91)
"""Voxels X, Y, Z of the template at 2 mm."""
AFFINE = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
"""Voxel to world mm, RAS+ (brainmarks.readers.MNI152_2MM_AFFINE)."""

KEPT = ("codes", "index", "a", "b", "background", "voxels")
"""What `SampleReader` makes of a sample."""


def template_mask(file: str | Path | None = None) -> np.ndarray:
    """The brain mask that says which voxels a sample has.

    Args:
        file: Of the template at 2 mm; None: TemplateFlow's, from its cache or the network.

    Returns:
        (X, Y, Z) bool, RAS+.

    Raises:
        UserError: it cannot be had, or lies on another grid.
    """
    if file is None:
        try:
            from templateflow import api

            file = api.get(SPACE, desc="brain", resolution=2, suffix="mask", extension="nii.gz")
        except Exception as error:  # the network's and TemplateFlow's own, of many packages
            why = type(error).__name__
            raise UserError(f"TemplateFlow's {SPACE} brain mask cannot be had ({why}): give mask=FILE") from error
    if not isinstance(file, str | Path) or not Path(file).is_file():
        raise UserError(f"mask={file}: no such file")
    plan = plan_volume(Path(file))
    if plan.shape != GRID or not np.allclose(plan.affine, AFFINE, atol=1e-3):
        raise UserError(f"mask={file}: not on the 2 mm grid of {SPACE} ({' x '.join(map(str, GRID))} voxels)")
    return np.asarray(read_volume(plan) > 0.5)


def sample_order(mask: np.ndarray) -> np.ndarray:
    """Places in a sample, which counts x fastest, of the voxels of a mask (X, Y, Z) in C order: (V,) int64."""
    number = np.full(mask.shape, -1, np.int64)
    number.T[mask.T] = np.arange(int(mask.sum()))
    return number[mask]


@dataclass(frozen=True)
class SampleReader:
    """Brings Brainmarks' samples to a model's input, in the processes that load data.

    Attributes:
        trained: The model.
        mask: (X, Y, Z) bool, of the template.
        fitting: As for `python -m swift.embed`; of it other_tr plays a part.
        pad: Scans shorter than a clip are filled up with their mean frame; else they are refused.
    """

    trained: Trained
    mask: np.ndarray
    fitting: Fitting
    pad: bool = False

    @cached_property
    def plan(self) -> GridPlan:
        """Where the model's grid lies in the template."""
        contract = self.trained.contract
        return plan_grid(self.mask, AFFINE, contract.grid, contract.spacing, placement_of(SPACE))

    @cached_property
    def empty(self) -> FittedScan:
        """A scan without content that has every voxel of the mask: the most that a sample can have."""
        sampler, contract = Sampler(self.plan, self.mask, self.mask, "template"), self.trained.contract
        flat = np.zeros((contract.span, int(sampler.mask.sum())), np.float32)
        flat[::2] = 1
        place = placement_of(SPACE)
        return fitted_values(flat, sampler.mask, self.plan.affine, 1.0, "template", contract, SPACE, place)

    def fitted(self, sample: dict[str, Any]) -> FittedScan:  # not "fit": Brainmarks would call that with a data set
        """A sample as the model takes it.

        Args:
            sample: bold (T, V), mean and std (1, V), tr in seconds; arrays or tensors.

        Raises:
            UserError: another number of voxels than the mask has.
            BadScan: too short, or another TR.
        """
        bold, mean, std = (np.asarray(sample[name], np.float32) for name in ("bold", "mean", "std"))
        if bold.shape[1] != int(self.mask.sum()):
            raise UserError(
                f"a sample has {bold.shape[1]} voxels, the mask {int(self.mask.sum())}: not the same mask or space"
            )
        contract, tr = self.trained.contract, float(sample["tr"])
        values = (bold * std + mean)[:, sample_order(self.mask)]
        good = np.zeros(GRID, bool)
        good[self.mask] = np.isfinite(values).all(0) & (values.max(0) > values.min(0))
        grid = self.plan
        sampler, volume = Sampler(grid, self.mask, good, "sample"), np.zeros(GRID, np.float32)
        kept = np.empty((len(values), int(sampler.mask.sum())), np.float32)
        for frame, row in enumerate(values):
            volume[self.mask] = row
            kept[frame] = sampler(volume)
        if (wanted := contract.resampled_tr(tr, "sample", self.fitting.other_tr)) is not None:
            kept, tr = resample_tr(kept, tr, wanted), wanted
        short = contract.span - len(kept)
        if short > 0 and self.pad:
            kept = np.concatenate([kept, np.repeat(kept.mean(0, keepdims=True), short, axis=0)])
        elif short > 0:
            raise BadScan(f"a sample of {len(values)} frames is shorter than a clip (pad=true fills it up)")
        return fitted_values(kept, sampler.mask, grid.affine, tr, "sample", contract, SPACE, placement_of(SPACE))

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with the codes of its clips in the place of its values, of one size for all scans of T frames.

        Returns:
            What else the sample holds, codes (N, T, v), index, a, b (v,), background and voxels: how many of the v are
            those of this scan.
        """
        packed = self.fitted(sample).packed()
        voxels, most = len(packed["index"]), len(self.empty.packed()["index"])
        for name in ("codes", "index", "a", "b"):
            pads = [(0, 0)] * (packed[name].ndim - 1) + [(0, most - voxels)]
            packed[name] = np.pad(packed[name], pads)
        kept = {name: value for name, value in sample.items() if name not in ("bold", "mean", "std")}
        return kept | {name: torch.as_tensor(value) for name, value in packed.items()} | {"voxels": voxels}


class BrainmarksModel(nn.Module):
    """An encoder with the interface of Brainmarks' models: a batch of `SampleReader` to embeddings.

    Args:
        reader: That makes the samples.
        clips: Clips at once.
    """

    __space__ = "mni"
    tokens: Tensor

    def __init__(self, reader: SampleReader, clips: int = 4) -> None:
        super().__init__()
        self.encoder: Any = reader.trained.encoder
        self.contract, self.clips = reader.trained.contract, clips
        self.layout = reader.empty.layout
        self.patch = reader.trained.config.model.patch_size
        self.stage = len(reader.trained.config.model.depths) - 1
        seen = brain_tokens(torch.from_numpy(reader.empty.mask)[None], self.patch, self.stage)[0]
        self.register_buffer("tokens", seen, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None, Tensor]:
        """Embeddings, in the order of Brainmarks' `Embeddings`.

        Returns:
            cls (B, 1, E), as `python -m swift.embed` gives it for the scan; no registers; patches (B, L, E): the tokens
            of the last stage whose cells hold brain of the template, clip by clip and time step by time step.
        """
        rows, patches = zip(*(self._scan({name: batch[name][row] for name in KEPT}) for row in range(len(batch["a"]))))
        return torch.stack(rows)[:, None], None, torch.stack(patches)

    def _scan(self, packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(E,) and (L, E) of one scan."""
        voxels, device = int(packed["voxels"]), self.tokens.device
        index, a, b = (packed[name][:voxels].to(device) for name in ("index", "a", "b"))
        table = torch.stack([index.int(), *(value.float().view(torch.int32) for value in (a, b))])
        pooled, tokens = [], []
        for codes in packed["codes"][..., :voxels].split(self.clips):
            count = len(codes)
            some: dict[str, Any] = {"codes": codes.to(device).reshape(-1), "voxels": [voxels] * count}
            some["tables"] = [table] * count
            some["meta"] = torch.zeros((count, 4), dtype=torch.long, device=device)
            background = float(packed["background"])
            clips = to_dense(some, self.contract.grid, self.contract.frames, background, layout=self.layout)
            features = self.encoder(clips["bold"], clips["brain"])[self.stage].float()
            inside = self.encoder.inside(clips["brain"])
            pooled.append(pool(features, brain_tokens(inside, self.patch, self.stage)).mean(1))
            tokens.append(features[:, self.tokens].transpose(1, 2).flatten(0, 2))
        return torch.cat(pooled).mean(0), torch.cat(tokens)


def reader_of(
    model: str | None = None,
    mask: str | None = None,
    which: str = "latest",
    config: str | None = None,
    other_tr: str = "refuse",
    cropped: bool = False,
    pad: bool = False,
    clips: int = 4,
) -> tuple[SampleReader, int]:
    """The reader of samples, which holds the model, and how many clips are taken at once, of `model_kwargs`.

    Args:
        model: A run directory, an exported file, a folder of `save_pretrained`, or a name of the hub.
        mask: The template's brain mask, see `template_mask`.
        which, config: As for `swift.load_model`.
        other_tr: What to do with a TR that the model was not trained on: refuse | resample | keep.
        cropped: Take a model whose grid leaves out more than 10 % of the template's brain.
        pad: Fill up scans shorter than a clip with their mean frame.
        clips: Clips at once.

    Raises:
        UserError: no model named, nothing readable there, no mask, a grid that leaves out much of the brain.
    """
    if model is None:
        raise UserError(
            "swift_v2 needs a model: --overrides model_kwargs.model=RUN (a run, an exported file, a hub name)"
        )
    if clips < 1:
        raise UserError(f"clips={clips}: must be at least 1")
    fitting = Fitting(other_tr=other_tr)
    fitting.check()
    path = Path(model).expanduser()
    trained = load_trained(path, which, config) if path.is_file() else load_model(model, which, config).trained
    reader = SampleReader(trained, template_mask(mask), fitting, pad)
    contract = trained.contract
    if reader.plan.outside > MOST_CUT and not cropped:
        raise UserError(
            f"{100 * reader.plan.outside:.3g} % of the template's brain lies outside the model's grid "
            f"({contract.grid} of {contract.spacing:g} mm); model_kwargs.cropped=true if it is meant"
        )
    return reader, clips

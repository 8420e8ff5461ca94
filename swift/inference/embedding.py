"""Embeddings: what a trained encoder makes of scans, pooled over the brain.

A clip goes through the encoder whole, nothing hidden. Of each stage the features (x, y, z, t, E) are averaged over the
brain tokens (`swift.models.pooling`: background and padding are left out), then over the time steps: the embedding of a
clip. That of a scan is the mean over its clips (one after the other without overlap, and one more that ends with the
scan), that of a subject the mean over its scans. The embedding of a frame is that of the time step which holds it; a
frame of two clips gets the mean of both.

Legend: N rows, E width of a stage, T frames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from swift.inference.fit_scan import FittedScan, Fitting, Scan, find_scans, fit
from swift.inference.model import Trained, load_trained
from swift.models.pooling import brain_tokens, pool
from swift.utils import device as here
from swift.utils.errors import UserError

log = logging.getLogger("swift.embed")

PER = ("frame", "clip", "scan", "subject")
LEGAL_DEVICES = "auto, cpu, cuda, cuda:1, ..., xpu, xpu:1, ..."


def layer_names(trained: Trained) -> list[str]:
    """stage1, stage2, ..."""
    return [f"stage{number}" for number in range(1, len(trained.config.model.depths) + 1)]


def choose_layers(trained: Trained, layer: str) -> list[str]:
    """The stages that a choice means: one (last: the last one), or all.

    Raises:
        UserError: the model has no such layer.
    """
    names = layer_names(trained)
    if layer == "all":
        return names
    if layer == "last":
        return names[-1:]
    if layer not in names:
        raise UserError(f"--layer {layer}: this model has {', '.join(names)}, last ({names[-1]}) and all")
    return [layer]


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; auto is a GPU where torch sees one, of several that of this process's number on its node.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        there = here.count()
        return here.torch_device(here.kind_here(), local_rank % there if there else 0)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: legal are {LEGAL_DEVICES}") from error
    if device.type not in here.KINDS:
        raise UserError(f"--device {name}: legal are {LEGAL_DEVICES}")
    if device.type != "cpu" and (device.type != here.kind_here() or (device.index or 0) >= here.count()):
        raise UserError(f"--device {name}: torch sees {here.seen()} here")
    return device


@torch.inference_mode()
def embed_batch(encoder: Any, bold: Tensor, brain: Tensor, stages: Sequence[int]) -> list[Tensor]:
    """Pooled features of some stages.

    Args:
        encoder: A `swift.models.encoder.SwinEncoder`.
        bold: (B, 1, X, Y, Z, T).
        brain: bool (B, X, Y, Z).
        stages: From 0.

    Returns:
        One (B, t, E) float32 for each of `stages`.
    """
    features = encoder(bold, brain)
    patch, brain = encoder.cfg.patch_size, encoder.inside(brain)
    return [pool(features[stage].float(), brain_tokens(brain, patch, stage)) for stage in stages]


@contextmanager
def _products_of_training() -> Iterator[None]:
    """Matrix products in TF32 where a GPU has it, as in training; what the caller had set is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Embedded:
    """Embeddings of one scan.

    Attributes:
        rows: First frame of each clip, or every frame that a clip holds; N of them (1 for the scan as a whole: 0).
        values: Layer -> (N, E) float32.
        notes: Of bringing the scan to the model's input.
    """

    rows: np.ndarray
    values: dict[str, np.ndarray]
    notes: tuple[str, ...]


class Embedding:
    """A trained encoder that takes scans.

    Args:
        trained: Of `swift.inference.model.load_trained`.
        layer: last | stage1, stage2, ... | all.
        per: Rows of the result: frame | clip | scan.
        fitting: How scans are brought to the model's input contract.
        device: auto | cpu | cuda | xpu | cuda:N.
        batch: Clips at once.
        local_rank: Number of this process on its node.

    Raises:
        UserError: a value that is not legal.
    """

    def __init__(
        self,
        trained: Trained,
        layer: str = "last",
        per: str = "scan",
        fitting: Fitting | None = None,
        device: str = "auto",
        batch: int = 4,
        local_rank: int = 0,
    ) -> None:
        if per not in PER[:3]:
            raise UserError(f"per={per}: a scan has rows per frame, clip or scan")
        if batch < 1:
            raise UserError(f"--batch {batch}: must be at least 1")
        self.trained, self.per, self.batch = trained, per, batch
        self.fitting = fitting or Fitting()
        self.fitting.check()
        self.device = choose_device(device, local_rank)
        self.layers = choose_layers(trained, layer)
        self.stages = [layer_names(trained).index(name) for name in self.layers]
        self.encoder = trained.encoder.to(self.device).eval()

    @property
    def widths(self) -> dict[str, int]:
        """Layer -> E."""
        return {name: self.trained.config.model.embed_dim << stage for name, stage in zip(self.layers, self.stages)}

    def __call__(self, scan: Scan) -> Embedded:
        """Embed one scan.

        Raises:
            BadScan: it cannot be brought to the model's input.
        """
        return self.encode(self.prepare(scan))

    def prepare(self, scan: Scan) -> FittedScan:
        """Bring a scan to the model's input; the encoder is not used, so threads may do it.

        Raises:
            BadScan: it cannot be brought there.
        """
        return fit(scan, self.trained.contract, self.fitting)

    def encode(self, fitted: FittedScan) -> Embedded:
        """Rows of a scan."""
        starts = fitted.starts()
        steps: list[list[np.ndarray]] = [[] for _ in self.stages]
        for at in range(0, len(starts), self.batch):
            clips = fitted.clips(starts[at : at + self.batch], self.device)
            with _products_of_training():
                pooled = embed_batch(self.encoder, clips["bold"], clips["brain"], self.stages)
            for kept, found in zip(steps, pooled):
                kept.append(found.cpu().numpy())
        values = {name: np.concatenate(kept) for name, kept in zip(self.layers, steps)}
        rows, values = self._rows(fitted, np.asarray(starts), values)
        return Embedded(rows, values, fitted.notes)

    def _rows(
        self, fitted: FittedScan, starts: np.ndarray, steps: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(clips, t, E) time steps of the clips that begin at `starts` -> the rows that are asked for."""
        if self.per == "frame":
            return self._frames(fitted, starts, steps)
        clips = {name: value.mean(1) for name, value in steps.items()}
        if self.per == "clip":
            return starts, clips
        return np.zeros(1, np.int64), {name: value.mean(0, keepdims=True) for name, value in clips.items()}

    def _frames(
        self, fitted: FittedScan, starts: np.ndarray, steps: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        contract = fitted.contract
        inside = np.arange(contract.frames)
        frame = (starts[:, None] + inside * contract.frame_stride).reshape(-1)
        step = inside // self.trained.config.model.patch_size[3]
        frames, place, count = np.unique(frame, return_inverse=True, return_counts=True)
        values = {}
        for name, value in steps.items():
            total = np.zeros((len(frames), value.shape[2]), np.float64)
            np.add.at(total, place.reshape(-1), value[:, step].reshape(-1, value.shape[2]))
            values[name] = (total / count[:, None]).astype(np.float32)
        return frames, values


def say_masks(notes: dict[str, tuple[str, ...]]) -> None:
    """One line on which brain masks were taken; a warning where some were computed, as nobody has looked at those."""
    given = [scan for scan, said in notes.items() if any(note.startswith("brain mask:") for note in said)]
    made = [scan for scan, said in notes.items() if any(note.startswith("no brain mask given:") for note in said)]
    if not given and not made:
        return
    shown = f" ({', '.join(made[:3])}{', ...' if len(made) > 3 else ''})" if made else ""
    log.log(
        logging.WARNING if made else logging.INFO,
        "brain masks of %d scans: %d given or found beside them, %d worked out from the scan%s; see notes_",
        *(len(given) + len(made), len(given), len(made), shown),
    )


class Embedder(TransformerMixin, BaseEstimator):
    """Scans to embeddings as a scikit-learn transformer: one row a scan, in the order given.

    Nothing is fitted: `fit` only looks whether the model can be read. A scan that cannot be used ends `transform` with
    its reason, as every row is needed.

    Args:
        model: A run directory, a checkpoint, a file of `python -m swift.export`, or a SwiFT v1 file.
        layer: last | stage1, stage2, ... | all (side by side).
        which: latest | best | the name of a checkpoint.
        config: Settings for a SwiFT v1 file.
        mask: Brain mask on the scans' own grid; None: the one beside each scan, or a computed one.
        tr: Seconds, for scans whose files do not say.
        other_tr: refuse | resample | keep scans of another TR than the model was trained on.
        any_size, cropped: Take brains of a size that no head has, and brains of which more than 10 % are cut off.
        device: auto | cpu | cuda | xpu | cuda:N.
        batch: Clips at once.

    Attributes:
        notes_: Scan -> what was assumed or corrected in bringing it to the model's input, such as which brain mask was
            taken; of the last `transform`.
    """

    def __init__(
        self,
        model: str | Path,
        layer: str = "last",
        which: str = "latest",
        config: str | Path | None = None,
        mask: str | Path | None = None,
        tr: float | None = None,
        other_tr: str = "refuse",
        any_size: bool = False,
        cropped: bool = False,
        device: str = "auto",
        batch: int = 4,
    ) -> None:
        self.model = model
        self.layer = layer
        self.which = which
        self.config = config
        self.mask = mask
        self.tr = tr
        self.other_tr = other_tr
        self.any_size = any_size
        self.cropped = cropped
        self.device = device
        self.batch = batch

    def _embedding(self) -> Embedding:
        """Made of the parameters as they are now; kept as long as they do not change."""
        parameters = {name: str(value) for name, value in self.get_params().items()}
        kept = self.__dict__.get("_made")
        if kept is None or kept[0] != parameters:
            mask = Path(self.mask) if self.mask is not None else None
            fitting = Fitting(self.tr, self.other_tr, mask, self.any_size, self.cropped)
            trained = load_trained(self.model, self.which, self.config)
            kept = parameters, Embedding(trained, self.layer, "scan", fitting, self.device, self.batch)
            self._made = kept
        made: Embedding = kept[1]
        return made

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_made"}

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: Any = None, y: Any = None) -> Embedder:
        """Read the model; nothing is learned.

        Raises:
            UserError: it cannot be read, or a parameter is not legal.
        """
        self._embedding()
        return self

    def transform(self, X: Sequence[str | Path]) -> np.ndarray:
        """Embed scans.

        Args:
            X: Paths of NIfTI files (or STORE:SCAN_ID), N of them.

        Returns:
            (N, E) float32.

        Raises:
            BadScan: one of them cannot be used; the message says which and why.
            UserError: a place that holds no scan, or more than one.
        """
        if isinstance(X, str | Path):
            raise UserError(f"transform wants a list of paths, not the path {X}")
        embedding = self._embedding()
        rows, notes = [], {}
        for place in X:
            if not isinstance(place, str | Path):
                raise UserError(f"transform wants paths of NIfTI files, not {type(place).__name__}")
            scans = find_scans([place], embedding.trained.contract)
            if len(scans) != 1:
                raise UserError(f"{place} holds {len(scans)} scans: name each by itself")
            done = embedding(scans[0])
            values, notes[scans[0].scan_id] = done.values, done.notes
            rows.append(np.concatenate([values[name][0] for name in embedding.layers]))
        self.notes_ = notes
        say_masks(notes)
        widths = sum(embedding.widths.values())
        return np.stack(rows) if rows else np.empty((0, widths), np.float32)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """LAYER_0, LAYER_1, ..."""
        widths = self._embedding().widths
        return np.asarray([f"{name}_{i}" for name, width in widths.items() for i in range(width)], dtype=object)

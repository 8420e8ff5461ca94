"""Import of SwiFT v1 weights (Kim et al. 2023) into the encoder's v1 preset."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift.models.encoder import SwinEncoder

INPUT: dict[str, Any] = {
    "spacing": 2.0,
    "orientation": "LAS",
    "normalization": "zscore_global",
    "background": "minimum",
    "placement": "SwiFT v1",
    "tr": [0.72, 0.8],
}
"""What SwiFT v1 was trained on, as input contracts of swift name it. Its code reads arrays as they are stored, which in
HCP and FSL files is LAS; scales a scan by the mean and standard deviation of its voxels that are not 0, and gives the
others the smallest value; and brings 91x109x91 voxels to 96x96x96: pads (3, 2), cuts (7, 6), pads (3, 2)."""
_RENAMES = (
    (r"^patch_embed\.fc\.", "patch_embed.proj."),
    (r"^pos_embeds\.(\d+)\.pos_embed$", r"stages.\1.position.space"),
    (r"^pos_embeds\.(\d+)\.time_embed$", r"stages.\1.position.time"),
    (r"^layers\.(\d+)\.downsample\.", r"stages.\1.downsample."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm1\.", r"stages.\1.blocks.\2.attn.norm."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.", r"stages.\1.blocks.\2.attn.fn."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm2\.", r"stages.\1.blocks.\2.mlp.norm."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.mlp\.linear(\d)\.", r"stages.\1.blocks.\2.mlp.fn.fc\3."),
)


@dataclass(frozen=True)
class ImportReport:
    """What an import matched and what it left out; names of the source, then of the encoder."""

    matched: list[str]
    left_out: list[str]
    """Tensors of the checkpoint that have no place in the encoder (output heads)."""
    missing: list[str]
    """Tensors of the encoder that the checkpoint does not give; they keep their values."""

    def __str__(self) -> str:
        lines = [f"SwiFT v1 import: {len(self.matched)} tensors matched, {len(self.left_out)} left out"]
        if self.left_out:
            lines.append("left out: " + ", ".join(self.left_out))
        if self.missing:
            lines.append("not in the checkpoint, kept as they were: " + ", ".join(self.missing))
        return "\n".join(lines)


def _rename(key: str) -> str:
    for pattern, name in _RENAMES:
        key, count = re.subn(pattern, name, key)
        if count:
            return key
    return key


def _reshape(key: str, value: Tensor) -> Tensor:
    """Position tables (1, C, x, y, z, 1) and (1, C, 1, 1, 1, T) -> (x, y, z, C) and (T, C); other shapes stay."""
    if value.ndim == 6 and key.endswith("position.space") and value.shape[0] == value.shape[5] == 1:
        return value[0, ..., 0].permute(1, 2, 3, 0)
    if value.ndim == 6 and key.endswith("position.time") and value.shape[2:5] == (1, 1, 1) and value.shape[0] == 1:
        return value[0, :, 0, 0, 0, :].T
    return value


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file of weights: a bare state dict, or the state dict of a Lightning checkpoint.

    Nothing but tensors is unpickled.

    Raises:
        ValueError: no tensors in the file, or it needs unsafe unpickling.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as plain weights ({error.strerror})") from error
    if not head.startswith((b"PK", b"\x80")):  # a zip archive, or the first byte of a pickle
        kind = "a NIfTI image" if path.name.endswith((".nii", ".nii.gz")) else "neither zip nor pickle"
        raise ValueError(f"{path} cannot be read as plain weights (it is {kind})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, none of which says what the user can do
        if foreign := _foreign_objects(path, str(error)):
            raise ValueError(
                f"{path} cannot be read as plain weights: it holds other objects too ({', '.join(foreign)}), and "
                "reading those can run code; if you trust the file, make one of its tensors alone: "
                'python -c "import torch; '
                f"torch.save(torch.load('{path}', weights_only=False)['state_dict'], 'weights.pt')\""
            ) from error
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as plain weights ({reason})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict")
    return tensors


def _foreign_objects(path: Path, reason: str) -> list[str]:
    """Names of what a file holds beside tensors and plain values."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an old format, or a damaged file: torch's own reason names the first
        found = []
    return sorted(set(found)) or re.findall(r"GLOBAL (\S+) was not an allowed", reason)[:1]


def has_v1_names(tensors: dict[str, Tensor]) -> bool:
    """Whether tensors carry SwiFT v1's own names; an encoder's own names stand for themselves in an import."""
    return any(_rename(name) != name for name in (key.removeprefix("model.") for key in tensors))


def load_v1(encoder: SwinEncoder, tensors: dict[str, Tensor]) -> ImportReport:
    """Copy SwiFT v1 tensors into an encoder built with model=v1 for the same grid.

    Args:
        encoder: what to fill.
        tensors: with v1's own names, or with those of its Lightning module (`model.` before them).

    Raises:
        ValueError: tensors of another shape (the first five are named with both shapes), or none that fits.
    """
    target = encoder.state_dict()
    renamed = {_rename(key.removeprefix("model.")): key for key in tensors}
    if len(renamed) < len(tensors):
        raise ValueError("the file holds tensors twice, with and without `model.` before their names")
    found = {new: _reshape(new, tensors[key]) for new, key in renamed.items() if new in target}
    wrong = [
        f"{renamed[new]}: {tuple(tensors[renamed[new]].shape)} in the file, {tuple(target[new].shape)} in the model"
        for new, value in found.items()
        if value.shape != target[new].shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors of another shape, " + "; ".join(wrong[:5]))
    if not found:
        raise ValueError("no tensor of the file has a place in the encoder: is it a SwiFT v1 checkpoint?")
    encoder.load_state_dict(found, strict=False)
    left_out = [key for new, key in renamed.items() if new not in target]
    return ImportReport([renamed[key] for key in found], left_out, [key for key in target if key not in found])

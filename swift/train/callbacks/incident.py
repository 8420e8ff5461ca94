"""The evidence about a bad step: which clips it had, and the files that are kept.

The files are RUN/guard/step-NNNNNNN/record.json, and the batch that `python -m swift.replay` runs again.

A batch file is a safetensors file; its metadata say everything else that the run of that micro-batch depended on. Clips
are kept as the model got them, bit for bit, without the voxels outside the brain where those are all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swift.data.store.format import CorruptData
from swift.train.callbacks.nonfinite import describe
from swift.train.callbacks.spike import Verdict
from swift.utils.errors import UserError
from swift.utils.files import replace_text
from swift.utils.jsonl import plain

FOLDER = "guard"
"""In a run directory."""
RECORD = "record.json"
WEIGHTS = "weights"
"""Beside a batch: the weights of that step, as a folder of checkpoints."""
FORMAT = "swift-incident-1"
LOSS = "loss"
_BATCH = "batch/"
_INSIDE, _OUTSIDE = "packed/inside", "packed/outside"
CLOSE = 1e-3
"""Relative difference of two values that were computed from the same codes on different devices."""

RANKS = 2
"""Ranks whose batches are kept of one step."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Of the records of an optimizer step, counted as in metrics.jsonl."""
    return run_dir / FOLDER / f"step-{step:07d}"


def batch_name(rank: int) -> str:
    """File with the batch of a rank."""
    return f"batch-rank-{rank:05d}.safetensors"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(plain(record), indent=2, allow_nan=False) + "\n")


def write_batch(path: Path, batch: Mapping[str, Any], loss: Tensor, facts: Mapping[str, Any]) -> None:
    """Keep a micro-batch.

    Args:
        path: Of the file.
        batch: What the training step got: tensors, and plain values.
        loss: What it gave, divided by the micro-batches of a step as the backward pass saw it.
        facts: Plain values.
    """
    tensors, order, values = {LOSS: loss.detach().cpu().reshape(1)}, {}, {}
    on_cpu = {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
    packed = _packed(on_cpu)
    for name, value in on_cpu.items():
        if not isinstance(value, Tensor):
            values[name] = value
        elif not (packed and name == "bold"):
            # As it lies in memory: kernels may add up in another order for another layout.
            axes = sorted(range(value.dim()), key=lambda axis, value=value: -value.stride(axis))  # type: ignore[misc]
            order[name] = axes if value.permute(axes).is_contiguous() else list(range(value.dim()))
            tensors[_BATCH + name] = value.permute(order[name]).contiguous().clone()
    tensors |= packed
    text = json.dumps(plain({**facts, "order": order, "values": values}), allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {"format": FORMAT, "facts": text})
    partial.replace(path)


def read_batch(path: Path) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    """What `write_batch` kept: batch, loss, facts.

    Raises:
        UserError: no file there, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run keeps batches of bad steps as RUN/{FOLDER}/step-*/batch-*")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path} was not written by a run's guard: its format is {metadata.get('format')}, not {FORMAT}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(metadata["facts"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no batch of a bad step ({str(error).splitlines()[0]})") from error
    batch: dict[str, Any] = dict(facts.pop("values"))
    for name, axes in facts.pop("order").items():
        back = [axes.index(axis) for axis in range(len(axes))]
        batch[name] = tensors[_BATCH + name].permute(back)
    if _INSIDE in tensors:
        brain = batch["brain"]
        size, (x, y, z) = len(brain), brain.shape[1:]
        frames = tensors[_OUTSIDE].expand(size, facts["frames"], x, y, z).clone()
        frames[brain[:, None].expand_as(frames)] = tensors[_INSIDE]
        batch["bold"] = frames.permute(0, 2, 3, 4, 1).unsqueeze(1)
    return batch, tensors[LOSS][0], facts


def _packed(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The brain voxels of float32 clips that have one value outside, in the memory order of dense batches; else {}."""
    bold, brain = batch.get("bold"), batch.get("brain")
    if bold is None or brain is None or bold.dtype != torch.float32 or bold.dim() != 6:
        return {}
    frames = bold[:, 0].permute(0, 4, 1, 2, 3)
    inside = brain[:, None].expand_as(frames)
    outside = frames[~inside]
    if not frames.is_contiguous() or not len(outside):
        return {}
    bits = outside.view(torch.int32)
    return {_INSIDE: frames[inside], _OUTSIDE: outside[:1].clone()} if bool((bits == bits[0]).all()) else {}


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
        tables.append(
            torch.from_numpy(data.store.table(scan, data.data.normalization) if valid else np.empty((3, 0), np.int32))
        )
    packed: dict[str, Any] = {"codes": torch.from_numpy(np.concatenate(codes)), "voxels": voxels, "tables": tables}
    packed["meta"] = torch.tensor(rows, dtype=torch.int64)
    dense = data.scattered(packed)
    return dense if data.augment is None else data.augment(dense)


def suspects(ranks: list[dict[str, Any]], verdict: Verdict) -> dict[int, int]:
    """Ranks to look at closely, each with its micro-batch.

    Those with a loss that is not finite; else those where something not finite was found when the step was run again;
    else the one with the largest loss.
    """
    bad = {}
    for rank in ranks:
        places = [place for place, loss in enumerate(rank["losses"]) if not abs(loss) < float("inf")]
        if places:
            bad[rank["rank"]] = places[0]
    if not bad:
        bad = {rank["rank"]: min(rank["found"]) for rank in ranks if rank["found"]}
    if not bad and verdict.spike:
        top = max(ranks, key=lambda rank: max(rank["losses"]))
        bad = {top["rank"]: top["losses"].index(max(top["losses"]))}
    return dict(sorted(bad.items())[:RANKS])


def where(report: dict[str, Any]) -> str:
    """A rank, the frames in question and the layer, in words: of the report of a rank."""
    clips, first = report["clips"], report["first"]
    odd = [clip for clip in clips if clip["values"]["nan"] or clip["values"]["inf"]] or clips
    text = f"rank {report['rank']}"
    if odd:
        clip = odd[0]
        frames = clip["frames"]
        text += f", shard {clip['shard']}, scan {clip['scan']}, frames {frames['first']} to {frames['last']}"
    if first:
        text += f", first in {first['layer']} ({first['what']})"
    return text

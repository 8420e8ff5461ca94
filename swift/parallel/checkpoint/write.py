"""Writing safetensors files in one pass, with their checksum, and making files and folders outlive a power cut.

The safetensors package writes a file from a dictionary that holds all of it; here tensors are asked for one by one, so
that a file may be larger than memory. Reading is the package's.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from swift.utils.errors import UserError
from swift.utils.files import replace_text

SEAL = "xxh3"
"""Key of a file's own checksum, the first of its metadata."""
_OPEN_SEAL = "0" * 16
_SEAL_STARTS = 8 + len(f'{{"__metadata__":{{"{SEAL}":"')
"""Byte of a sealed file at which the checksum begins."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8"}
_READ_BYTES = 1 << 24
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Entry(NamedTuple):
    """A tensor to be written: what the header says of it, and how to get it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Written(NamedTuple):
    """A finished file."""

    bytes: int
    xxh3: str


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> Written:
    """Write a new file, tensor by tensor, and wait until it is on the disk.

    Args:
        path: Of the file; must not exist.
        entries: Tensors in the order of the file; each is asked for once.
        metadata: Strings kept in the header.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    place = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.bytes],
        }
        place += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_64()
    try:
        with path.open("xb") as stream:
            for part in (len(text).to_bytes(8, "little"), text):
                digest.update(part)
                stream.write(part)
            for entry in entries:
                tensor = entry.get()
                assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
                raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
                digest.update(raw)
                stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error
    return Written(8 + len(text) + place, digest.hexdigest())


def write_sealed(path: Path, entries: Sequence[Entry], metadata: dict[str, str]) -> Written:
    """Write a new safetensors file that carries the checksum of all its bytes, see `broken_seal`.

    Args, Raises: as `write_safetensors`.
    """
    written = write_safetensors(path, entries, {SEAL: _OPEN_SEAL} | metadata)
    try:
        with path.open("r+b") as stream:
            stream.seek(_SEAL_STARTS)
            stream.write(written.xxh3.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error
    return written


def broken_seal(path: Path, seal: str) -> bool:
    """Whether a file's bytes have changed since `write_sealed`; the checksum is that of the file with zeros for it.

    Args:
        path: The whole file is read.
        seal: The checksum in its metadata.
    """
    digest = xxhash.xxh3_64()
    with path.open("rb") as stream:
        digest.update(stream.read(_SEAL_STARTS))
        sealed = stream.read(len(_OPEN_SEAL)) == seal.encode()
        digest.update(_OPEN_SEAL.encode())
        while part := stream.read(_READ_BYTES):
            digest.update(part)
    return not sealed or digest.hexdigest() != seal


def disk_error(path: Path, error: OSError) -> UserError:
    """What the user is told when `path` could not be written."""
    if error.errno in _FULL:
        return UserError(f"{path.parent} is full: free some space, or lower trainer.keep_checkpoints")
    return UserError(f"{path} cannot be written ({error.strerror or error})")


def file_xxh3(path: Path) -> Written:
    """Size and checksum of a file as it is now."""
    digest = xxhash.xxh3_64()
    size = 0
    with path.open("rb") as stream:
        while part := stream.read(_READ_BYTES):
            digest.update(part)
            size += len(part)
    return Written(size, digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Put a whole text file in place: readers see the old one or the new one, also after a power cut.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    try:
        replace_text(path, text, sync=True)
    except OSError as error:
        raise disk_error(path, error) from error

"""A mask as a short text for a file of settings: its shape, as in `24x24x24:`, and packed, compressed bits (base64)."""

from __future__ import annotations

import base64
import binascii
import math
import zlib

import numpy as np

MOST = 1 << 24
"""Bits that a text may stand for: as many as the voxels of a box of 256 along each axis."""


def to_text(mask: np.ndarray) -> str:
    """Bool of any shape -> text of about as many characters as its surface has cells."""
    packed = zlib.compress(np.packbits(mask).tobytes(), 9)
    return "x".join(map(str, mask.shape)) + ":" + base64.b64encode(packed).decode("ascii")


def from_text(text: str) -> np.ndarray:
    """What `to_text` was given.

    Raises:
        ValueError: it is no such text.
    """
    sizes, _, packed = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
        count = math.prod(shape)
        if min(shape) < 1 or count > MOST:
            raise ValueError(f"a mask of {sizes} cells")
        stream = zlib.decompressobj()
        # No more than it says, however well it is compressed.
        raw = stream.decompress(base64.b64decode(packed, validate=True), -(-count // 8) + 1)
    except (ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(f"not the text of a mask ({error})") from error
    if len(raw) != -(-count // 8):
        raise ValueError(f"not the text of a mask: {len(raw)} bytes for {sizes} cells")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(bool).reshape(shape)

"""Masks as text."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest

from swift.utils.bits import from_text, to_text


def test_there_and_back() -> None:
    for shape in [(3,), (4, 5, 6), (1, 1, 9)]:
        mask = np.random.default_rng(0).random(shape) < 0.5
        found = from_text(to_text(mask))
        assert found.dtype == bool
        assert np.array_equal(found, mask)
        assert to_text(mask).startswith("x".join(map(str, shape)) + ":")


def test_a_brain_makes_a_short_text() -> None:
    """It stands in the settings of a run and of an exported file."""
    axes = np.meshgrid(*[np.linspace(-1, 1, 16)] * 3)
    assert len(to_text(sum(axis**2 for axis in axes) < 0.8)) < 600


BITS = base64.b64encode(zlib.compress(bytes(1))).decode()


@pytest.mark.parametrize(
    "text",
    [
        *("", "brain", "2x2", f"2x2x0:{BITS}", f"axb:{BITS}", "2x2x2:?", "2x2x2:AAAA", f"4x4x4:{BITS}"),
        f"1{'0' * 9}:{BITS}",
        "2x2:" + base64.b64encode(zlib.compress(bytes(1 << 20))).decode(),
    ],
)
def test_what_is_no_mask_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the text of a mask"):
        from_text(text)

"""The figure of predicted maps: a row shows one slice of the body, and the contrast is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from swift.report.figures import maps


def test_a_row_shows_one_slice_of_the_named_contrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every voxel holds its z. The true maps lack the lower slices, so the middle of their values is another."""
    drawn = []

    @contextmanager
    def kept(*_: Any, **__: Any) -> Iterator[Figure]:
        drawn.append(Figure())
        yield drawn[0]

    monkeypatch.setattr(maps, "figure", kept)
    said = np.broadcast_to(np.arange(1.0, 10), (3, 5, 4, 9)).copy()
    said[..., 7:] = np.nan
    truth = np.broadcast_to(np.arange(1.0, 10), (3, 5, 4, 9)).copy()
    truth[..., :3] = np.nan
    path = tmp_path / "maps.npz"
    matrix = np.eye(4)
    more = {"residual_r": np.array([0.6, 0.4, 0.1]), "contrast": np.array("faces"), "raw": matrix, "residual": matrix}
    np.savez(path, truth=truth, predicted=said, mean=np.zeros((5, 4, 9)), **more)
    maps.maps_figure(path, tmp_path / "maps.png")
    (fig,) = drawn
    pictures = [axis.get_images()[0].get_array() for axis in fig.axes if axis.get_images()]
    for shown in pictures[:12]:
        np.testing.assert_array_equal(np.asarray(shown), np.full((4, 5), 4.0))
    assert fig.get_suptitle() == "contrast faces"

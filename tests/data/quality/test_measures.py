"""Figures of quality against plain numpy, and the marks of planted faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swift.data.ingest.head import Meant, check_head, shares_told
from swift.data.quality.measures import (
    HEAD_RADIUS,
    MOVES,
    Measures,
    courses,
    displacement_of,
    far_out,
    mark,
    measure,
    outlier_frames,
)
from swift.data.quality.picture import quality_picture
from swift.data.store.reader import Store, StoreWriter
from swift.utils.errors import UserError
from tests.data import stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(stores.build(tmp_path_factory.mktemp("quality") / "s", [1, 2, 3], frames=[24, 40, 3]))


def test_measures_are_those_of_the_values(store: Store) -> None:
    for scan in (0, 1):
        values = store.values(scan).astype(np.float64)
        std = values.std(axis=0)
        tsnr = np.where(std > 1e-3, values.mean(axis=0) / np.maximum(std, 1e-3), 0)
        z = np.where(std > 1e-3, (values - values.mean(axis=0)) / np.maximum(std, 1e-3), 0)
        change = [np.sqrt(np.mean((z[t] - z[t - 1]) ** 2)) for t in range(1, len(z))]
        row = measure(store, scan, courses(store, scan))
        assert row.tsnr == pytest.approx(np.median(tsnr), rel=1e-4)
        assert row.mean_change == pytest.approx(np.mean(change), rel=1e-3)
        assert row.largest_change == pytest.approx(np.max(change), rel=1e-3)
        limit = np.percentile(change, 75) * 2.5 - np.percentile(change, 25) * 1.5
        assert row.outliers == sum(one > limit for one in change) / len(values)
        assert (row.displacement, row.in_grid, row.frames) == (None, 1.0, len(values))


def test_outlier_frames_by_hand() -> None:
    change = np.array([0.0, 1, 1, 1, 1, 9, 1, 1, 1.0])
    assert outlier_frames(change).tolist() == [False] * 5 + [True] + [False] * 3
    assert not outlier_frames(np.array([0.0, 5.0])).any()


def test_displacement_is_what_was_kept_or_powers_sum() -> None:
    kept = {"framewise_displacement": np.array([np.nan, 0.5], np.float32)}
    found = displacement_of(kept)
    assert found is not None
    assert found[1] == 0.5
    rng = np.random.default_rng(0)
    moves = {name: rng.normal(size=5).astype(np.float32) for name in MOVES}
    found = displacement_of(moves)
    assert found is not None
    for t in range(1, 5):
        step = {name: abs(float(moves[name][t]) - float(moves[name][t - 1])) for name in MOVES}
        want = sum(HEAD_RADIUS * way if name.startswith("rot") else way for name, way in step.items())
        assert found[t] == pytest.approx(want)
    assert np.isnan(found[0])
    assert displacement_of({"csf": np.zeros(3, np.float32)}) is None


def test_centred_values_have_no_tsnr(tmp_path: Path) -> None:
    header, mask, bold = stores.scan(1)
    with StoreWriter(tmp_path / "s", stores.GRID, 2.0) as writer:
        writer.add(header, mask, bold - bold.mean(axis=0))
    opened = Store(tmp_path / "s")
    assert measure(opened, 0, courses(opened, 0)).tsnr is None


def test_shares_are_read_as_ingestion_said_them() -> None:
    brain = np.ones((10, 10, 10), bool)
    empty = np.zeros_like(brain)
    empty[:, :, 0] = True
    affine = np.diag([10.0, 10, 10, 1])
    notes = check_head("a", brain, affine, empty, 0.0314, "grid", Meant(cropped=True))
    assert shares_told(notes) == pytest.approx((0.031, 0.1, 1 - 0.8**3), abs=0.005)
    assert shares_told(["TR taken from the sidecar"]) == (0, 0, 0)


def test_far_out_is_the_modified_z_score() -> None:
    values = [1.0, 2, 3, 4, 5, 100, None]
    found = far_out(values)
    assert found[5] == pytest.approx(0.6745 * (100 - 3.5) / 1.5)
    assert found[6] == 0
    assert not far_out([1.0, 2, 100]).any()
    assert not far_out([1.0] * 9 + [2.0]).any()


def test_planted_faults_are_marked_and_nothing_else() -> None:
    good = [
        Measures(f"s{i}", "", 100, 9, 2.0, "f", f"h{i}", 50 + 0.1 * i, 0.1 + 0.01 * i, outliers=0.002 * i)
        for i in range(15)
    ]
    faults: dict[str, dict[str, Any]] = {
        "same file as s0": {"source_sha256": "h0"},
        "TR 3 s, most have 2 s": {"tr": 3.0},
        "cropped: 93 % of the brain in the grid": {"in_grid": 0.93},
        "cropped: 4 % of the mask on the edge of the scan": {"on_edge": 0.04},
        "short: 30 frames, the median is 100": {"frames": 30},
        "low tSNR: 12": {"tsnr": 12.0},
        "motion: 0.9 mm": {"displacement": 0.9},
        "signal outliers: 20 % of the frames": {"outliers": 0.2},
        "not readable: x": {"problem": "x"},
    }
    bad = {name: replace(good[7], **{"scan_id": name, "source_sha256": "", **more}) for name, more in faults.items()}
    mark([*good, *bad.values()])
    assert [row.marks for row in bad.values()] == [[name] for name in bad]
    assert [row.marks for row in good] == [["same file as same file as s0"]] + [[]] * 14


def test_quality_picture(store: Store, tmp_path: Path) -> None:
    figures = quality_picture(store, 0, tmp_path / "qc" / "a.png")
    row = measure(store, 0, courses(store, 0))
    assert figures == {
        "median_tsnr": row.tsnr, "mean_change": row.mean_change, "largest_change": row.largest_change
    }  # fmt: skip
    assert (tmp_path / "qc" / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="cannot be written"):
        quality_picture(store, 0, Path("/dev/null/a.png"))

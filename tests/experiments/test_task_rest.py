"""experiments/task_rest/frozen.py: features of frames from clips that overlap, against loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from swift.evaluate import classical
from swift.evaluate.classical import FOLDS, Units
from tests.scripts import load

frozen = load("task_rest/frozen.py")

FRAMES = [(0, 3), (0, 4), (0, 6), (1, 5)]


def test_a_frame_is_the_mean_of_the_clips_that_hold_it() -> None:
    rng = np.random.default_rng(0)
    scan, frame = np.repeat([0, 0, 1], 4), np.concatenate([np.arange(3, 7), np.arange(4, 8), np.arange(3, 7)])
    values = rng.normal(size=(12, 2))
    found = frozen.frame_means(scan, frame, values, FRAMES)
    for row, (s, f) in zip(found, FRAMES):
        np.testing.assert_allclose(row, values[(scan == s) & (frame == f)].mean(0))
    smooth = frozen.smoothed(found, FRAMES)
    # Frame 5 has no label, and frame 5 of the other scan is no neighbour.
    np.testing.assert_allclose(smooth, [(found[0] + found[1]) / 2, (found[0] + found[1]) / 2, found[2], found[3]])


def test_candidates_take_the_first_maps() -> None:
    rng = np.random.default_rng(1)
    found = {part: {"tokens": rng.normal(size=(4, 3)), "courses": rng.normal(size=(4, 25))} for part in frozen.PARTS}
    made = frozen.candidates(found, dict.fromkeys(frozen.PARTS, FRAMES))
    assert len(made) == 14
    both = made["tokens, 10 courses"]["val"]
    np.testing.assert_array_equal(both, np.hstack([found["val"]["tokens"], found["val"]["courses"][:, :10]]))
    assert made["25 courses, three frames"]["test"].shape == (4, 25)


def test_no_block_is_said_by_a_head_that_has_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head that knows only the mean of its labels and features, by hand."""

    class Mean:
        classes_ = (0, 1)

        def __init__(self, values: np.ndarray, units: Units, kind: str, balance: bool) -> None:
            assert (kind, balance) == ("binary", True)
            assert len(values) == len(units)
            self.share = (units.target.mean() + values.mean()) / 2

        def predict_proba(self, values: np.ndarray) -> np.ndarray:
            return np.tile([1 - self.share, self.share], (len(values), 1))

    monkeypatch.setattr(classical, "fitted", Mean)
    rng = np.random.default_rng(2)
    count = 3 * FOLDS
    target, values, zeros = rng.integers(0, 2, count).astype(float), rng.random((count, 1)), np.zeros(count, np.int64)
    units = Units(zeros, np.full(count, "a"), np.arange(count), zeros, zeros, target)
    found = frozen.said_without_own_block(values, units, True)
    for row in range(count):
        block = row // 3
        rest = [n for n in range(count) if n // 3 != block]
        share = sum(target[n] + values[n, 0] for n in rest) / (2 * len(rest))
        assert found[row] == pytest.approx([1 - share, share])


def test_predictions_name_scans_and_frames() -> None:
    units = Units(np.array([0, 0]), np.array(["a", "a"]), np.array([7, 8]), *np.zeros((2, 2)), np.array([0.0, 1.0]))
    data = SimpleNamespace(
        store=SimpleNamespace(scans=[SimpleNamespace(scan_id="a_run")]),
        labels=SimpleNamespace(classes=["rest", "task"]),
    )
    made = frozen.predictions(data, [units], np.array([[0.75, 0.25], [0.5, 0.5]]))
    assert made.scores[:, 1] == pytest.approx([0.25, 0.5])
    assert made.target.tolist() == [0, 1]
    assert made.frame.tolist() == [7, 8]

"""Labels of frames: what BIDS allows of events, against a loop over frames and against nilearn."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from swift.config.schema import TargetConfig
from swift.data.labels.events import label_frames, read_events
from swift.data.labels.targets import read_labels
from swift.data.store.format import ScanInfo
from swift.utils.errors import BadScan, UserError
from tests.data.labels.test_targets import build, events_store

HEAD = "onset\tduration\ttrial_type\tvalue\n"
ON = TargetConfig("binary", "frame", "events", classes=["rest", "task"])
KINDS = TargetConfig("multiclass", "frame", "events", column="trial_type", classes=["rest", "face", "house"])
VALUE = TargetConfig("regression", "frame", "events", column="value", response="hrf")


def info(frames: int = 30, tr: float = 2.0) -> ScanInfo:
    return ScanInfo("sub-01_task-x", "01", "", "x", "", "", "00000.h5", frames, 10, tr)


def text(*lines: str) -> str:
    return HEAD + "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("start", [0.0, 0.975, 8.0])
@pytest.mark.parametrize("delay", [0.0, 4.0])
def test_a_frame_stands_for_start_plus_k_tr(start: float, delay: float) -> None:
    spans = [(10.5, 4.0), (30.5, 4.0), (50.9, 4.0)]
    lines = text(*(f"{on}\t{last}\ta\t1" for on, last in spans))
    found, unused = label_frames(lines, info(), start, dataclasses.replace(ON, delay_seconds=delay))
    for frame, value in enumerate(found):
        time = start + 2.0 * frame - delay
        if time < 0:
            assert math.isnan(value)
        else:
            assert value == any(on <= time < on + last for on, last in spans), frame
    assert unused.outside == unused.unknown == []


@pytest.mark.parametrize("start", [0.0, 0.975])
def test_convolved_values_are_nilearns_at_the_frames_times(start: float) -> None:
    from nilearn.glm.first_level import compute_regressor

    lines = text("-10\t4\ta\t2", "10.5\t4\ta\t1", "30.5\t0\ta\t-1", "200\t4\ta\t1", "-90\t3\ta\t1")
    found, unused = label_frames(lines, info(), start, VALUE)
    times = start + 2.0 * np.arange(30)
    wanted, _ = compute_regressor(np.array([[-10, 10.5, 30.5], [4, 4, 0], [2, 1, -1]]), "glover", times)
    np.testing.assert_allclose(found, wanted[:, 0], atol=1e-12)
    assert sorted(unused.outside) == [5, 6]


def test_an_event_long_before_the_scan_shows_while_its_response_does() -> None:
    # A block from -100 s to -1 s: its response at 0 s is the area of the response from 1 s on, here about all of it.
    found, unused = label_frames(text("-100\t99\ta\t1"), info(), 0.0, VALUE)
    assert unused.outside == []
    assert found[0] == pytest.approx(1.0, abs=0.05)
    assert abs(found[-1]) < 0.01


def test_events_outside_are_counted_and_those_that_reach_in_label_their_frames() -> None:
    lines = text("-6\t4\ta\t1", "-1\t5\ta\t1", "20\t10\ta\t1", "55\t10\ta\t1", "61.5\t9\ta\t1")
    found, unused = label_frames(lines, info(), 0.0, ON)
    times = 2.0 * np.arange(30)
    np.testing.assert_array_equal(found, (times < 4) | ((times >= 20) & (times < 30)) | (times >= 55))
    assert unused.outside == [2, 6]
    # With a delay the first one reaches into the scan, as known as the others; the two frames between are not rest.
    found, unused = label_frames(lines, info(), 0.0, dataclasses.replace(ON, delay_seconds=6.0))
    np.testing.assert_array_equal(found[:5], [1, 1, np.nan, 1, 1])
    assert unused.outside == [5, 6]  # at 55 s less than 6 s of the scan are left


def test_an_unknown_duration_is_not_rest() -> None:
    lines = text("4\t6\tface\t1", "20\tn/a\thouse\t1", "30\t6\tface\t1", "50\tn/a\thouse\t1")
    found, unused = label_frames(lines, info(), 0.0, KINDS)
    times = 2.0 * np.arange(30)
    wanted = (((times >= 4) & (times < 10)) | ((times >= 30) & (times < 36))).astype(float)
    wanted[((times >= 20) & (times < 30)) | (times >= 50)] = np.nan
    np.testing.assert_array_equal(found, wanted)
    assert unused.unknown == [3, 5]
    with pytest.raises(BadScan, match="needs durations, and they are not known in line 3, line 5"):
        label_frames(lines, info(), 0.0, VALUE)


def test_impulses_and_events_shorter_than_a_frame_label_the_nearest_one() -> None:
    lines = text("4.6\t0\tface\t1", "11.1\t0.4\thouse\t1", "20\t10\tface\t1", "24.9\t0\thouse\t1", "60\t0\tface\t1")
    found, unused = label_frames(lines, info(), 0.0, KINDS)
    wanted = np.zeros(30)
    wanted[2] = 1  # 4.6 s: frame 2 at 4 s
    wanted[6] = 2  # 11.3 s: frame 6 at 12 s
    wanted[10:15] = 1
    wanted[12] = 2  # within the block, and begun later
    wanted[29] = 0  # 60 s is 2 s after the last frame's time
    np.testing.assert_array_equal(found, wanted)
    assert unused.outside == [6]


def test_times_are_compared_in_microseconds() -> None:
    found, _ = label_frames(text("2.1\t0.7\ta\t1"), info(6, 0.7), 0.0, ON)  # 3 * 0.7 is 2.0999999999999996
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 0, 0])


def test_what_is_left_out_is_not_rest() -> None:
    lines = text("4\t6\tface\t1", "20\t4\tcat\t1", "22\t6\thouse\t1")
    with pytest.raises(UserError, match=r"none of the classes.*sub-01_task-x line 3: 'cat'"):
        label_frames(lines, info(), 0.0, KINDS)
    found, _ = label_frames(lines, info(), 0.0, dataclasses.replace(KINDS, others="leave_out"))
    times = 2.0 * np.arange(30)
    wanted = np.where((times >= 4) & (times < 10), 1, np.where((times >= 22) & (times < 28), 2, 0)).astype(float)
    wanted[10] = np.nan
    np.testing.assert_array_equal(found, wanted)


def test_a_table_without_lines_is_rest() -> None:
    assert read_events(HEAD, info(), None) == []
    found, _ = label_frames(HEAD, info(), 0.0, ON)
    np.testing.assert_array_equal(found, np.zeros(30))


def test_a_scan_that_cannot_be_labelled_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [text("1\t2\tx\t1", "40\t2\tx\t1"), "", text("soon\t2\tx\t1"), text("2\t2\tx\t1")]
    store = build(tmp_path / "s", [{}] * 4, events=texts)
    with caplog.at_level(logging.WARNING, "swift"):
        labels = read_labels(store, ON)
    assert [int(np.isfinite(values).sum()) for values in labels.values] == [24, 0, 0, 24]
    assert set(labels.failed) == {"sub-01_task-rest", "sub-02_task-rest"}
    assert "onset or duration is no number of seconds in line 2" in labels.failed["sub-02_task-rest"]
    assert "scan sub-01_task-rest: the store has kept no events" in caplog.text
    assert "events of scan sub-02_task-rest: onset or duration is no number of seconds in line 2" in caplog.text
    assert "2 of 4 scans are left out, as their frames cannot be labelled" in caplog.text
    assert "1 events of 1 scans lie outside their scans and label no frame (sub-00_task-rest line 3)" in caplog.text


def test_the_store_says_what_its_first_frame_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = events_store(tmp_path / "s", "1\t2\tx\t1")
    told = store.attributes(0)
    monkeypatch.setattr(store, "attributes", lambda scan: told | {"start_time": 0.5})
    (found,) = read_labels(store, ON).values
    times = 0.5 + 0.72 * np.arange(24)
    np.testing.assert_array_equal(found, (times >= 1) & (times < 3))

"""Clip arithmetic against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swift.data.clips.index import ClipIndex, ClipSpec, clip_count, clip_start, hold_out, time_split, whole_scans
from swift.utils.errors import UserError

SPECS = st.builds(ClipSpec, st.integers(1, 12), st.integers(1, 4), st.integers(1, 15))


def slow_starts(length: int, span: int, stride: int) -> list[int]:
    """All starts, by walking."""
    starts = [s for s in range(0, length, stride) if s + span <= length]
    if starts and starts[-1] + span < length:
        starts.append(length - span)
    return starts


@given(st.integers(0, 80), SPECS)
def test_starts_against_a_walk(length: int, spec: ClipSpec) -> None:
    want = slow_starts(length, spec.span, spec.clip_stride)
    got = [
        clip_start(k, length, spec.span, spec.clip_stride)
        for k in range(clip_count(length, spec.span, spec.clip_stride))
    ]
    assert got == want
    assert len(set(got)) == len(got)
    frames = [set(range(s, s + spec.span, spec.frame_stride)) for s in got]
    assert all(len(f) == spec.frames for f in frames)
    if got:
        assert max(max(f) for f in frames) == length - 1  # the end is not lost
    if got and spec.frame_stride == 1 and spec.clip_stride <= spec.span:
        assert set().union(*frames) == set(range(length))


@given(st.integers(1, 200), st.integers(1, 30), st.floats(0, 0.95), st.integers(0, 20))
def test_hold_out_in_time(frames: int, span: int, fraction: float, gap: int) -> None:
    train, first = hold_out(frames, span, fraction, gap)
    if first == frames:
        assert train == frames
        assert fraction == 0 or frames < 2 * span + gap  # only if two clips and the gap do not fit
    else:
        assert first - train == gap
        assert train >= span
        assert frames - first >= span
        if fraction * frames >= span and frames - round(fraction * frames) - gap >= span:
            assert frames - first == round(fraction * frames)


@given(st.data(), SPECS, st.integers(0, 5), st.floats(0, 0.5))
def test_every_clip_is_inside_its_part(data: st.DataObject, spec: ClipSpec, gap: int, fraction: float) -> None:
    frames = data.draw(st.lists(st.integers(spec.span, spec.span + 60), min_size=1, max_size=6))
    names = [f"s{i}" for i in range(len(frames))]
    if fraction > 0 and max(frames) < 2 * spec.span + gap:
        with pytest.raises(UserError, match="no scan can be held out"):
            time_split(range(len(frames)), frames, names, spec, fraction, gap)
        return
    train, val = time_split(range(len(frames)), frames, names, spec, fraction, gap)
    cuts = [hold_out(n, spec.span, fraction, gap) for n in frames]
    want = [(i, s) for i, (n, _) in enumerate(cuts) for s in slow_starts(n, spec.span, spec.clip_stride)]
    held = [
        (i, first + s)
        for i, (_, first) in enumerate(cuts)
        for s in slow_starts(frames[i] - first, spec.span, spec.span)
    ]
    for index, pairs in ((train, want), (val, held)):
        assert len(index) == len(pairs) == len(set(pairs))
        scan, start = index.locate(np.arange(len(index)))
        assert list(zip(scan.tolist(), start.tolist())) == pairs
        for i, s in pairs:
            assert 0 <= s <= frames[i] - spec.span
    seen = {(i, f) for i, s in want for f in range(s, s + spec.span)}
    kept = {(i, f) for i, s in held for f in range(s, s + spec.span)}
    for i, f in kept:
        assert not {(i, f - d) for d in range(gap + 1)} & seen


def test_many_clips_need_little() -> None:
    index = ClipIndex(range(50_000), [0] * 50_000, [1200] * 50_000, 20, 1)
    assert len(index) == 50_000 * 1181
    scan, start = index.locate(np.array([0, 1180, 1181, len(index) - 1]))
    assert scan.tolist() == [0, 0, 1, 49_999]
    assert start.tolist() == [0, 1180, 0, 1180]


def test_mistakes_are_named() -> None:
    spec = ClipSpec(5, 2, 1)
    assert spec.span == 9
    with pytest.raises(UserError, match=r"scan b \(and 1 other scans\): 8 frames, fewer than a clip, which spans 9"):
        time_split([0, 1, 2], [20, 8, 3], ["a", "b", "c"], spec, 0.1, 0)
    train, val = time_split([0, 2], [40, 8, 30], ["a", "b", "c"], spec, 0.3, 2)
    assert train.scan.tolist() == val.scan.tolist() == [0, 2]
    with pytest.raises(UserError, match="scan c: 3 frames"):
        whole_scans([0, 2], [20, 8, 3], ["a", "b", "c"], spec, 1)
    with pytest.raises(UserError, match=r"val_fraction=1.0 must be in \[0, 1\)"):
        time_split([0], [20], ["a"], spec, 1.0, 0)
    with pytest.raises(UserError, match=r"data.clip_stride=0: must be at least 1"):
        ClipSpec(5, 1, 0)
    assert len(whole_scans([], [20], ["a"], spec, 1)) == 0

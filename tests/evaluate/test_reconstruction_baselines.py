"""The baselines against slow loops, and what they must not see."""

from __future__ import annotations

import math

import pytest
import torch

from swift.evaluate import reconstruction_baselines as baselines

SHAPE = (2, 3, 4, 2, 7)  # B, X, Y, Z, T


def make(seed=0, ratio=0.7):
    rng = torch.Generator().manual_seed(seed)
    bold = torch.randn((SHAPE[0], 1, *SHAPE[1:]), generator=rng)
    masked = torch.rand(SHAPE, generator=rng) < ratio
    brain = torch.rand(SHAPE[:-1], generator=rng) < 0.7
    brain[:, 0, 0, 0] = brain[:, 0, 0, 1] = True
    masked[:, 0, 0, 0] = True  # a voxel that is never visible
    masked[:, 0, 0, 1] = False  # one that always is
    return bold, masked, brain


def slow_clip_mean(bold, masked, brain, b):
    seen = [
        bold[b, 0, x, y, z, t].item()
        for x, y, z in brain[b].nonzero().tolist()
        for t in range(SHAPE[-1])
        if not masked[b, x, y, z, t]
    ]
    return sum(seen) / len(seen) if seen else 0.0


def slow_voxel(series, visible, kind, fallback):
    """One voxel's prediction, frame by frame."""
    seen = [t for t, v in enumerate(visible) if v]
    if not seen or kind == "brain mean":
        return [fallback] * len(series)
    out = []
    for t in range(len(series)):
        if kind == "voxel mean over visible frames":
            out.append(sum(series[s] for s in seen) / len(seen))
        elif kind == "nearest visible frame":
            best = min(abs(s - t) for s in seen)
            near = [series[s] for s in seen if abs(s - t) == best]
            out.append(sum(near) / len(near))
        else:
            left = [s for s in seen if s <= t]
            right = [s for s in seen if s >= t]
            if not left or not right:
                out.append(series[left[-1] if left else right[0]])
            elif left[-1] == right[0]:
                out.append(series[t])
            else:
                a, b = left[-1], right[0]
                out.append(series[a] * (b - t) / (b - a) + series[b] * (t - a) / (b - a))
    return out


def slow(bold, masked, brain, kind):
    out = torch.zeros_like(bold)
    for b in range(SHAPE[0]):
        mean = slow_clip_mean(bold, masked, brain, b)
        for x, y, z in brain[b].nonzero().tolist():
            series, visible = bold[b, 0, x, y, z].tolist(), (~masked[b, x, y, z]).tolist()
            out[b, 0, x, y, z] = torch.tensor(slow_voxel(series, visible, kind, mean))
    return out


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("kind", list(baselines.BASELINES))
def test_equal_to_slow_loops(kind, ratio):
    bold, masked, brain = make(seed=int(ratio * 100), ratio=ratio)
    found = baselines.BASELINES[kind](bold, masked, brain)
    torch.testing.assert_close(found, slow(bold, masked, brain, kind), rtol=1e-5, atol=1e-6)


def test_known_series():
    bold = torch.tensor([9.0, 2.0, 9.0, 9.0, 9.0, 6.0, 9.0]).reshape(1, 1, 1, 1, 1, 7)
    masked = (bold == 9)[:, 0]
    brain = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    expected = {
        "brain mean": [4.0] * 7,
        "voxel mean over visible frames": [4.0] * 7,
        "nearest visible frame": [2, 2, 2, 4, 6, 6, 6],
        "linear interpolation": [2, 2, 3, 4, 5, 6, 6],
    }
    for name, values in expected.items():
        assert baselines.BASELINES[name](bold, masked, brain).flatten().tolist() == pytest.approx(values)
    # |9 - 2| + |9 - 3| + |9 - 4| + |9 - 5| + |9 - 6| over five hidden frames
    pred = baselines.linear_interpolation(bold, masked, brain)
    total, count = baselines.masked_l1_sum(pred, bold, masked, brain)
    assert (total.item(), count.item()) == (pytest.approx(25.0), 5)


@pytest.mark.parametrize("kind", list(baselines.BASELINES))
def test_hidden_values_and_values_outside_the_brain_are_never_seen(kind):
    bold, masked, brain = make(seed=5)
    other = torch.where(masked[:, None] | ~brain[:, None, ..., None], torch.full_like(bold, math.nan), bold)
    predict = baselines.BASELINES[kind]
    assert torch.equal(predict(other, masked, brain), predict(bold, masked, brain))


@pytest.mark.parametrize("kind", list(baselines.BASELINES))
def test_clips_of_a_batch_do_not_touch_each_other_and_layout_does_not_matter(kind):
    bold, masked, brain = make(seed=6)
    predict = baselines.BASELINES[kind]
    both = predict(bold, masked, brain)
    for b in range(SHAPE[0]):
        torch.testing.assert_close(predict(bold[b : b + 1], masked[b : b + 1], brain[b : b + 1]), both[b : b + 1])
    frame_major = bold.permute(0, 5, 1, 2, 3, 4).contiguous().permute(0, 2, 3, 4, 5, 1)
    assert torch.equal(predict(frame_major, masked, brain), both)
    assert predict(bold.bfloat16(), masked, brain).dtype == torch.float32


def test_nothing_visible_and_no_brain():
    bold, masked, brain = make(seed=7)
    for predict in baselines.BASELINES.values():
        assert predict(bold, torch.ones_like(masked), brain).abs().sum() == 0
        assert predict(bold, masked, torch.zeros_like(brain)).abs().sum() == 0
    assert baselines.masked_l1_sum(bold, bold, masked, torch.zeros_like(brain)) == (0, 0)


def test_scores_weigh_voxel_frames_and_leave_out_padding():
    total, count = dict.fromkeys(baselines.BASELINES, 0.0), 0
    scores = baselines.BaselineScores()
    for seed, valid in ((1, [True, True]), (2, [True, False])):
        bold, masked, brain = make(seed=seed, ratio=0.3 * seed)
        scores.update(bold, masked, brain, torch.tensor(valid))
        for b in range(2 if all(valid) else 1):
            for x, y, z in brain[b].nonzero().tolist():
                count += int(masked[b, x, y, z].sum())
            for name in total:
                error = (slow(bold, masked, brain, name) - bold)[b, 0].abs()
                total[name] += float(error[brain[b][..., None] & masked[b]].sum())
    assert int(scores.count) == count
    assert scores.compute() == pytest.approx({name: value / count for name, value in total.items()}, rel=1e-5)


@pytest.mark.parametrize("wrong", ["bold", "masked", "brain"])
def test_wrong_shapes_and_types_are_named(wrong):
    bold, masked, brain = make()
    if wrong == "bold":
        bold = bold[:, 0]
    elif wrong == "masked":
        masked = masked.float()
    else:
        brain = brain[..., :1]
    with pytest.raises(ValueError, match=wrong):
        baselines.brain_mean(bold, masked, brain)

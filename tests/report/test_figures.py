"""Figures: the data they show, what they say, how large they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from swift.report.figures.loss import loss_curve, smooth, spread
from swift.report.figures.reconstruction import _load_clip, reconstruction
from swift.utils.errors import UserError

BASELINES = {
    "brain mean": 0.8,
    "voxel mean over visible frames": 0.74,
    "nearest visible frame": 0.61,
    "linear interpolation": 0.6,
}


def write_run(path, losses, vals=(), summary=True, loss="l1"):
    """`losses` at steps 1, 2, ...; `vals` at steps 5, 10, ..."""
    path.mkdir()
    records = [{"step": i + 1, "train/loss": value} for i, value in enumerate(losses)]
    records += [{"step": 5 * (i + 1), "val/l1": value} for i, value in enumerate(vals)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "config.yaml").write_text(
        f"data:\n  normalization: zscore_voxel\ntask:\n  loss: {loss}\nmodel:\n  name: tiny\n"
    )
    if summary:
        content = {
            "model": "tiny",
            "parameters": 1234,
            "steps": len(losses),
            "val_l1": vals[-1],
            "baselines": BASELINES,
        }
        (path / "summary.json").write_text(json.dumps(content))
    return path


def line(ax, gid):
    return next(found for found in ax.lines if found.get_gid() == gid)


def test_loss_curve_shows_the_numbers_of_the_run(tmp_path):
    losses = np.linspace(1.0, 0.5, 100)
    run = write_run(tmp_path / "run", losses.tolist(), [0.9, 0.7, 0.65])
    out = run / "figures" / "loss.png"
    fig = loss_curve([run], out)
    ax = fig.axes[0]
    np.testing.assert_array_equal(line(ax, "train points").get_xdata(), np.arange(1, 101))
    np.testing.assert_allclose(line(ax, "train points").get_ydata(), losses)
    np.testing.assert_array_equal(line(ax, "val").get_xdata(), [5, 10, 15])
    np.testing.assert_allclose(line(ax, "val").get_ydata(), [0.9, 0.7, 0.65])
    for name, value in BASELINES.items():
        assert list(line(ax, f"baseline {name}").get_ydata()) == [value, value]
        assert any(text.get_text() == f"{name} {value:.3f}" for text in ax.texts)
    assert ax.get_xlabel() == "optimizer step"
    assert "SD of each voxel" in ax.get_ylabel()
    assert "mean absolute error" in ax.get_ylabel()
    assert out.stat().st_size < 250_000
    assert Image.open(out).size[0] == 900


def test_loss_curve_before_the_end_of_a_run_and_with_a_nan(tmp_path):
    run = write_run(tmp_path / "run", [1.0, 0.9, 0.8], summary=False)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "train/loss": "NaN"}\n{"step": 3, "train/loss": 0.75}\n')
    ax = loss_curve([run], None).axes[0]
    np.testing.assert_array_equal(line(ax, "train").get_ydata(), [1.0, 0.9, 0.75, np.nan])
    assert not ax.texts
    low, high = ax.get_ylim()
    assert low < 0.75
    assert 1.0 < high < 1.2


def test_one_spike_does_not_flatten_the_curve(tmp_path):
    losses = np.linspace(1.0, 0.5, 400)
    losses[200] = 50.0
    ax = loss_curve([write_run(tmp_path / "run", losses.tolist(), [0.9])], None).axes[0]
    assert ax.get_ylim()[1] < 1.2


def test_several_runs_share_baselines_only_if_equal(tmp_path):
    first = write_run(tmp_path / "a", [1.0, 0.9], [0.8])
    second = write_run(tmp_path / "b", [1.1, 0.7], [0.75])
    ax = loss_curve([first, second], None).axes[0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["a, training", "a, held-out clips", "b, training", "b, held-out clips"]
    assert len({found.get_color() for found in ax.lines if found.get_gid() == "val"}) == 2
    assert len(ax.texts) == 4
    summary = json.loads((second / "summary.json").read_text())
    summary["baselines"]["brain mean"] = 0.9
    (second / "summary.json").write_text(json.dumps(summary))
    assert not loss_curve([first, second], None).axes[0].texts


def test_another_training_loss_is_named(tmp_path):
    ax = loss_curve([write_run(tmp_path / "run", [1.0, 0.9], [0.8], loss="smooth_l1")], None).axes[0]
    assert ax.get_legend().get_texts()[0].get_text() == "training (smooth L1 loss)"


def test_smooth_is_a_mean_over_finite_neighbours():
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 9.0])
    expected = [1.5, 1.5, 3.0, 4.5, 6.0, 7.0]
    np.testing.assert_allclose(smooth(values, 3), expected)
    assert np.isnan(smooth(np.array([np.nan] * 4), 2)).all()


def test_spread_keeps_order_and_gap_and_moves_nothing_needlessly():
    assert spread([0.0, 5.0, 10.0], 1.0) == [0.0, 5.0, 10.0]
    np.testing.assert_allclose(spread([5.0, 5.0], 1.0), [4.5, 5.5])
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.random(6).round(2).tolist()
        placed = np.array(spread(wanted, 0.1))
        order = np.argsort(wanted, kind="stable")
        assert (np.diff(placed[order]) >= 0.1 - 1e-12).all()
        assert abs(placed.mean() - np.mean(wanted)) < 1e-9


def clip(path, tube=False, **changes):
    rng = np.random.default_rng(1)
    shape = (14, 18, 12, 8)
    brain = np.zeros(shape[:3], bool)
    brain[2:12, 2:16, 1:11] = True
    original = rng.standard_normal(shape).astype(np.float32)
    masked = np.repeat(np.repeat(rng.random((7, 9, 6, 8)) < 0.6, 2, 0), 2, 1).repeat(2, 2)
    if tube:
        masked[:] = masked[..., :1]
    arrays = {
        "original": original,
        "masked": masked,
        "reconstructed": (0.5 * original).astype(np.float32),
        "brain": brain,
        "tr": 1.5,
        "frame": 3,
        "spacing": 4.0,
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


@pytest.mark.parametrize("tube", [False, True])
def test_reconstruction_shows_the_right_voxels(tmp_path, tube):
    path, out = tmp_path / "figures" / "reconstruction.npz", tmp_path / "figures" / "reconstruction.png"
    data = clip(path, tube)
    fig = reconstruction(path, out)
    axes = {ax.get_gid(): ax for ax in fig.axes}
    centre = _load_clip(path).centre
    assert centre == tuple(round(float(index.mean())) for index in np.nonzero(data["brain"]))
    original, masked, made = (data[name][..., 3] for name in ("original", "masked", "reconstructed"))
    for plane, axis in (("sagittal", 0), ("coronal", 1), ("axial", 2)):
        expected = {
            "original": original,
            "masked input": np.where(masked, np.nan, original),
            "reconstruction": np.where(masked, made, original),
            "difference": np.where(masked, made - original, np.nan),
        }
        for column, volume in expected.items():
            volume = np.where(data["brain"], volume, np.nan)
            shown = axes[f"{plane} {column}"].images[-1].get_array()
            np.testing.assert_allclose(np.ma.filled(shown, np.nan), np.take(volume, centre[axis], axis).T)
    signal = {axes[f"axial {c}"].images[-1].get_clim() for c in ("original", "masked input", "reconstruction")}
    low, high = axes["axial difference"].images[-1].get_clim()
    assert len(signal) == 1
    assert low == -high
    assert out.stat().st_size < 250_000
    assert Image.open(out).size[0] == 900


def test_sides_are_marked_for_ras(tmp_path):
    clip(tmp_path / "r.npz")
    for ax in reconstruction(tmp_path / "r.npz", None).axes:
        if ax.get_gid() is not None:
            sides = {text.get_text(): text.get_position()[0] for text in ax.texts}
            left, right = ("P", "A") if "sagittal" in ax.get_gid() else ("L", "R")
            assert sides[left] < 0.5 < sides[right]
            assert ax.images[-1].origin == "lower"
            assert ax.get_xlim()[0] < ax.get_xlim()[1]  # x (or y) grows to the right: R (or A) is there


def test_time_course_is_that_of_the_voxel_with_the_median_error(tmp_path):
    data = clip(tmp_path / "r.npz")
    fig = reconstruction(tmp_path / "r.npz", None)
    ax = next(ax for ax in fig.axes if "time" in ax.get_xlabel())
    voxel = _load_clip(tmp_path / "r.npz").voxel
    original, made = line(ax, "original"), line(ax, "reconstruction")
    np.testing.assert_allclose(original.get_xdata(), np.arange(8) * 1.5)
    np.testing.assert_allclose(original.get_ydata(), data["original"][voxel])
    frames = np.flatnonzero(data["masked"][voxel])
    np.testing.assert_allclose(made.get_xdata(), frames * 1.5)
    np.testing.assert_allclose(made.get_ydata(), data["reconstructed"][voxel][frames])
    assert len(ax.patches) == len(frames)
    assert "(s)" in ax.get_xlabel()

    def error(place):
        frames = data["masked"][place]
        return np.abs(data["original"][place] / 2)[frames].mean()

    plane = [p for p in map(tuple, np.argwhere(data["brain"])) if p[2] == voxel[2] and 0 < data["masked"][p].sum() < 8]
    errors = sorted(error(p) for p in plane)
    assert error(voxel) == pytest.approx(errors[(len(errors) - 1) // 2])


def test_a_frame_without_hidden_voxels_is_replaced_by_the_nearest_with_some(tmp_path):
    masked = np.zeros((14, 18, 12, 8), bool)
    masked[..., 5:] = True
    data = clip(tmp_path / "r.npz", masked=masked)
    fig = reconstruction(tmp_path / "r.npz", None)
    assert "Frame 6 of 8" in fig.get_supxlabel()
    shown = next(ax for ax in fig.axes if ax.get_gid() == "axial reconstruction").images[-1].get_array()
    expected = np.where(data["brain"], data["reconstructed"][..., 5], np.nan)[
        :, :, _load_clip(tmp_path / "r.npz").centre[2]
    ]
    np.testing.assert_allclose(np.ma.filled(shown, np.nan), expected.T)


def test_caption_says_what_is_shown(tmp_path):
    data = clip(tmp_path / "r.npz")
    text = reconstruction(tmp_path / "r.npz", None).get_supxlabel().replace("\n", " ")
    hidden = data["masked"][data["brain"]]
    error = np.abs(data["original"] / 2)[data["brain"]][hidden].mean()
    assert "the prediction in hidden patches, the original elsewhere" in text
    assert f"{100 * hidden.mean():.0f} %" in text
    assert f"{error:.3f}" in text
    assert "TR 1.5 s" in text
    assert "Frame 4 of 8" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked": None}, "no array masked"),
        ({"brain": np.ones((3, 3, 3), bool)}, "expected"),
        ({"frame": 8}, "frame 8 of 8"),
        ({"masked": np.zeros((14, 18, 12, 8), bool)}, "nothing masked"),
    ],
)
def test_wrong_files_are_a_users_mistake(tmp_path, changes, message):
    clip(tmp_path / "r.npz", **changes)
    with pytest.raises(UserError, match=message):
        reconstruction(tmp_path / "r.npz", None)


def test_missing_and_damaged_files_are_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        reconstruction(tmp_path / "none.npz", None)
    clip(tmp_path / "r.npz")
    content = (tmp_path / "r.npz").read_bytes()
    for damage in (b"", b"not a zip", content[: len(content) // 2]):
        (tmp_path / "r.npz").write_bytes(damage)
        with pytest.raises(UserError, match=r"r\.npz"):
            reconstruction(tmp_path / "r.npz", None)


def test_unwritable_output_is_a_users_mistake(tmp_path):
    run = write_run(tmp_path / "run", [1.0, 0.9], [0.8])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        loss_curve([run], tmp_path / "file" / "loss.png")

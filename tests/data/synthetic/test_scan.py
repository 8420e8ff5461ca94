"""The synthetic cohort: planted effects have their chosen size, in latents and voxels, and nothing else moves.

Tolerances are four standard errors of the statistic (seeds are fixed, so a test either always passes or never does).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, pearsonr
from threadpoolctl import threadpool_limits

from swift.data import synthetic
from swift.data.synthetic import CohortSpec, SyntheticScan, cohort_table, geometry, make_subject
from swift.data.synthetic.courses import group_covariance, mixing, sources
from swift.data.synthetic.maps import AMPLITUDE_BINARY, AMPLITUDE_CONTINUOUS, DRIVEN, smooth_fields
from swift.data.synthetic.spec import stream
from swift.utils.errors import UserError

SMALL = CohortSpec(n_subjects=3, grid=(16, 18, 14), spacing=10.0, frames=40, seed=7)


def auroc(score: np.ndarray, label: np.ndarray) -> float:
    positive, negative = score[label == 1], score[label == 0]
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def columns(spec: CohortSpec) -> dict[str, np.ndarray]:
    rows = cohort_table(spec)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The scans here are small: BLAS threads only wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    return columns(CohortSpec(n_subjects=1800))


# ------------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("target", [0.5, 0.75, 0.9])
def test_binary_latent_has_the_chosen_auroc(target: float) -> None:
    t = columns(CohortSpec(n_subjects=1000, binary_auroc=target, seed=1))
    assert t["label_binary"].sum() == 500
    error = np.sqrt(target * (1 - target) / 500)  # upper bound for 500 and 500
    assert auroc(t["latent_binary"], t["label_binary"]) == pytest.approx(target, abs=4 * error)


@pytest.mark.parametrize("target", [0.0, 0.6, 1.0])
def test_continuous_latent_has_the_chosen_correlation(target: float) -> None:
    t = columns(CohortSpec(n_subjects=1000, continuous_r=target, seed=2))
    r = pearsonr(t["latent_continuous"], t["label_continuous"]).statistic
    assert r == pytest.approx(target, abs=4 * (1 - target**2) / np.sqrt(1000) + 1e-6)
    assert t["label_continuous"].mean() == pytest.approx(100, abs=4 * 15 / np.sqrt(1000))
    assert t["label_continuous"].std() == pytest.approx(15, abs=4 * 15 / np.sqrt(2000))


def test_null_label_and_demographics_carry_nothing(table: dict[str, np.ndarray]) -> None:
    chance = 4 / np.sqrt(1800)
    others = {name: table[name].astype(float) for name in ("age", "site_index", "label_null")}
    others["sex"] = (table["sex"] == "M").astype(float)
    for name, values in others.items():
        for effect in ("latent_binary", "latent_continuous", "label_binary", "label_continuous"):
            assert abs(pearsonr(values, table[effect]).statistic) < chance, (name, effect)
    assert abs(pearsonr(table["latent_binary"], table["latent_continuous"]).statistic) < chance
    assert table["label_null"].sum() == 900
    assert np.bincount(table["site_index"]).tolist() == [600, 600, 600]
    assert table["age"].min() >= 18
    assert table["age"].max() <= 85


# -------------------------------------------------------------------------------------------------------------- time
@pytest.mark.parametrize(("tr", "low", "high"), [(0.8, 0.96, 0.98), (2.0, 0.82, 0.86), (3.0, 0.65, 0.71)])
def test_courses_have_the_stated_autocorrelation_and_unit_variance(tr: float, low: float, high: float) -> None:
    x = sources(np.random.default_rng(0), 250, 300, tr)
    assert low < synthetic.course_autocorrelation(tr) < high
    variance = (x**2).mean()  # the population mean is 0
    lag1 = (x[1:] * x[:-1]).mean() / variance
    assert variance == pytest.approx(1, abs=0.05)
    assert lag1 == pytest.approx(synthetic.course_autocorrelation(tr), abs=0.01)
    lag5 = (x[5:] * x[:-5]).mean() / variance
    assert lag5 == pytest.approx(synthetic.course_autocorrelation(tr, 5), abs=0.04)


def test_coupling_is_a_correlation_matrix_with_the_planted_pairs() -> None:
    spec = CohortSpec(frame_r=0.0)
    for binary, continuous in ((-3.0, 2.5), (0.0, 0.0), (4.0, -4.0)):
        m = mixing(spec, binary, continuous)
        c = m @ m.T
        np.testing.assert_allclose(np.diag(c), 1, atol=1e-12)
        assert np.linalg.eigvalsh(c).min() > -1e-12
        assert np.arctanh(c[0, 1]) == pytest.approx(0.3 + 0.35 * binary)
        assert np.arctanh(c[3, 4]) == pytest.approx(0.3 + 0.35 * continuous)
        rest = [0, 2, 3, 5, 7, 8]  # what is not rebuilt keeps the group's structure
        np.testing.assert_allclose(c[np.ix_(rest, rest)], group_covariance(spec)[np.ix_(rest, rest)], atol=1e-12)


def test_frame_label_drives_its_network_with_the_chosen_r() -> None:
    spec = CohortSpec(n_subjects=40, grid=(8, 8, 8), spacing=20.0, frames=150, frame_r=0.5, noise_smooth=0)
    r = []
    for i in range(40):
        scan = make_subject(spec, i)
        r.append([np.corrcoef(scan.courses[:, k], scan.task.valence_bold)[0, 1] for k in range(spec.networks)])
    mean, error = np.mean(r, 0), np.std(r, 0) / np.sqrt(40)
    assert mean[DRIVEN] == pytest.approx(0.5, abs=4 * error[DRIVEN] + 0.02)  # a finite run biases r by about 0.01
    others = np.arange(spec.networks) != DRIVEN
    assert (np.abs(mean[others]) < 4 * error[others]).all()


def test_valence_regressor_equals_nilearns_from_the_events() -> None:
    from nilearn.glm.first_level import compute_regressor

    task = make_subject(SMALL, 0).task
    events = np.stack([task.onset, task.duration, task.value])
    theirs = compute_regressor(events, "glover", np.arange(SMALL.frames) * SMALL.tr, oversampling=50)[0][:, 0]
    assert np.corrcoef(theirs, task.valence_bold)[0, 1] > 0.995
    block = np.searchsorted(task.onset, np.arange(SMALL.frames) * SMALL.tr + 1e-9, side="right") - 1
    np.testing.assert_array_equal(task.valence, task.value[block])
    np.testing.assert_allclose(task.onset[1:], task.onset[:-1] + task.duration[:-1], atol=0.011)


# ------------------------------------------------------------------------------------------------------------- space
def test_smooth_fields_have_unit_variance_and_the_stated_smoothness() -> None:
    line = np.linspace(-1, 1, 41)
    f = smooth_fields(np.random.default_rng(0), 600, (line, np.zeros(1), np.zeros(1)), 0.2)[:, :, 0, 0]
    np.testing.assert_allclose(f.var(0), 1, atol=4 * np.sqrt(2 / 600))
    d = line[28] - line[20]
    correlation = (f[:, 20] * f[:, 28]).mean()
    assert correlation == pytest.approx(np.exp(-(d**2) / (4 * 0.2**2)), abs=4 / np.sqrt(600))


def test_networks_have_separate_cores_and_partial_symmetry() -> None:
    shared = geometry(CohortSpec(seed=5))
    cores = shared.maps > 0.5
    assert cores.sum(0).max() == 1
    assert not (cores & ~shared.mask).any()
    sizes = cores.sum((1, 2, 3))
    assert sizes.min() > sizes.max() / 4
    mirrored = [np.corrcoef(m[shared.mask], m[::-1][shared.mask])[0, 1] for m in shared.maps]
    assert 0.2 < np.mean(mirrored) < 0.9
    regions = shared.regions()
    left = np.zeros_like(shared.mask)
    left[:24] = True
    assert shared.affine[0, 3] < 0 < shared.affine[0, 0]  # so the first half of x is left
    assert not (regions["binary_amplitude"] & ~left).any()
    assert not (regions["continuous_amplitude"] & left).any()
    planted = [regions[name] for name in regions if name != "control"]
    assert all(r.sum() > 50 for r in planted)
    assert not any((r & regions["control"]).any() for r in planted)
    assert 0.15 < shared.mask.mean() < 0.3


def test_one_seed_is_the_same_cohort_on_another_grid() -> None:
    fine = CohortSpec(seed=3, grid=(49, 49, 49), spacing=4.0)
    coarse = fine.with_(grid=(25, 25, 25), spacing=8.0)  # its voxels lie on every second one of the other
    np.testing.assert_allclose(geometry(fine).maps[:, ::2, ::2, ::2], geometry(coarse).maps, atol=1e-4)
    a, b = (make_subject(s.with_(noise_white=0, noise_smooth=0, motion=0), 0) for s in (fine, coarse))
    np.testing.assert_array_equal(a.mask[::2, ::2, ::2], b.mask)
    np.testing.assert_allclose(a.dense()[::2, ::2, ::2], b.dense(), rtol=1e-4)


# ------------------------------------------------------------------------------------------------- one scan, switches
def test_a_scan_is_reproduced_and_depends_on_nobody_else() -> None:
    first = make_subject(SMALL, 2)
    geometry.__globals__["_geometry"].cache_clear()
    again = make_subject(SMALL.with_(n_subjects=500), 2)
    np.testing.assert_array_equal(first.bold, again.bold)
    np.testing.assert_array_equal(first.motion, again.motion)
    assert first.person == again.person
    assert not np.array_equal(first.bold, make_subject(SMALL.with_(seed=8), 2).bold)
    several = SMALL.with_(runs=2)
    np.testing.assert_array_equal(make_subject(several, 2, 0).bold, first.bold)
    second = make_subject(several, 2, 1)
    np.testing.assert_array_equal(second.mask, first.mask)
    assert abs(np.corrcoef(second.courses[:, 0], first.courses[:, 0])[0, 1]) < 0.8
    assert cohort_table(SMALL) == cohort_table(SMALL.with_(n_subjects=9))[:3]


def test_scan_is_plausible_and_dense_puts_voxels_back() -> None:
    scan = make_subject(SMALL, 1)
    frames, voxels = scan.bold.shape
    assert (frames, voxels) == (40, int(scan.mask.sum()))
    assert scan.bold.dtype == np.float32
    dense = scan.dense()
    assert dense.shape == (16, 18, 14, 40)
    np.testing.assert_array_equal(dense[scan.mask].T, scan.bold)
    assert not dense[~scan.mask].any()
    tsnr = np.median(scan.bold.mean(0) / scan.bold.std(0))
    assert 30 < tsnr < 120
    middle = (scan.affine @ [7.5, 8.5, 6.5, 1])[:3]  # of the MNI box, to half a voxel
    assert np.abs(middle - [0, -17, 5]).max() <= scan.affine[0, 0] / 2


def test_a_field_of_view_far_beyond_the_head_is_fine() -> None:
    scan = make_subject(SMALL.with_(grid=(40, 40, 40)), 0)
    assert np.isfinite(scan.bold).all()
    assert scan.bold.min() > 3000
    volume = scan.mask.sum() * 1000 / 1e6  # litres
    assert volume == pytest.approx(4 / 3 * np.pi * 0.70 * 0.86 * 0.68, rel=0.15)


def percent(scan: SyntheticScan) -> np.ndarray:
    return 100 * (scan.bold / scan.bold.mean(0) - 1)


def test_drift_switch_adds_low_order_polynomials_and_nothing_else() -> None:
    spec = SMALL.with_(motion=0, site_effect=0)
    on, off = make_subject(spec, 0), make_subject(spec.with_(drift=0), 0)
    np.testing.assert_array_equal(off.courses, on.courses)
    difference = (on.bold - off.bold).astype(np.float64)
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, 40), 3)
    residual = difference - basis @ np.linalg.lstsq(basis, difference, rcond=None)[0]
    assert np.abs(residual).max() < 0.02  # rounding of float32 at 10,000
    assert 0.2 < (difference / off.bold.mean(0) * 100).std() < 3
    again = make_subject(spec.with_(drift=0, task="film"), 0)  # off: bit for bit without it
    np.testing.assert_array_equal(again.bold, off.bold)


def test_motion_switch_adds_what_the_saved_parameters_explain() -> None:
    spec = SMALL.with_(drift=0, site_effect=0, frames=80)
    on, off = make_subject(spec, 4), make_subject(spec.with_(motion=0), 4)
    assert not off.motion.any()
    assert not off.framewise_displacement.any()
    steps = np.abs(np.diff(on.motion, axis=0)) @ [1, 1, 1, 50, 50, 50]
    np.testing.assert_allclose(on.framewise_displacement[1:], steps)
    assert on.framewise_displacement.max() > 0.3 > np.median(on.framewise_displacement)  # few spikes
    spin = np.zeros(80)
    for t in range(1, 80):  # exponential recovery of |dz|, written as a loop
        spin[t] = spin[t - 1] * np.exp(-2 / 1.2) + abs(on.motion[t, 2] - on.motion[t - 1, 2])
    difference = (on.bold - off.bold).astype(np.float64)
    basis = np.column_stack([on.motion, spin])
    residual = difference - basis @ np.linalg.lstsq(basis, difference, rcond=None)[0]
    assert np.abs(residual).max() < 0.02
    assert np.abs(difference).max() > 5


def test_rigid_movement_is_a_shift_of_the_mean_image() -> None:
    from swift.data.synthetic.maps import subject_anatomy
    from swift.data.synthetic.scan import _motion_parts

    mask, mean = subject_anatomy(CohortSpec(grid=(32, 32, 32), spacing=6.0), 0)
    still = np.zeros((1, 6))
    maps = _motion_parts(still, mean, mask, 6.0, 2.0)[1]
    # Half the way between one voxel to the right and one to the left is the derivative times a voxel.
    moved = (np.roll(mean, 1, 0) - np.roll(mean, -1, 0))[mask] / 2 / mean[mask] * 100
    np.testing.assert_allclose(6.0 * maps[0], moved, rtol=1e-3, atol=1e-2)
    # A small turn about z moves (x, y) to (x - a y, y + a x): compare with interpolation at the old places.
    from scipy.ndimage import map_coordinates

    a, (x, y, z) = 0.002, np.nonzero(mask)
    cx, cy = x - 15.5, y - 15.5
    turned = [
        map_coordinates(mean.astype(np.float64), [15.5 + cx + s * a * cy, 15.5 + cy - s * a * cx, z], order=1)
        for s in (1, -1)
    ]
    np.testing.assert_allclose(a * maps[5], 100 * (turned[0] - turned[1]) / 2 / mean[mask], atol=2e-3)


def test_site_switch_changes_gain_noise_and_bias_field_only_when_on() -> None:
    spec = SMALL.with_(drift=0, motion=0)
    flat = spec.with_(site_effect=0)
    by_site = {make_subject(spec, i).person.site: i for i in range(3)}
    assert sorted(by_site) == ["site1", "site2", "site3"]
    gains = []
    for i in by_site.values():
        on, off = make_subject(spec, i), make_subject(flat, i)
        ratio = on.bold.mean(0) / off.bold.mean(0)
        assert ratio.std() > 0.005  # a bias field
        gains.append(ratio.mean())
        np.testing.assert_array_equal(on.courses, off.courses)
    assert np.ptp(gains) > 0.02
    one = make_subject(flat.with_(sites=1), 0)
    np.testing.assert_array_equal(one.bold, make_subject(flat, 0).bold)  # off: the scanner does not matter


def test_sites_may_differ_in_tr() -> None:
    spec = SMALL.with_(site_tr=(0.8, 2.0, 3.0))
    scans = [make_subject(spec, i) for i in range(3)]
    assert {s.person.site: s.tr for s in scans} == {"site1": 0.8, "site2": 2.0, "site3": 3.0}


def test_smooth_noise_is_smooth_in_space_correlated_in_time_and_of_the_chosen_size() -> None:
    spec = CohortSpec(
        grid=(24, 24, 24), spacing=7.0, frames=120, signal=0, noise_white=0, drift=0, motion=0, smoothness=24.0,
        noise_smooth=0.8, site_effect=0,
    )  # fmt: skip
    scan = make_subject(spec, 0)
    noise = np.full((*scan.mask.shape, 120), np.nan, np.float32)
    noise[scan.mask] = percent(scan).T
    assert np.nanstd(noise) == pytest.approx(0.8, rel=0.05)
    neighbours = np.nanmean(noise[1:] * noise[:-1]) / 0.64
    sigma = 24 / np.sqrt(8 * np.log(2))
    assert neighbours == pytest.approx(np.exp(-(7**2) / (4 * sigma**2)), abs=0.03)
    assert np.nanmean(noise[..., 1:] * noise[..., :-1]) / 0.64 == pytest.approx(0.3, abs=0.05)


# ---------------------------------------------------------------------------------------- the effect is in the voxels
def estimate(scan: SyntheticScan, spec: CohortSpec) -> list[float]:
    """A simple analyst: core means after regressing out cubic drift and movement; Fisher z and log SD."""
    shared = geometry(spec)
    right = ~shared.left[:, None, None]
    line = np.linspace(-1, 1, len(scan.bold))
    nuisance = np.column_stack([np.polynomial.legendre.legvander(line, 3), scan.motion])
    values = percent(scan)

    def course(region: np.ndarray) -> np.ndarray:
        y = values[:, region[scan.mask]].mean(1)
        return y - nuisance @ np.linalg.lstsq(nuisance, y, rcond=None)[0]

    def z(a: int, b: int) -> float:
        return float(np.arctanh(np.corrcoef(course(shared.core(a)), course(shared.core(b)))[0, 1]))

    regions = shared.regions()
    return [
        z(0, 1),
        np.log(course(regions["binary_amplitude"]).std()),
        z(3, 4),
        np.log(course(regions["continuous_amplitude"]).std()),
        z(7, 8),
        np.log(course(shared.core(AMPLITUDE_BINARY) & right).std()),
        np.log(course(shared.core(AMPLITUDE_CONTINUOUS) & ~right).std()),
        float(np.corrcoef(course(regions["frame"]), scan.task.valence_bold)[0, 1]),
    ]


def test_planted_effects_are_in_the_voxels_and_only_where_planted() -> None:
    spec = CohortSpec(n_subjects=60, grid=(16, 18, 14), spacing=10.0, frames=120, seed=3)
    t = columns(spec)
    e = np.array([estimate(make_subject(spec, i), spec) for i in range(60)])
    e_z = (e - e.mean(0)) / e.std(0)
    binary, continuous = e_z[:, 0] + e_z[:, 1], e_z[:, 2] + e_z[:, 3]

    def r(a: np.ndarray, b: np.ndarray) -> float:
        return float(pearsonr(a, b).statistic)

    # The latents can be read from the voxels...
    assert r(binary, t["latent_binary"]) > 0.85
    assert r(continuous, t["latent_continuous"]) > 0.8
    # ... so the labels are told nearly as well as by the latents themselves,
    ideal = auroc(t["latent_binary"], t["label_binary"])
    assert ideal - 0.12 < auroc(binary, t["label_binary"]) < ideal + 0.06
    ideal = r(t["latent_continuous"], t["label_continuous"])
    assert ideal - 0.2 < r(continuous, t["label_continuous"]) < ideal + 0.15
    # ... each effect in its own place, and none in the null label, other networks or the other hemisphere.
    chance = 3 / np.sqrt(60)
    assert abs(r(binary, t["latent_continuous"])) < chance
    assert abs(r(continuous, t["latent_binary"])) < chance
    assert abs(r(binary, t["label_null"])) < chance
    assert abs(r(continuous, t["label_null"])) < chance
    assert abs(r(e[:, 4], t["latent_binary"])) < chance
    assert abs(r(e[:, 4], t["latent_continuous"])) < chance
    assert abs(r(e[:, 5], t["latent_binary"])) < chance
    assert abs(r(e[:, 6], t["latent_continuous"])) < chance
    assert 0.3 < e[:, 7].mean() < 0.52  # the frame label, target 0.5, thinned by noise


# -------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"binary_auroc": 1.0}, r"binary_auroc=1.0, must be in \[0.5, 1\)"),
        ({"continuous_r": 1.2}, "continuous_r=1.2"),
        ({"tr": 2000.0}, "tr=2000.0, must be 0.1 to 20 seconds"),
        ({"tr": float("nan")}, "finite"),
        ({"grid": (4, 40, 40)}, "at least 8 voxels"),
        ({"networks": 3}, "at least 8"),
        ({"site_tr": (2.0,)}, "one TR for each of the 3 sites"),
        ({"n_subjects": 0}, "n_subjects=0"),
        ({"task": "a-b"}, "letters and digits"),
    ],
)
def test_illegal_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CohortSpec(**change)


def test_a_run_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="run 1"):
        make_subject(SMALL, 0, 1)
    with pytest.raises(UserError, match="subject -1"):
        make_subject(SMALL, -1)


def test_streams_differ_by_part_and_subject() -> None:
    draws = {
        tuple(stream(0, name, *key).integers(0, 2**60, 2))
        for name in ("white", "drift")
        for key in ((0,), (0, 0), (1, 0))
    }
    assert len(draws) == 6

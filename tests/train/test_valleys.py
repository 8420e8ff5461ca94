"""Valleys of experiments/mu_transfer against parabolas that were planted, and verdicts that follow from intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.scripts import load

valleys = load("mu_transfer/valleys.py")

RATES = range(-13, -2)
BEST = {"mup": {16: -8.3, 48: -8.1, 144: -8.4}, "standard": {16: -5.6, 48: -7.4, 144: -8.7}, "mup16": {144: -5.2}}
LEAST = {"mup": 0.75, "standard": 0.751, "mup16": 0.76}


def planted(seeds: int, shift: float = 0.0, leave_out: tuple[str, int] | None = None) -> list[dict[str, Any]]:
    """A parabola a curve; each seed lies elsewhere, by `shift` in its rate at the widest and by a level of its own."""
    found = []
    for curve, widths in BEST.items():
        for width, best in widths.items():
            for seed in range(seeds):
                place = best + shift * seed * (width == 144)
                found += [
                    {
                        "curve": curve,
                        "width": width,
                        "log2_lr": rate,
                        "seed": seed,
                        "val_l1": LEAST[curve] + 0.01 * seed + 0.002 * (rate - place) ** 2,
                        "seconds": 1.0,
                    }
                    for rate in RATES
                    if (curve, width) != leave_out
                ]
    return found


def test_the_lowest_point_of_a_parabola_is_found() -> None:
    x = np.arange(-10.0, -4.0)
    found = valleys.valley(x, 0.7 + 0.003 * (x + 6.8) ** 2)
    assert found == pytest.approx((-6.8, 0.7), abs=1e-9)
    # A rate at which a seed diverged plays no part; where the lowest rate is the last, it stands for the valley.
    broken = np.where(x > -6, np.nan, 0.7 + 0.003 * (x + 6.8) ** 2)
    assert valleys.valley(x, broken) == pytest.approx((-6.8, 0.7), abs=1e-9)
    assert valleys.valley(x, -0.1 * x) == (-5.0, 0.5)


def test_verdicts_of_planted_curves() -> None:
    told = valleys.summary(planted(3), "val_l1")
    assert told["seeds"] == [0, 1, 2]
    for curve, widths in BEST.items():
        for width, best in widths.items():
            assert told[curve]["best_log2_lr"][width] == pytest.approx([best] * 3, abs=1e-6)
    assert told["mup"]["moves_by_steps_of_2"] == pytest.approx([0.3] * 3, abs=1e-6)
    assert told["standard"]["moves_by_steps_of_2"] == pytest.approx([3.1] * 3, abs=1e-6)
    above = told["best_loss_of_widest_above_adamw"]
    assert above["mup"] == pytest.approx([-0.001] * 3)
    assert above["mup16"] == pytest.approx([0.009] * 3)
    assert told["passed"]


def test_an_interval_that_is_too_wide_fails() -> None:
    """Seeds whose best rates lie 0, 1 and 2 steps higher at the widest: their mean moves by 1.1, some draws by 2."""
    told = valleys.summary(planted(3, shift=1.0), "val_l1")
    mean, low, high = told["mup"]["moves_by_steps_of_2"]
    assert mean == pytest.approx(0.9, abs=1e-6)
    assert low < 0.5 < 1 < high
    assert not told["passed"]
    assert next(name for name, passed in told["checks"].items() if not passed).startswith(
        "with muP the best rate moves"
    )


def test_what_was_not_run_has_failed() -> None:
    assert not valleys.summary(planted(2), "val_l1")["checks"]["at least three seeds"]
    told = valleys.summary(planted(3, leave_out=("standard", 144)), "val_l1")
    assert not told["passed"]
    failed = [name for name, passed in told["checks"].items() if not passed]
    assert len(failed) == 2
    assert "moves_by_steps_of_2" not in told["standard"]
    assert told["mup"]["moves_by_steps_of_2"][2] < 1


def test_all_draws_of_three_seeds_are_taken() -> None:
    drawn = valleys.resamples(3)
    assert drawn.shape == (27, 3)
    assert len({tuple(row) for row in drawn.tolist()}) == 27
    assert valleys.resamples(6).shape == (valleys.DRAWS, 6)

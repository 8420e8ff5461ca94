"""Which steps are called bad: the pure statistic, over many clean steps and over planted ones."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from swift.train.callbacks.spike import GRADIENT, GRADIENT_SPIKE, LOSS, LOSS_SPIKE, NEW_LEVEL, OK, Watch, Window
from tests.small import settings

DEFAULT = settings().guard


def watch() -> Watch:
    return Watch(DEFAULT.window, DEFAULT.spike, DEFAULT.patience)


def clean(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient norm of an undisturbed run.

    A loss that falls by a power law from a high start, with hard batches, slow waves and noise whose tails are
    Student's with 5 degrees of freedom; a norm that rises over the warm-up, then falls, with lognormal noise and 1 % of
    batches three times as large.
    """
    draw = np.random.default_rng(seed)
    at = np.arange(steps)
    hard = np.where(draw.random(steps) < 0.02, 1.35, 1.0)
    loss = (
        (0.3 + 0.9 * (1 + at / 50) ** -0.5) * hard * np.exp(0.04 * draw.standard_t(5, steps) + 0.03 * np.sin(at / 70))
    )
    big = np.where(draw.random(steps) < 0.01, 3.0, 1.0)
    norm = (0.2 + np.minimum(at / 500, 1) * 2 * (1 + at / 2000) ** -0.5) * big * np.exp(0.35 * draw.normal(size=steps))
    return loss, norm


@pytest.mark.parametrize("seed", range(3))
def test_twelve_thousand_clean_steps_raise_no_alarm(seed: int) -> None:
    watching = watch()
    kinds = {watching.decide(loss, norm).kind for loss, norm in zip(*clean(12_000, seed))}
    assert kinds == {OK}
    assert watching.bad == 0


@pytest.mark.parametrize(
    ("loss", "norm", "kind"),
    [
        (math.nan, math.nan, LOSS),
        (math.inf, 1.0, LOSS),
        (0.6, math.nan, GRADIENT),
        (0.6, math.inf, GRADIENT),
        (6.0, 1.0, LOSS_SPIKE),
        (0.6, 1e4, GRADIENT_SPIKE),
    ],
)
def test_a_bad_step_is_bad_once_and_changes_no_later_decision(loss: float, norm: float, kind: str) -> None:
    losses, norms = clean(1000, 5)
    disturbed, quiet = watch(), watch()
    for step, values in enumerate(zip(losses, norms)):
        if step == 600:
            before = json.dumps(disturbed.windows["loss"].statistic()), list(disturbed.windows["norm"].logs)
            assert disturbed.decide(loss, norm).kind == kind
            assert before == (json.dumps(disturbed.windows["loss"].statistic()), list(disturbed.windows["norm"].logs))
            continue
        assert disturbed.decide(*values).kind == OK
        quiet.decide(*values)
    assert disturbed.bad == 1
    assert disturbed.state_dict() == quiet.state_dict() | {"bad": 1}


def test_the_limit_is_median_and_mad_of_logarithms() -> None:
    window = Window(9, 10.0)
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    for value in values:
        window.add(value)
    found = window.statistic()
    # Logarithms to base 2 are 0 to 4: median 2, absolute deviations 2 1 0 1 2, their median 1.
    assert found["median"] == pytest.approx(4.0)
    assert found["mad_log"] == pytest.approx(math.log(2))
    assert found["limit"] == pytest.approx(4.0 * 2 ** (10 * 1.4826))


def test_a_quiet_window_still_allows_twice_its_median() -> None:
    watching = Watch(8, 10.0, 3)
    for _ in range(8):
        watching.decide(0.5, 1.0)
    assert watching.decide(0.99, 1.0).kind == OK
    assert watching.decide(1.01, 1.0).kind == LOSS_SPIKE


def test_nothing_is_a_spike_in_the_warm_up_before_half_a_window_or_where_it_is_switched_off() -> None:
    watching = Watch(8, 10.0, 3)
    assert [watching.decide(value, 1.0).kind for value in (1.0, 1.0, 1.0, 50.0)] == [OK] * 4
    watching = Watch(8, 10.0, 3)
    for _ in range(8):
        watching.decide(1.0, 1.0)
    assert watching.decide(50.0, 1.0, warm=False).kind == OK
    never = Watch(8, 0.0, 3)
    assert {never.decide(value, 1.0).kind for value in [1.0] * 8 + [1e9]} == {OK}


def test_a_new_level_is_accepted_after_patience_but_nan_never() -> None:
    watching = Watch(8, 10.0, 2)
    for _ in range(8):
        watching.decide(1.0, 1.0)
    assert [watching.decide(9.0, 1.0).kind for _ in range(4)] == [LOSS_SPIKE, LOSS_SPIKE, NEW_LEVEL, OK]
    assert [watching.decide(math.nan, 1.0).kind for _ in range(9)] == [LOSS] * 9
    assert watching.in_row == 9


def test_a_batch_without_a_voxel_in_its_loss_is_no_spike_and_is_not_learnt_from() -> None:
    watching = Watch(8, 10.0, 2)
    for _ in range(8):
        watching.decide(1.0, 1.0)
    state = watching.state_dict()
    assert watching.decide(0.0, 0.0).kind == OK
    assert watching.state_dict() == state


def test_a_watch_goes_on_from_its_state() -> None:
    losses, norms = clean(500, 8)
    losses[400:420:3] *= 40
    whole, first = watch(), watch()
    kinds = [whole.decide(*values).kind for values in zip(losses, norms)]
    begun = [first.decide(*values).kind for values in zip(losses[:402], norms[:402])]
    second = watch()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [second.decide(*values).kind for values in zip(losses[402:], norms[402:])] == kinds
    assert kinds.count(LOSS_SPIKE) == 7


@pytest.mark.parametrize("seed", range(8))
def test_limits_say_what_will_be_decided(seed: int) -> None:
    """The device compares with `limits` before `decide` has seen the numbers: both must come to the same."""
    rng = np.random.default_rng(seed)
    watch = Watch(window=6, factor=3.0, patience=2)
    kinds = set()
    for step in range(400):
        loss, norm = np.exp(rng.normal(scale=0.3, size=2) + (rng.random(2) < 0.25) * rng.uniform(0, 3, size=2))
        loss, norm = (math.nan if rng.random() < 0.03 else float(np.float32(value)) for value in (loss, norm))
        if step % 7 == 0 and all(limit < math.inf for limit in watch.limits().values()):
            loss = watch.limits()["loss"]  # the limit itself is none too much
        limits = watch.limits(warm=step >= 20)
        within = loss <= limits["loss"] and norm <= limits["norm"]
        verdict = watch.decide(loss, norm, warm=step >= 20)
        kinds.add(verdict.kind)
        assert verdict.bad == (not within)
    assert kinds == {"ok", "loss is not finite", "gradient is not finite", "loss spike", "gradient spike", "new level"}

"""Law fits against planted laws, scipy's own minimisers and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from swift.report import laws
from swift.report.laws import cost_law, fit_joint, fit_power, huber
from swift.utils.errors import UserError

N, D = (v.ravel() for v in np.meshgrid(np.geomspace(7e6, 3e9, 5), np.geomspace(1e8, 3e10, 5)))
E, A, ALPHA, B, BETA = 0.3, 0.25 * 7e6**0.34, 0.34, 0.3 * 1e8**0.28, 0.28
EXACT = E + A / N**ALPHA + B / D**BETA


def noisy(seed, noise=0.005):
    return EXACT * np.exp(noise * np.random.default_rng(seed).standard_normal(len(N)))


def test_exact_losses_give_the_planted_law_back():
    law = fit_joint(N, D, EXACT, draws=100)
    found = law.quantities(law.fit.theta)
    for name, value in {"E": E, "A": A, "a": ALPHA, "B": B, "b": BETA}.items():
        assert found[name] == pytest.approx(value, rel=1e-3)
    np.testing.assert_allclose(law.loss(N, D), EXACT, rtol=1e-6)
    loss, (low, high) = law.predict(3e10, 1e12)
    truth = E + A / 3e10**ALPHA + B / 1e12**BETA
    assert loss == pytest.approx(truth, rel=1e-4)
    assert low <= loss * 1.0001
    assert high >= loss * 0.9999


def test_jacobian_is_the_derivative():
    model = laws._joint_model(np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean())
    theta = np.array([[-1.2, -2.0, 0.3, -1.5, 0.4], [-0.5, -3.0, 0.8, -2.0, 0.1]])
    _, jacobian = model(theta)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        numeric = (model(theta + step)[0] - model(theta - step)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[..., i], numeric, atol=1e-8)


def test_no_lower_loss_is_found_by_l_bfgs_from_many_starts():
    losses = noisy(1)
    law = fit_joint(N, D, losses, draws=100)
    model = laws._joint_model(np.log(N) - law.log_n0, np.log(D) - law.log_d0)

    def objective(theta):
        prediction, jacobian = model(theta[None])
        residual = prediction[0] - np.log(losses)
        slope = np.clip(residual, -law.fit.delta, law.fit.delta)
        return huber(residual, law.fit.delta) * 1e4, slope @ jacobian[0] * 1e4

    generator = np.random.default_rng(0)
    starts = [law.fit.theta, *(generator.normal([-1.2, -2, 0.4, -2, 0.4], [0.3, 1, 0.2, 1, 0.2]) for _ in range(20))]
    found = [minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000}) for start in starts]
    ours = objective(law.fit.theta)[0]
    assert min(result.fun for result in found) >= ours * (1 - 1e-4)


def test_a_spoiled_run_hardly_moves_the_fit():
    losses = noisy(2)
    clean = fit_joint(N, D, losses, draws=100)
    losses[7] *= 1.3
    spoiled = fit_joint(N, D, losses, draws=100)
    for i in (2, 4):
        assert spoiled.fit.theta[i] == pytest.approx(clean.fit.theta[i], abs=0.04)


def test_intervals_hold_planted_exponents():
    """A small version of experiments/scaling_laws/known_truth.py: 20 studies, 95 % intervals."""
    held = []
    for seed in range(20):
        intervals = fit_joint(N, D, noisy(seed), draws=100, seed=seed).intervals()
        held += [intervals["a"][0] <= ALPHA <= intervals["a"][1], intervals["b"][0] <= BETA <= intervals["b"][1]]
    assert sum(held) >= 34


def test_best_size_is_the_minimum_of_the_law_on_a_grid():
    law = fit_joint(N, D, EXACT, draws=100)
    for cost in ((6.0, 1.0), (40.0, 0.9)):
        n, d = law.optimal(1e21, cost)
        assert cost[0] * n ** cost[1] * d == pytest.approx(1e21)
        grid = np.geomspace(1e6, 1e13, 20001)
        best = grid[np.argmin(law.loss(grid, 1e21 / (cost[0] * grid ** cost[1])))]
        assert n == pytest.approx(best, rel=2e-3)


def test_power_law_equals_a_line_in_logarithms():
    x = np.geomspace(1e5, 1e9, 7)
    losses = (3e4 / x) ** 0.07
    law = fit_power(x, losses, draws=100)
    assert law.exponent == pytest.approx(0.07, abs=1e-6)
    assert law.log10_constant == pytest.approx(np.log10(3e4), abs=1e-3)
    low, high = law.intervals()["exponent"]
    assert low <= 0.0700001
    assert high >= 0.0699999


def test_cost_law():
    assert cost_law(N, D, 6 * N * D) == pytest.approx((6, 1))
    assert cost_law(N, D, 40 * N**0.9 * D) == pytest.approx((40, 0.9))
    assert cost_law(N[:1], D[:1], 6 * N[:1] * D[:1]) == pytest.approx((6, 1))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda: fit_joint(N[:2], D[:2], EXACT[:2]), "2 different sizes"),
        (lambda: fit_joint(N[:5], D[:5], EXACT[:5]), "1 different data budgets: .* at least three"),
        (lambda: fit_joint(N[[0, 6, 12, 13, 14]], D[[0, 6, 12, 13, 14]], EXACT[:5]), "at least six"),
        (lambda: fit_joint(N, D, EXACT * 0), "above 0"),
        (lambda: fit_joint(N, D, EXACT * np.nan), "finite"),
        (lambda: fit_power(N[:2], EXACT[:2]), "2 different values: a power law needs at least three"),
        (lambda: fit_power(N[:1], EXACT[:1]), "1 different values"),
    ],
)
def test_too_little_is_refused(fit, message):
    with pytest.raises(UserError, match=message):
        fit()

"""Scaling laws: a robust fit of loss against size and data, intervals of what it says, and the best size for a budget.

Two laws. Of both: L = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv 2203.15556, approach 3), fitted by the Huber
loss of residuals of log L. Of one quantity: L = (c / x)^a (Kaplan et al. 2020, arXiv 2001.08361), a line in logarithms.

Hoffmann et al. minimise by L-BFGS with a fixed Huber threshold of 1e-3. Here the threshold follows the residuals (1.345
robust standard deviations: 95 % efficient for normal noise, still deaf to spoiled runs), and a Levenberg-Marquardt step
with Huber's weights runs on a whole batch of problems at once, so that every start of the grid and every bootstrap draw
is one row. Shapes: R rows (starts or draws), n runs, P free quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from swift.utils.errors import UserError

Array = np.ndarray
Model = Callable[[Array], tuple[Array, Array]]
"""Parameters (R, P) -> predicted log loss (R, n) and its Jacobian (R, n, P)."""

HUBER = 1.345
LEAST_DELTA = 1e-6
EXPONENTS = (0.01, 4.0)
"""Exponents outside are no law that a handful of runs could show."""
STEPS = 200


def huber(residuals: Array, delta: float) -> Array:
    """Sum of Huber's loss over the last axis."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum(-1)


def minimise(model: Model, start: Array, target: Array, bounds: tuple[Array, Array], delta: float) -> Array:
    """Batched Levenberg-Marquardt descent of the Huber loss of `model(theta) - target`.

    Args:
        model: What is fitted.
        start: (R, P).
        target: (R, n) log losses.
        bounds: Lowest and highest value of each parameter, (P,) each.
        delta: Huber's threshold.

    Returns:
        (R, P) parameters, none of a larger loss than its start.
    """
    theta = np.clip(start, *bounds)
    prediction, jacobian = model(theta)
    residual = prediction - target
    loss = huber(residual, delta)
    damping = np.full(len(theta), 1e-2)
    identity = np.eye(theta.shape[1])
    for _ in range(STEPS):
        weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        weighted = jacobian * weight[..., None]
        normal = np.swapaxes(jacobian, 1, 2) @ weighted
        gradient = (np.swapaxes(weighted, 1, 2) @ residual[..., None])[..., 0]
        scale = np.einsum("rpp->rp", normal) + 1e-12
        damped = normal + damping[:, None, None] * scale[:, :, None] * identity
        step = np.linalg.solve(damped, -gradient[..., None])[..., 0]
        candidate = np.clip(theta + step, *bounds)
        predicted, derivative = model(candidate)
        moved = predicted - target
        new = huber(moved, delta)
        better = new < loss
        gained = np.where(better, (loss - new) / np.maximum(loss, 1e-300), 0.0)
        theta = np.where(better[:, None], candidate, theta)
        residual = np.where(better[:, None], moved, residual)
        jacobian = np.where(better[:, None, None], derivative, jacobian)
        loss = np.where(better, new, loss)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-12, 1e12)
        if np.all((better & (gained < 1e-10)) | (~better & (damping > 1e8))):
            break
    return theta


def spread_of(residuals: Array) -> float:
    """Robust standard deviation: median absolute residual / 0.6745."""
    return float(np.median(np.abs(residuals)) / 0.6745)


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        theta: (P,) parameters of the fit, in its own coordinates.
        draws: (R, P) the same of every bootstrap draw.
        residuals: (n,) observed minus fitted log loss.
        delta: Huber's threshold that was used.
        wider: Factor on intervals, as Student's t is wider than a normal: the noise is estimated from the same runs.
    """

    theta: Array
    draws: Array
    residuals: Array
    delta: float
    wider: float

    @property
    def error(self) -> float:
        """Robust standard deviation of the residuals of log loss."""
        return spread_of(self.residuals)

    def interval(self, values: Array, log: bool = False) -> tuple[float, float]:
        """Central 95 % of (R,) values of the draws, widened about their median; `log`: in logarithms."""
        values = np.log(values) if log else values
        middle = np.median(values)
        low, high = middle + self.wider * (np.quantile(values, [0.025, 0.975]) - middle)
        return (float(np.exp(low)), float(np.exp(high))) if log else (float(low), float(high))


def robust_fit(model: Model, starts: Array, target: Array, bounds: tuple[Array, Array], draws: int, seed: int) -> Fit:
    """Best of all starts, then a bootstrap of its residuals.

    Bootstrap: residuals are divided by sqrt(1 - leverage), which undoes that a fit of P parameters to few points runs
    too close to them, centred, drawn with replacement and added to the fitted curve; each draw is fitted anew.

    Args:
        model: What is fitted.
        starts: (S, P).
        target: (n,) log losses.
        bounds: Of the parameters.
        draws: Of the bootstrap.
        seed: Of the draws.
    """

    def best(threshold: float, begin: Array) -> Array:
        rows = np.broadcast_to(target, (len(begin), len(target)))
        found = minimise(model, begin, rows, bounds, threshold)
        return found[np.argmin(huber(model(found)[0] - rows, threshold))]

    theta = best(1e-2, starts)
    # Free parameters bring the residuals closer to zero than the noise is.
    inflate = np.sqrt(len(target) / max(len(target) - starts.shape[1], 1))
    used = max(HUBER * spread_of(model(theta[None])[0][0] - target) * inflate, LEAST_DELTA)
    theta = best(used, np.concatenate([theta[None], starts]))
    fitted, jacobian = (part[0] for part in model(theta[None]))
    residuals = target - fitted
    basis, _ = np.linalg.qr(jacobian)
    leverage = np.clip((basis**2).sum(1), 0.0, 0.9)
    inflated = residuals / np.sqrt(1 - leverage)
    inflated -= inflated.mean()
    generator = np.random.default_rng(seed)
    again = fitted + generator.choice(inflated, (draws, len(target)))
    found = minimise(model, np.broadcast_to(theta, (draws, len(theta))), again, bounds, used)
    n = len(target)
    wider = t.ppf(0.975, max(n - len(theta), 1)) / norm.ppf(0.975) * np.sqrt(n / (n - 1))
    return Fit(theta, found, residuals, used, float(wider))


# ------------------------------------------------------------------------------------------------ loss of size and data
@dataclass(frozen=True)
class JointLaw:
    """L = E + A / N^a + B / D^b. Parameters are (log E, log A0, a, log B0, b), with A0 = A / N0^a at the mean log N."""

    fit: Fit
    log_n0: float
    log_d0: float

    def quantities(self, theta: Array) -> dict[str, Array]:
        """E, A, a, B, b of parameters (..., 5)."""
        log_e, log_a0, a, log_b0, b = np.moveaxis(theta, -1, 0)
        with np.errstate(over="ignore"):
            return {
                "E": np.exp(log_e),
                "A": np.exp(log_a0 + a * self.log_n0),
                "a": a,
                "B": np.exp(log_b0 + b * self.log_d0),
                "b": b,
            }

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Intervals of E, A, a, B, b."""
        found = {}
        for name, values in self.quantities(self.fit.draws).items():
            low, high = self.fit.interval(values, log=name not in "ab")
            found[name] = (max(low, EXPONENTS[0]), min(high, EXPONENTS[1])) if name in "ab" else (low, high)
        return found

    def undetermined(self) -> list[str]:
        """Exponents whose interval reaches the limits of the search: these runs do not tell them."""
        low, high = EXPONENTS
        intervals = self.intervals()
        return [n for n in "ab" if intervals[n][0] <= low * 1.001 or intervals[n][1] >= high * 0.999]

    def loss(self, n: Array | float, d: Array | float, theta: Array | None = None) -> Array:
        """Loss at sizes and data; broadcast over (..., 5) parameters."""
        log_e, log_a0, a, log_b0, b = np.moveaxis(self.fit.theta if theta is None else theta, -1, 0)
        size = np.exp(log_a0 - a * (np.log(n) - self.log_n0))
        data = np.exp(log_b0 - b * (np.log(d) - self.log_d0))
        return np.exp(log_e) + size + data

    def predict(self, n: float, d: float, seed: int = 0) -> tuple[float, tuple[float, float]]:
        """Loss of a run that was not made, and an interval that holds such a run: law and noise both uncertain."""
        generator = np.random.default_rng(seed)
        noise = generator.choice(self.fit.residuals - self.fit.residuals.mean(), len(self.fit.draws))
        noise *= np.sqrt(len(self.fit.residuals) / max(len(self.fit.residuals) - 5, 1))
        many = self.loss(n, d, self.fit.draws) * np.exp(noise)
        return float(self.loss(n, d)), self.fit.interval(many, log=True)

    def optimal(self, compute: float, cost: tuple[float, float], theta: Array | None = None) -> tuple[Array, Array]:
        """Size and data of the lowest loss at a compute C = kappa N^gamma D (Hoffmann: kappa = 6, gamma = 1).

        From d/dN (A N^-a + B (kappa N^gamma / C)^b) = 0: N^(a + gamma b) = a A / (gamma b B) (C / kappa)^b.
        """
        kappa, gamma = cost
        q = self.quantities(self.fit.theta if theta is None else theta)
        log_ratio = np.log(q["a"] / (gamma * q["b"])) + np.log(q["A"]) - np.log(q["B"])
        log_n = (log_ratio + q["b"] * np.log(compute / kappa)) / (q["a"] + gamma * q["b"])
        return np.exp(log_n), compute / kappa * np.exp(-gamma * log_n)


def _joint_model(x: Array, y: Array) -> Model:
    def model(theta: Array) -> tuple[Array, Array]:
        log_e, log_a0, a, log_b0, b = (theta[:, i, None] for i in range(5))
        terms = np.stack([np.broadcast_to(log_e, (len(theta), len(x))), log_a0 - a * x, log_b0 - b * y])
        top = terms.max(0)
        parts = np.exp(terms - top)
        total = parts.sum(0)
        constant, size, data = parts / total
        return top + np.log(total), np.stack([constant, size, -x * size, data, -y * data], -1)

    return model


def fit_joint(n: Array, d: Array, loss: Array, draws: int = 1000, seed: int = 0) -> JointLaw:
    """Fit L = E + A / N^a + B / D^b.

    Args:
        n: (n,) parameters of the models.
        d: (n,) training tokens.
        loss: (n,) losses.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        UserError: fewer than three different sizes or budgets, or fewer than six runs.
    """
    n, d, loss = _positive(n, d, loss)
    for name, values in (("sizes", n), ("data budgets", d)):
        if len(np.unique(values)) < 3:
            raise UserError(
                f"{len(np.unique(values))} different {name}: L = E + A/N^a + B/D^b needs at least three of each"
            )
    if len(loss) < 6:
        raise UserError(f"{len(loss)} runs: five free quantities need at least six")
    log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)
    model = _joint_model(log_n - log_n.mean(), log_d - log_d.mean())
    low, high = float(log_loss.min()), float(log_loss.max())
    bounds = (
        np.array([low - 6, low - 12, EXPONENTS[0], low - 12, EXPONENTS[0]]),
        np.array([low, high + 4, EXPONENTS[1], high + 4, EXPONENTS[1]]),
    )
    span = np.log(max(np.exp(high) - np.exp(low), 1e-6 * np.exp(high)))
    grid = np.meshgrid(
        low + np.log([0.2, 0.6, 0.9]),
        span + np.array([-2.5, -0.7]),
        [0.15, 0.4, 0.9],
        span + np.array([-2.5, -0.7]),
        [0.15, 0.4, 0.9],
        indexing="ij",
    )
    starts = np.stack([axis.ravel() for axis in grid], -1)
    fit = robust_fit(model, starts, log_loss, bounds, draws, seed)
    return JointLaw(fit, float(log_n.mean()), float(log_d.mean()))


# ------------------------------------------------------------------------------------------------ loss of one quantity
@dataclass(frozen=True)
class PowerLaw:
    """L = (c / x)^a. Parameters are (log L at the mean log x, a)."""

    fit: Fit
    log_x0: float

    @property
    def exponent(self) -> float:
        """The exponent a."""
        return float(self.fit.theta[1])

    @property
    def log10_constant(self) -> float:
        """log10 c: at a small exponent c itself leaves the range of a float."""
        return float((self.log_x0 + self.fit.theta[0] / self.fit.theta[1]) / np.log(10))

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Intervals of the exponent and of log10 c."""
        level_at, a = self.fit.draws.T
        return {
            "exponent": self.fit.interval(a),
            "log10_constant": self.fit.interval((self.log_x0 + level_at / a) / np.log(10)),
        }

    def loss(self, x: Array | float, theta: Array | None = None) -> Array:
        """Loss at values of the quantity; broadcast over (..., 2) parameters."""
        at, a = np.moveaxis(self.fit.theta if theta is None else theta, -1, 0)
        return np.exp(at - a * (np.log(x) - self.log_x0))


def fit_power(x: Array, loss: Array, draws: int = 1000, seed: int = 0) -> PowerLaw:
    """Fit L = (c / x)^a.

    Raises:
        UserError: fewer than three different values.
    """
    x, loss = _positive(x, loss)
    if len(np.unique(x)) < 3:
        raise UserError(f"{len(np.unique(x))} different values: a power law needs at least three")
    log_x, log_loss = np.log(x), np.log(loss)
    centred = log_x - log_x.mean()

    def model(theta: Array) -> tuple[Array, Array]:
        jacobian = np.broadcast_to(np.stack([np.ones_like(centred), -centred], -1), (len(theta), len(centred), 2))
        return theta[:, :1] - theta[:, 1:] * centred, jacobian

    bounds = (np.array([log_loss.min() - 10, -EXPONENTS[1]]), np.array([log_loss.max() + 10, EXPONENTS[1]]))
    starts = np.array([[log_loss.mean(), exponent] for exponent in (0.0, 0.05, 0.3, 1.0)])
    return PowerLaw(robust_fit(model, starts, log_loss, bounds, draws, seed), float(log_x.mean()))


def cost_law(n: Array, d: Array, compute: Array) -> tuple[float, float]:
    """(kappa, gamma) of C = kappa N^gamma D, by least squares in logarithms; gamma is 1 for a single size."""
    per_token, log_n = np.log(compute) - np.log(d), np.log(n)
    if len(np.unique(n)) < 2:
        return float(np.exp(np.mean(per_token - log_n))), 1.0
    gamma, log_kappa = np.polyfit(log_n, per_token, 1)
    return float(np.exp(log_kappa)), float(gamma)


def _positive(*columns: Array) -> tuple[Array, ...]:
    made = tuple(np.asarray(column, dtype=np.float64) for column in columns)
    for column in made:
        bad = column[~(np.isfinite(column) & (column > 0))]
        if len(bad):
            raise UserError(f"{bad[0]}: sizes, budgets and losses of a scaling law must be finite numbers above 0")
    return made

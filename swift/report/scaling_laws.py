"""Neural scaling laws from finished runs (figure 4A): loss against size, data and compute.

Fits L = E + A/N^a + B/D^b and the single power laws L = (c/x)^a by a robust method with bootstrap intervals, predicts
the loss of larger runs and the best size for a budget of FLOPs. N: parameters of the model in pre-training, D: patch
tokens seen (repeats counted), L: held-out L1 of the finished run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swift.report.laws import JointLaw, PowerLaw, cost_law, fit_joint, fit_power
from swift.report.points import Point, one_loss
from swift.utils.errors import UserError

Array = np.ndarray
QUANTITIES = {"N": "parameters", "D": "tokens", "C": "FLOPs"}


@dataclass(frozen=True)
class Ladder:
    """Finished runs as columns, each (n,)."""

    names: list[str]
    n: Array
    d: Array
    c: Array
    loss: Array
    unit: str

    def chosen(self, quantity: str) -> Array:
        """Indices of the runs of one power law.

        N: of every size the run with the lowest loss; D: of every budget; C: runs that no run of less or equal compute
        beats. So that what is held back by the other quantities stays out.
        """
        if quantity == "C":
            order = np.lexsort((self.loss, self.c))
            best = np.minimum.accumulate(self.loss[order])
            first = np.concatenate([[True], best[1:] < best[:-1]])
            return order[first]
        values = self.n if quantity == "N" else self.d
        return np.array(
            [min(np.flatnonzero(values == value), key=lambda i: self.loss[i]) for value in np.unique(values)]
        )

    def column(self, quantity: str) -> Array:
        """Values of N, D or C."""
        return {"N": self.n, "D": self.d, "C": self.c}[quantity]


def ladder(points: Sequence[Point]) -> Ladder:
    """Columns of runs that share tokenisation and objective.

    Raises:
        UserError: they do not, or there are fewer than three.
    """
    one_loss(points)
    if len(points) < 3:
        raise UserError(f"{len(points)} finished run{'s' * (len(points) != 1)}: a scaling law needs at least three")
    return Ladder(
        [p.name for p in points],
        np.array([p.parameters for p in points]),
        np.array([p.total("tokens") for p in points]),
        np.array([p.total("flops") for p in points]),
        np.array([p.loss for p in points]),
        points[0].run.unit,
    )


@dataclass
class Fitted:
    """What could be fitted, and why the rest could not."""

    joint: JointLaw | None
    single: dict[str, PowerLaw]
    cost: tuple[float, float]
    refused: dict[str, str]


def fit_all(runs: Ladder, draws: int, seed: int) -> Fitted:
    """Every law that these runs carry.

    Raises:
        UserError: they carry none.
    """
    fitted = Fitted(None, {}, cost_law(runs.n, runs.d, runs.c), {})
    try:
        fitted.joint = fit_joint(runs.n, runs.d, runs.loss, draws, seed)
    except UserError as error:
        fitted.refused["L(N, D)"] = str(error)
    for quantity, word in QUANTITIES.items():
        chosen = runs.chosen(quantity)
        try:
            fitted.single[quantity] = fit_power(runs.column(quantity)[chosen], runs.loss[chosen], draws, seed)
        except UserError as error:
            fitted.refused[f"L({quantity})"] = f"{error} ({word})"
    if fitted.joint is None and not fitted.single:
        raise UserError("; ".join(f"{name}: {why}" for name, why in fitted.refused.items()))
    return fitted


def _with_interval(value: float, low_high: tuple[float, float]) -> dict[str, Any]:
    return {"value": value, "interval": list(low_high)}


def as_json(
    runs: Ladder, fitted: Fitted, predict: Sequence[tuple[float, float]], budgets: Sequence[float]
) -> dict[str, Any]:
    """Everything that was found, JSON-ready; intervals hold 95 %."""
    found: dict[str, Any] = {
        "runs": len(runs.names),
        "unit": runs.unit,
        "compute": {"formula": "C = kappa N^gamma D", "kappa": fitted.cost[0], "gamma": fitted.cost[1]},
        "refused": fitted.refused,
    }
    if fitted.joint is not None:
        law = fitted.joint
        intervals = law.intervals()
        found["L(N, D) = E + A/N^a + B/D^b"] = {
            **{n: _with_interval(float(v), intervals[n]) for n, v in law.quantities(law.fit.theta).items()},
            "residual_sd_of_log_loss": law.fit.error,
            "huber_threshold": law.fit.delta,
            "undetermined": law.undetermined(),
        }
    for quantity, power in fitted.single.items():
        intervals = power.intervals()
        found[f"L({quantity}) = (c/{quantity})^a"] = {
            "a": _with_interval(power.exponent, intervals["exponent"]),
            "log10 c": _with_interval(power.log10_constant, intervals["log10_constant"]),
            "runs": len(runs.chosen(quantity)),
        }
    if (predict or budgets) and fitted.joint is None:
        raise UserError(f"nothing can be predicted: {fitted.refused['L(N, D)']}")
    if fitted.joint is not None:
        law = fitted.joint
        found["predicted"] = [{"N": n, "D": d, "loss": _with_interval(*law.predict(n, d))} for n, d in predict]
        found["best"] = [_best(law, fitted.cost, c, runs.n) for c in budgets]
    return found


def _best(law: JointLaw, cost: tuple[float, float], compute: float, sizes: Array) -> dict[str, Any]:
    """Size, data and loss of the best run at a compute; whether that size is among those that were run."""
    n, d = (float(value) for value in law.optimal(compute, cost))
    many_n, many_d = law.optimal(compute, cost, law.fit.draws)
    loss, uncertain = law.predict(n, d)
    return {
        "C": compute,
        "N": _with_interval(n, law.fit.interval(many_n, log=True)),
        "D": _with_interval(d, law.fit.interval(many_d, log=True)),
        "loss": _with_interval(loss, uncertain),
        "among_sizes": bool(sizes.min() <= n <= sizes.max()),
    }


def table(found: dict[str, Any]) -> str:
    """The findings as text."""

    def cell(entry: dict[str, Any], form: str = ".4g") -> str:
        low, high = entry["interval"]
        return f"{entry['value']:{form}} [{low:{form}}, {high:{form}}]"

    lines = [f"{found['runs']} finished runs; loss in {found['unit']}; brackets: 95 % bootstrap intervals"]
    for name, law in found.items():
        if name.startswith("L("):
            lines.append(name)
            lines += [f"  {key:<8} {cell(value)}" for key, value in law.items() if isinstance(value, dict)]
            lines += [
                f"  {key} is not determined: its interval reaches the limits of the search, so what "
                f"{'size' if key == 'a' else 'data'} contributes cannot be told (nor the best size)"
                for key in law.get("undetermined", [])
            ]
    for entry in found.get("predicted", []):
        lines.append(f"loss of N={entry['N']:.3g}, D={entry['D']:.3g}: {cell(entry['loss'])}")
    for entry in found.get("best", []):
        lines.append(
            f"best for C={entry['C']:.3g} FLOPs: N {cell(entry['N'], '.3g')}, D {cell(entry['D'], '.3g')}, "
            f"loss {cell(entry['loss'])}{'' if entry['among_sizes'] else '; N lies outside the sizes that were run'}"
        )
    lines += [f"not fitted: {name}: {why}" for name, why in found["refused"].items()]
    return "\n".join(lines)

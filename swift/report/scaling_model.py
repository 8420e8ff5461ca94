"""A model of step time over nodes, fitted to measured rates.

The device time that a clip costs on n nodes (n / rate) is written as four parts, none of them negative:

    n / rate(n) = c (1 + h [n > 1] + k log2 n + s n^q) + data

c: compute on one node. h: what leaving the node costs once (exposed volume of a ring, which hardly depends on n). k:
latency of collectives, by doublings. s n^q: contention and stragglers. data: waiting for input, where it was measured.
Few points cannot tell q, so it is not fitted: the model is fitted for each q of a fixed list and their geometric mean
is the prediction; the interval spans all of them and their bootstrap. In strong scaling (fixed batch) a step takes
batch / rate(n); in weak scaling (fixed batch a node) n / rate(n) is the step time itself, up to a factor.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from swift.report.output import say
from swift.report.points import find_runs
from swift.report.runs import load_run
from swift.utils.errors import UserError

Array = np.ndarray
POWERS = (0.25, 0.5, 0.75, 1.0)
"""q: from what the slowest of n adds to what a shared file system or a congested network adds."""
PARTS = ("compute", "leaving the node", "collectives", "contention and stragglers")
REWEIGHTED = 20


@dataclass(frozen=True)
class Measured:
    """Rates of one machine or sweep, in the order of its node counts.

    Attributes:
        name: Of the machine or sweep.
        nodes: (n,) increasing.
        rate: (n,) clips/s of all nodes.
        waiting: (n,) part of the time that waited for data; nan where it was not measured.
    """

    name: str
    nodes: Array
    rate: Array
    waiting: Array

    def check(self) -> None:
        """Raise UserError for what cannot be a scaling series."""
        if len(self.nodes) < 2:
            raise UserError(f"{self.name}: a single point says nothing about scaling; give at least three node counts")
        if np.any(np.diff(self.nodes) <= 0):
            at = int(np.flatnonzero(np.diff(self.nodes) <= 0)[0])
            raise UserError(
                f"{self.name}: node counts must increase, but {self.nodes[at + 1]:g} follows {self.nodes[at]:g}"
            )
        if not np.all(np.isfinite(self.rate) & (self.rate > 0)) or self.nodes[0] < 1:
            raise UserError(f"{self.name}: node counts must be at least 1 and rates above 0")

    def part(self, chosen: Array) -> Measured:
        """Some of the points."""
        return Measured(self.name, self.nodes[chosen], self.rate[chosen], self.waiting[chosen])

    @property
    def efficiency(self) -> Array:
        """Rate a node, as a part of that of the smallest count."""
        per_node = self.rate / self.nodes
        return per_node / per_node[0]


def design(nodes: Array, power: float) -> Array:
    """(n, 4) columns of c, c h, c k, c s."""
    nodes = np.asarray(nodes, dtype=np.float64)
    return np.stack([np.ones_like(nodes), nodes > 1, np.log2(nodes), nodes**power - 1], -1).astype(np.float64)


def fit_parts(nodes: Array, cost: Array, power: float) -> Array:
    """(4,) non-negative parts by robust least squares of relative errors (Huber's weights, reweighted)."""
    columns = design(nodes, power) / cost[:, None]
    weight = np.ones(len(cost))
    parts = np.zeros(4)
    for _ in range(REWEIGHTED):
        root = np.sqrt(weight)
        parts = nnls(columns * root[:, None], root)[0]
        residual = np.abs(columns @ parts - 1)
        threshold = max(1.345 * float(np.median(residual)) / 0.6745, 1e-6)
        weight = np.minimum(1.0, threshold / np.maximum(residual, 1e-12))
    return parts


@dataclass(frozen=True)
class StepModel:
    """Fitted parts of every q, of the fit and of bootstrap draws.

    Attributes:
        fitted: The points it was fitted to.
        parts: (Q, 4).
        draws: (R, Q, 4).
        data: (c0, c1) of data seconds a clip and node, c0 + c1 (n - 1); zeros where it was not measured.
    """

    fitted: Measured
    parts: Array
    draws: Array
    data: tuple[float, float]

    def _costs(self, nodes: Array, parts: Array) -> Array:
        """(..., Q, n) node-seconds a clip."""
        cost = np.stack([parts[..., i, :] @ design(nodes, power).T for i, power in enumerate(POWERS)], -2)
        return cost + self.data[0] + self.data[1] * (nodes - 1)

    def rate(self, nodes: Array) -> Array:
        """Predicted clips/s of all nodes, (n,)."""
        nodes = np.asarray(nodes, dtype=np.float64)
        return nodes / np.exp(np.log(self._costs(nodes, self.parts)).mean(-2))

    def interval(self, nodes: Array) -> tuple[Array, Array]:
        """95 % of all draws under all q, clips/s."""
        nodes = np.asarray(nodes, dtype=np.float64)
        rates = nodes / self._costs(nodes, self.draws).reshape(-1, len(nodes))
        low, high = np.quantile(rates, [0.025, 0.975], axis=0)
        return low, high

    def shares(self, nodes: Array) -> dict[str, Array]:
        """Node-seconds a clip by part, mean over q."""
        nodes = np.asarray(nodes, dtype=np.float64)
        each = np.stack([self.parts[i] * design(nodes, power) for i, power in enumerate(POWERS)]).mean(0)
        found = {name: each[:, i] for i, name in enumerate(PARTS)}
        if any(self.data):
            found["data"] = self.data[0] + self.data[1] * (nodes - 1)
        return found


def fit_model(points: Measured, draws: int = 200, seed: int = 0) -> StepModel:
    """Fit the model of step time.

    Raises:
        UserError: fewer than three points, or node counts that do not increase.
    """
    points.check()
    if len(points.nodes) < 3:
        raise UserError(f"{points.name}: {len(points.nodes)} node counts; a model of step time needs at least three")
    cost = points.nodes / points.rate
    data = (0.0, 0.0)
    if np.all(np.isfinite(points.waiting)):
        columns = np.stack([np.ones_like(points.nodes), points.nodes - 1], -1) / cost[:, None]
        found = nnls(columns, points.waiting)[0]
        data = float(found[0]), float(found[1])
        cost = cost * (1 - points.waiting)
    parts = np.stack([fit_parts(points.nodes, cost, power) for power in POWERS])
    generator = np.random.default_rng(seed)
    many = np.empty((draws, len(POWERS), 4))
    for i, power in enumerate(POWERS):
        fitted = design(points.nodes, power) @ parts[i]
        # Few residuals of a flexible fit: at least 3 % of noise, what a repeated measurement of a job varies by.
        noise = max(float(np.sqrt(np.mean((cost / fitted - 1) ** 2))), 0.03)
        for draw in range(draws):
            again = fitted * np.exp(noise * generator.standard_normal(len(cost)))
            many[draw, i] = fit_parts(points.nodes, again, power)
    return StepModel(points, parts, many, data)


# --------------------------------------------------------------------------------------------------------------- input
def read_table(path: Path) -> list[Measured]:
    """Series of a CSV with columns nodes, clips_per_second and, if present, machine and data_wait.

    Raises:
        UserError: no such file or columns, or something that is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    series: dict[str, list[tuple[float, float, float]]] = {}
    for line, row in enumerate(rows, start=2):
        try:
            values = float(row["nodes"]), float(row["clips_per_second"]), float(row.get("data_wait") or "nan")
        except KeyError as error:
            raise UserError(f"{path}: no column {error.args[0]}; needed are nodes and clips_per_second") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {line}: {error}") from error
        series.setdefault(row.get("machine") or path.stem, []).append(values)
    if not series:
        raise UserError(f"{path}: no rows")
    return [Measured(name, *np.array(found, dtype=np.float64).T) for name, found in series.items()]


def read_runs(paths: Sequence[Path]) -> Measured:
    """A series from run directories of a sweep over parallel.nodes (or, on one machine, over its ranks).

    Unfinished runs, and those without input, are named and left out.

    Raises:
        UserError: no finished run, one without metrics of speed, or two of one count.
    """
    found = []
    for path in find_runs(paths):
        run = load_run(path)
        if not run.summary:
            say([f"left out: {path} is not finished"])
            continue
        if run.setting("data.repeat_batch"):
            say([f"left out: {path} ran without input (data.repeat_batch=true)"])
            continue
        rate, waits = run.series("perf/clips_per_second")[1], run.series("perf/data_wait")[1]
        if not len(rate):
            raise UserError(f"{path}/metrics.jsonl: no perf/clips_per_second")
        nodes, devices = (int(run.setting(f"parallel.{key}") or 1) for key in ("nodes", "devices"))
        # The first logged interval holds the start-up.
        keep = slice(1, None) if len(rate) > 2 else slice(None)
        wait = float(np.median(waits[keep])) if len(waits) else math.nan
        found.append((nodes, devices, float(np.median(rate[keep])), wait))
    if not found:
        raise UserError("none of these runs is finished")
    several = len({nodes for nodes, *_ in found}) > 1
    rows = sorted((nodes if several else devices, rate, wait) for nodes, devices, rate, wait in found)
    made = Measured("nodes" if several else "ranks of one machine", *np.array(rows, dtype=np.float64).T)
    made.check()
    return made


# ------------------------------------------------------------------------------------------------------------- command
def findings(points: Measured, model: StepModel, predict: Sequence[float]) -> dict[str, Any]:
    """Measured and predicted rates, JSON-ready."""
    nodes = np.array(sorted({*points.nodes.tolist(), *predict}))
    rates, (low, high) = model.rate(nodes), model.interval(nodes)
    measured = dict(zip(points.nodes.tolist(), points.rate.tolist(), strict=True))
    used = set(model.fitted.nodes.tolist())
    base = points.rate[0] / points.nodes[0]
    rows = []
    for i, count in enumerate(nodes.tolist()):
        seen = measured.get(count)
        rows.append(
            {
                "nodes": int(count),
                "fitted": count in used,
                "measured": seen,
                "model": float(rates[i]),
                "interval": [float(low[i]), float(high[i])],
                "error": None if seen is None else float(rates[i] / seen - 1),
                "efficiency": None if seen is None else float(seen / count / base),
            }
        )
    shares = {name: [float(v) for v in values] for name, values in model.shares(nodes).items()}
    return {"series": points.name, "rows": rows, "node_seconds_a_clip": shares}


def table(found: dict[str, Any]) -> str:
    """The findings as text."""
    lines = [f"{found['series']}: clips/s", f"{'nodes':>6} {'measured':>10} {'efficiency':>11} {'model':>10}  95 %"]
    for row in found["rows"]:
        seen = "-" if row["measured"] is None else f"{row['measured']:.2f}"
        part = "-" if row["efficiency"] is None else f"{100 * row['efficiency']:.1f} %"
        error = "" if row["error"] is None else f"{100 * row['error']:+.1f} % "
        use = "fitted" if row["fitted"] else "predicted"
        low, high = row["interval"]
        lines.append(
            f"{row['nodes']:>6} {seen:>10} {part:>11} {row['model']:>10.2f}  [{low:.1f}, {high:.1f}] {error}{use}"
        )
    return "\n".join(lines)

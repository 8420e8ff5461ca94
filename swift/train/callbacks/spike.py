"""Which optimizer steps are bad, decided from their loss and gradient norm alone. Plain Python.

A spike is found by a robust statistic: the logarithm of a value against median and median absolute deviation (MAD) of
the last good steps. Nothing bad ever enters the window, so one NaN cannot make every later step look bad, or good.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

SIGMA = 1.4826
"""MAD to standard deviation, for normal noise."""
LEAST = math.log(2.0)
"""A value below twice the median is no spike, however quiet the window was."""

OK = "ok"
LOSS, GRADIENT = "loss is not finite", "gradient is not finite"
LOSS_SPIKE, GRADIENT_SPIKE = "loss spike", "gradient spike"
NEW_LEVEL = "new level"


@dataclass
class Verdict:
    """What was decided of a step.

    Attributes:
        kind: ok, or what is wrong: one of the names above. NEW_LEVEL: a spike that was too long to be one; a good step.
        loss, norm: Of the step.
        limits: loss, norm -> {median, mad, limit}, in the units of the value; empty where there are too few good steps.
    """

    kind: str
    loss: float
    norm: float
    limits: dict[str, dict[str, float]]

    @property
    def bad(self) -> bool:
        """Whether the step must not be taken."""
        return self.kind not in (OK, NEW_LEVEL)

    @property
    def spike(self) -> bool:
        """Finite, but much too large."""
        return self.kind in (LOSS_SPIKE, GRADIENT_SPIKE)


class Window:
    """The last good values of one quantity.

    Args:
        size: Values kept; no value is a spike before there are half as many.
        factor: Robust standard deviations of the logarithm above the median that make a spike; 0: nothing is one.
    """

    def __init__(self, size: int, factor: float) -> None:
        self.size, self.factor = size, factor
        self.logs: deque[float] = deque(maxlen=size)

    def statistic(self) -> dict[str, float]:
        """Median, MAD (of logarithms) and the limit above which a value is a spike; empty if too few are known."""
        if self.factor <= 0 or 2 * len(self.logs) < self.size:
            return {}
        middle = median(self.logs)
        mad = median(abs(value - middle) for value in self.logs)
        limit = middle + max(self.factor * SIGMA * mad, LEAST)
        # Beyond what a float holds: no limit.
        return {"median": math.exp(middle), "mad_log": mad, "limit": math.exp(limit) if limit < 700 else math.inf}

    def add(self, value: float) -> None:
        """Take a good value in; those without a logarithm (a batch without a voxel in its loss) are left out."""
        if value > 0 and math.isfinite(value):
            self.logs.append(math.log(value))


class Watch:
    """Decides step by step; all it knows is in `state_dict`, so that a resumed run decides the same.

    Args:
        window, factor: Of the statistics, see `Window`.
        patience: Spikes in a row that are skipped; the one after them is taken for a new level, and the windows begin
            anew.
    """

    def __init__(self, window: int, factor: float, patience: int) -> None:
        self.patience = patience
        self.windows = {"loss": Window(window, factor), "norm": Window(window, factor)}
        self.in_row = 0
        """Bad steps since the last good one."""
        self.spikes = 0
        """Spikes since the last step that was none."""
        self.bad = 0
        """Bad steps in all."""

    def limits(self, warm: bool = True) -> dict[str, float]:
        """What loss and norm of the next step may be: above it `decide` will call the step bad; inf: no limit."""
        if not warm or self.spikes >= self.patience:  # one more is a new level
            return dict.fromkeys(self.windows, math.inf)
        return {name: window.statistic().get("limit", math.inf) for name, window in self.windows.items()}

    def decide(self, loss: float, norm: float, warm: bool = True) -> Verdict:
        """Decide about a step; a good one enters the windows.

        Args:
            loss: Mean over micro-batches and ranks.
            norm: Global gradient norm before clipping.
            warm: Whether the warm-up is over; before, nothing is called a spike.
        """
        values = {"loss": loss, "norm": norm}
        limits = {name: window.statistic() for name, window in self.windows.items()}
        kind = OK
        if not math.isfinite(loss):
            kind = LOSS
        elif not math.isfinite(norm):
            kind = GRADIENT
        elif warm:
            over = [name for name, value in values.items() if limits[name] and value > limits[name]["limit"]]
            if over:
                kind = LOSS_SPIKE if over[0] == "loss" else GRADIENT_SPIKE
        if kind in (LOSS_SPIKE, GRADIENT_SPIKE):
            self.spikes += 1
            if self.spikes > self.patience:
                kind = NEW_LEVEL
                for window in self.windows.values():
                    window.logs.clear()
        verdict = Verdict(kind, loss, norm, limits)
        if verdict.bad:
            self.in_row, self.bad = self.in_row + 1, self.bad + 1
            return verdict
        self.in_row = self.spikes = 0
        for name, value in values.items():
            self.windows[name].add(value)
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        counts = {"in_row": self.in_row, "spikes": self.spikes, "bad": self.bad}
        return counts | {name: list(window.logs) for name, window in self.windows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.in_row, self.spikes, self.bad = state["in_row"], state["spikes"], state["bad"]
        for name, window in self.windows.items():
            window.logs = deque(state[name], maxlen=window.size)

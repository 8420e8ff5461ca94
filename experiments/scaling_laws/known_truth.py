"""Does the law fit find exponents that were planted? 100 simulated studies; writes known_truth.json beside this file.

A study has a ladder of sizes and budgets, a planted law L = E + A/N^a + B/D^b with its own random constants, normal
noise of log L, and sometimes runs that are spoiled (20 % too high). Counted is how often the 95 % interval holds the
planted exponent.

    python experiments/scaling_laws/known_truth.py          # about a minute and a half on one core
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from swift.report.laws import fit_joint

HERE = Path(__file__).resolve().parent
STUDIES, DRAWS = 100, 400
KINDS = {
    "6 sizes x 6 budgets, noise 0.5 %": (6, 6, 0.005, 0),
    "6 sizes x 6 budgets, noise 0.5 %, 2 runs spoiled": (6, 6, 0.005, 2),
    "6 sizes x 6 budgets, noise 1 %": (6, 6, 0.01, 0),
    "5 sizes x 4 budgets, noise 0.5 %, 1 run spoiled": (5, 4, 0.005, 1),
}


def study(seed: int, sizes: int, budgets: int, noise: float, spoiled: int, draws: int) -> dict[str, Any]:
    """Plant, simulate, fit: whether each interval holds the truth, and the fit's error."""
    generator = np.random.default_rng(seed)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(7e6, 3e9, sizes), np.geomspace(1e8, 3e10, budgets)))
    truth = {"a": generator.uniform(0.25, 0.5), "b": generator.uniform(0.25, 0.5)}
    constant = generator.uniform(0.2, 0.5)
    size, data = generator.uniform(0.15, 0.4, 2)
    loss = constant + size * (n / n.min()) ** -truth["a"] + data * (d / d.min()) ** -truth["b"]
    loss *= np.exp(noise * generator.standard_normal(len(n)))
    loss[generator.choice(len(n), spoiled, replace=False)] *= 1.2
    law = fit_joint(n, d, loss, draws, seed)
    intervals, found = law.intervals(), law.quantities(law.fit.theta)
    return {
        name: {
            "held": bool(intervals[name][0] <= value <= intervals[name][1]),
            "error": abs(float(found[name]) - value),
            "width": intervals[name][1] - intervals[name][0],
        }
        for name, value in truth.items()
    }


def judged(studies: int, draws: int) -> dict[str, Any]:
    """Counts over the studies of every kind."""
    result: dict[str, Any] = {"studies": studies, "draws": draws}
    for kind, (sizes, budgets, noise, spoiled) in KINDS.items():
        began = time.process_time()
        found = [study(seed, sizes, budgets, noise, spoiled, draws) for seed in range(studies)]
        result[kind] = {
            "a held": sum(s["a"]["held"] for s in found),
            "b held": sum(s["b"]["held"] for s in found),
            "both held": sum(s["a"]["held"] and s["b"]["held"] for s in found),
            "median error": {k: round(float(np.median([s[k]["error"] for s in found])), 4) for k in "ab"},
            "median width": {k: round(float(np.median([s[k]["width"] for s in found])), 4) for k in "ab"},
            "cpu_seconds": round(time.process_time() - began, 1),
        }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--out", type=Path, default=HERE / "known_truth.json")
    options = parser.parse_args()
    text = json.dumps(judged(options.studies, options.draws), indent=2)
    options.out.write_text(text + "\n")
    print(text)

"""Tables and figures of the study, from points.jsonl.

    python -m experiments.learning.show --add DIR/points.jsonl    # keep the results of a study here, first
    python -m experiments.learning.show                           # tables into README.md, trained.png, factors.png

An interval is a bootstrap of 95 % over held-out subjects (cohort) or clips and masks (sample), and over the training
seeds where there are several; differences are of the same clips and masks.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.learning.figures import draw_factors, draw_trained
from experiments.learning.points import base_points, chosen, data_of_a_step
from swift.utils import jsonl
from swift.utils.files import replace_text

HERE = Path(__file__).resolve().parent
KEPT = HERE / "points.jsonl"
DRAWS = 4000
BEGIN, END = "<!-- made by show.py -->", "<!-- end of what show.py made -->"
LOW_RANK = {"cohort": "cohort: low-rank (training subjects)", "sample": "sample: low-rank (own scan)"}
BOTH = {suite: name + " + local ridge" for suite, name in LOW_RANK.items()}
Line = dict[str, Any]


def small(line: Line) -> Line:
    """A line of a study with its rows summed: by subject and clip, on the sample by mask too, and `watch` averaged."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    watch: dict[str, list[float]] = defaultdict(list)
    for row in line["rows"]:
        key = f"{row['subject']} {row['start']}" + (f" {row['seed']}" if line["suite"] == "sample" else "")
        sums[key][0] += row["sum"]
        sums[key][1] += row["voxels"]
        for name, value in row.get("watch", {}).items():
            watch[name].append(value)
    kept = {key: value for key, value in line.items() if key != "rows"}
    kept["clips"] = {key: [round(total, 1), count] for key, (total, count) in sums.items()}
    if watch:
        kept["watch"] = {name: round(float(np.mean(values)), 4) for name, values in watch.items()}
    return kept


def add(source: Path) -> None:
    """Keep the lines of a study; one of the same point is replaced."""
    kept = {line["point"]: line for line in (jsonl.read(KEPT) if KEPT.exists() else [])}
    kept |= {line["point"]: small(line) for line in jsonl.read(source) if line["rows"]}
    replace_text(KEPT, "".join(json.dumps(line) + "\n" for line in kept.values()))


@dataclass(frozen=True)
class Difference:
    """Of a prediction to another on the same clips and masks: L1 of the first, the difference and its interval."""

    l1: float
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high == 0:
            return "0"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def compare(lines: list[Line], others: list[Line]) -> Difference:
    """The lines of one recipe (one a seed) beside those of another.

    Subjects (cohort), or clips and masks (sample), are drawn, and for each draw the seeds of both.
    """
    keys = sorted(set.intersection(*(set(line["clips"]) for line in [*lines, *others])))
    sample = lines[0]["suite"] == "sample"
    units = sorted({_unit(key, sample) for key in keys})
    masks = sorted({_mask(key, sample) for key in keys})

    def table(part: list[Line]) -> np.ndarray:
        found = np.zeros((len(part), len(units), len(masks), 2))
        for at, line in enumerate(part):
            for key in keys:
                found[at, units.index(_unit(key, sample)), masks.index(_mask(key, sample))] += line["clips"][key]
        return found

    rng = np.random.default_rng(0)
    a, b = table(lines), table(others)

    def counts(size: int) -> np.ndarray:
        """(DRAWS, size): how often each of `size` things is drawn with replacement."""
        return rng.multinomial(size, np.full(size, 1 / size), DRAWS).astype(float)

    units_drawn, masks_drawn = counts(len(units)), counts(len(masks))

    def levels(part: np.ndarray) -> np.ndarray:
        drawn = np.einsum("ds,du,dm,sumc->dc", counts(len(part)), units_drawn, masks_drawn, part, optimize=True)
        return drawn[:, 0] / drawn[:, 1]

    def level(values: np.ndarray) -> float:
        total = values.sum((0, 1, 2))
        return float(total[0] / total[1])

    low, high = np.percentile(levels(a) - levels(b), [2.5, 97.5]) if lines is not others else (0.0, 0.0)
    return Difference(level(a), level(a) - level(b), float(low), float(high))


def _unit(key: str, sample: bool) -> str:
    return key.rsplit(" ", 1)[0] if sample else key.split(" ")[0]


def _mask(key: str, sample: bool) -> str:
    return key.rsplit(" ", 1)[1] if sample else ""


def recipes(points: dict[str, Line], suite: str) -> dict[str, list[Line]]:
    """Name -> lines, one a seed: the closed forms, bounds and trainings of a suite, the best first."""
    found: dict[str, list[Line]] = defaultdict(list)
    for name, line in points.items():
        if line["suite"] == suite and not name.startswith("factors/"):
            found[name.split("#")[0]].append(line)
    return dict(sorted(found.items(), key=lambda item: float(np.mean([line["l1"] for line in item[1]]))))


def plain(name: str) -> str:
    """A recipe's name as a reader knows it."""
    if ": " in name:
        return name.split(": ", 1)[1]
    short = name.removeprefix("sample/final/").removeprefix("cohort/")
    return short if short.endswith("untrained") else f"trained: {short}"


def recipe_table(points: dict[str, Line], suite: str) -> list[str]:
    """Markdown lines: every recipe of a suite beside low-rank, and beside low-rank + local ridge."""
    found = recipes(points, suite)
    out = ["| prediction | CPU-s | steps | L1 | seeds | beside low-rank | beside low-rank + local ridge |"]
    out.append("|---|---|---|---|---|---|---|")
    for name, lines in found.items():
        trained = lines[0].get("steps", 0) > 0
        ends = [line["l1"] for line in lines]
        cells = [
            plain(name),
            f"{np.mean([line['cpu_seconds'] for line in lines]):.0f}" if trained else "",
            f"{np.mean([line['steps'] for line in lines]):.0f}" if trained else "",
            f"{np.mean(ends):.4f}",
            ", ".join(f"{end:.4f}" for end in ends) if len(ends) > 1 else ("one" if trained else ""),
            *(str(compare(lines, found[base[suite]])) for base in (LOW_RANK, BOTH)),
        ]
        out.append("| " + " | ".join(cells) + " |")
    return out


WATCHED = ("cosine", "means of cubes", "within cubes", "fewest visible", "most visible")


def watch_table(points: dict[str, Line]) -> list[str]:
    """Markdown lines: what the trained models predict."""
    out = ["| training | cosine to low-rank | variance explained: means of cubes | within cubes |"]
    out[0] += " L1 of frames with fewest visible voxels | with most |"
    out.append("|---" * 6 + "|")
    for name, line in points.items():
        if "watch" in line and not name.startswith("factors/"):
            values = " | ".join(f"{line['watch'][one]:.3f}" for one in WATCHED)
            out.append(f"| {name} | {values} |")
    return out


def base_at(points: dict[str, Line], base: str, steps: float) -> Line | None:
    """A base after a number of steps: between its two trainings next to that number; beyond all, the last one."""
    lines = sorted((points[name] for name in base_points(base) if name in points), key=lambda line: line["steps"])
    if not lines:
        return None
    place = float(np.interp(steps, [line["steps"] for line in lines], range(len(lines))))
    low, high = lines[int(place)], lines[min(int(place) + 1, len(lines) - 1)]
    share = place - int(place)
    clips = {
        key: [(1 - share) * total + share * high["clips"][key][0], count]
        for key, (total, count) in low["clips"].items()
    }
    return low | {"clips": clips, "l1": (1 - share) * low["l1"] + share * high["l1"]}


def factor_rows(points: dict[str, Line]) -> list[tuple[str, dict[str, Difference]]]:
    """("factor = value", base -> difference to it after as many clips), in the order of points.py."""
    found: dict[str, dict[str, Difference]] = defaultdict(dict)
    for point in chosen(["factors"]):
        _, base, what = point.name.split("/", 2)
        line = points.get(point.name)
        if line is None or point.name in base_points(base):
            continue
        other = base_at(points, base, line["steps"] * data_of_a_step(point))
        if other is not None:
            found[what][base] = compare([line], [other])
    order = list(dict.fromkeys(what.split("=")[0] for what in found))
    return sorted(found.items(), key=lambda item: order.index(item[0].split("=")[0]))


def factor_table(points: dict[str, Line], rows: list[tuple[str, dict[str, Difference]]]) -> list[str]:
    """Markdown lines: each factor around both bases, with the steps that its CPU time was enough for."""
    out = ["| factor | network: steps | L1 | beside its base | maps=20: steps | L1 | beside its base |"]
    out.append("|---" * 7 + "|")
    bases = {
        base: sorted((points[n] for n in base_points(base) if n in points), key=lambda line: -line["steps"])
        for base in ("network", "maps")
    }
    for place in range(max(map(len, bases.values()))):
        cells = []
        for lines in bases.values():
            one = lines[place] if place < len(lines) else None
            cells += [str(one["steps"]), f"{one['l1']:.4f}", ""] if one else ["", "", ""]
        out.append("| base | " + " | ".join(cells) + " |")
    for what, found in rows:
        cells = []
        for base in bases:
            difference = found.get(base)
            steps = points[f"factors/{base}/{what}"]["steps"] if difference else 0
            cells += [str(steps), f"{difference.l1:.4f}", str(difference)] if difference else ["", "", ""]
        out.append(f"| {what.replace('=', ' = ', 1)} | " + " | ".join(cells) + " |")
    missing = [point.name.removeprefix("factors/") for point in chosen(["factors"]) if point.name not in points]
    return [*out, "", f"Not run for want of time: {'; '.join(missing)}." if missing else ""]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="points.jsonl of a study, kept here first")
    options = parser.parse_args()
    for source in options.add:
        add(source)
    points = {line["point"]: line for line in jsonl.read(KEPT)}
    text = ["### Held-out synthetic subjects", "", *recipe_table(points, "cohort"), "", "![trained](trained.png)", ""]
    if LOW_RANK["sample"] in points:
        text += ["### The demo's held-out clips, ten masks", "", *recipe_table(points, "sample"), ""]
    text += ["### What the trained models predict", "", *watch_table(points), ""]
    rows = factor_rows(points)
    if rows:
        text += ["### One factor at a time", "", *factor_table(points, rows), ""]
        draw_factors(rows, HERE / "factors.png")
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    replace_text(readme, before + "\n".join([BEGIN, "", *text]) + END + rest.split(END)[1])
    suites = {}
    for suite in ("cohort", "sample"):
        found = recipes(points, suite)
        if LOW_RANK[suite] in found:
            suites[suite] = {plain(name): compare(lines, found[LOW_RANK[suite]]) for name, lines in found.items()}
    draw_trained(points, suites, HERE / "trained.png")


if __name__ == "__main__":
    main()

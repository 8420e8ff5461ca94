"""The figures of the study: drawing only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift.report.style import BLUE, COLOURS, VERMILION, figure, gridded

LEVELS = (
    "low-rank (training subjects)",
    "low-rank (training subjects) + local ridge",
    "bound, training subjects' covariance",
)


def draw_trained(points: dict[str, Any], suites: dict[str, dict[str, Any]], out: Path) -> None:
    """Held-out L1 of the cohort's trainings over CPU time, and every prediction beside low-rank.

    Args:
        points: Name -> line.
        suites: Suite -> prediction -> Difference to low-rank.
        out: PNG.
    """
    rows = max(len(found) for found in suites.values())
    with figure(2.9 + 0.17 * rows, out) as fig:
        upper, lower = fig.subfigures(2, 1, height_ratios=[2.7, 0.2 + 0.17 * rows])
        ax = upper.subplots()
        arms = list(dict.fromkeys(name.split("#")[0] for name in points if name.startswith("cohort/")))
        for name, line in points.items():
            if name.startswith("cohort/"):
                arm, seed = name.split("#")
                place = arms.index(arm)
                label = arm.removeprefix("cohort/") if seed == "0" else None
                style = {"color": COLOURS[place % len(COLOURS)], "lw": 1.2}
                ax.plot([c[0] for c in line["curve"]], [c[2] for c in line["curve"]], "-", label=label, **style)
        for name, style in zip(LEVELS, ("--", "-.", ":")):
            if line := points.get(f"cohort: {name}"):
                ax.axhline(line["l1"], color="0.35", lw=0.9, ls=style, label=name)
        drawn = [line["l1"] for name, line in points.items() if name.removeprefix("cohort: ") in LEVELS]
        drawn += [line["l1"] for name, line in points.items() if name.startswith("cohort/")]
        ax.set_ylim(min(drawn) - 0.003, 0.735)
        ax.set_xlabel("CPU seconds of training (one thread)")
        ax.set_ylabel("held-out L1")
        ax.set_title("held-out synthetic subjects")
        gridded(ax)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6.5)
        titles = {"cohort": "held-out synthetic subjects", "sample": "the demo's clips, ten masks"}
        panels = lower.subplots(1, len(suites), squeeze=False)[0]
        for ax, (suite, found) in zip(panels, suites.items()):
            for place, (name, one) in enumerate(reversed(found.items())):
                colour = VERMILION if "trained" in name else BLUE
                ax.plot([one.low, one.high], [place, place], color=colour, lw=1.5)
                ax.plot(one.mean, place, "o", color=colour, ms=3.5)
            ax.axvline(0, color="0.6", lw=0.8)
            ax.set_yticks(range(len(found)), [name.replace("encoder sees what they leave", "sees the rest")
                                              .replace(" (training subjects)", "").replace(" (own scan)", "")
                                              for name in reversed(found)], fontsize=6.5)  # fmt: skip
            ax.locator_params(axis="x", nbins=4)
            ax.set_xlabel("held-out L1 beside low-rank")
            ax.set_title(titles[suite])


FARTHEST = 1.0
"""Differences above it would make all others one point: they are written in words."""


def draw_factors(rows: list[tuple[str, dict[str, Any]]], out: Path) -> None:
    """Difference of each factor to its base, a panel for each base.

    Args:
        rows: ("factor=value", base -> Difference).
        out: PNG.
    """
    with figure(0.9 + 0.165 * len(rows), out) as fig:
        titles = {"network": "around the network alone", "maps": "around model.maps=20"}
        for ax, (base, title) in zip(fig.subplots(1, 2, sharey=True), titles.items()):
            for place, (_, found) in enumerate(reversed(rows)):
                if (one := found.get(base)) and one.low > FARTHEST:
                    where = {"xy": (1, place), "xycoords": ("axes fraction", "data"), "xytext": (-4, 0)}
                    text = f"+{one.mean:.1f}, far outside →"
                    ax.annotate(text, **where, textcoords="offset points", ha="right", va="center", fontsize=6.5)
                elif one:
                    colour = BLUE if one.high < 0 else VERMILION if one.low > 0 else "0.5"
                    ax.plot([one.low, one.high], [place, place], color=colour, lw=1.5)
                    ax.plot(one.mean, place, "o", color=colour, ms=3.5)
            ax.axvline(0, color="0.6", lw=0.8)
            ax.set_yticks(range(len(rows)), [what.replace("=", " = ", 1) for what, _ in reversed(rows)], fontsize=6.5)
            ax.set_xlabel("held-out L1 beside the base after as many clips")
            ax.set_title(title)
            ax.locator_params(axis="x", nbins=5)
            gridded(ax, "y")

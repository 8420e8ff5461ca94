"""Speed and load of a run over its steps: what perf/* and mon/* in metrics.jsonl say."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from swift.report.runs import Run, load_run
from swift.report.style import COLOURS, figure, gridded
from swift.utils.errors import UserError

# Panels from top to bottom: label of the axis, and its curves as (metric, name, factor).
PANELS: tuple[tuple[str, tuple[tuple[str, str, float], ...]], ...] = (
    ("clips/s", (("perf/clips_per_second", "all ranks", 1.0),)),
    ("TFLOP/s a device", (("perf/tflops", "model FLOPs", 1.0),)),
    (
        "% of time or peak",
        (
            ("perf/mfu", "MFU", 100.0),
            ("perf/data_wait", "waiting for data", 100.0),
            ("mon/device_busy", "device busy", 1.0),
        ),
    ),
    (
        "memory, GiB",
        (
            ("mon/device_peak_gib", "device, peak", 1.0),
            ("mon/device_reserved_gib", "device, reserved", 1.0),
            ("mon/host_rss_gib", "host, with workers", 1.0),
        ),
    ),
    ("a save stalls, ms", (("perf/save_stall_seconds", "training stands still", 1000.0),)),
    ("CPU, % of a core", (("mon/cpu_percent", "rank 0 with workers", 1.0),)),
)


def has_performance(run: Run) -> bool:
    """Whether the run logged its speed."""
    return len(run.series("perf/clips_per_second")[0]) > 0


def performance(run_dir: str | Path, out: str | Path | None) -> Figure:
    """Clips/s, TFLOP/s, MFU, waiting for data, memory and busy time over optimizer steps.

    A panel is left out where the run has none of its curves: an unknown device has no MFU, a CPU no device memory.

    Args:
        run_dir: Run directory.
        out: PNG to write; None: only return the figure.

    Raises:
        UserError: the run directory is missing or damaged, or holds no speed; `out` cannot be written.
    """
    run = load_run(run_dir)
    if not has_performance(run):
        raise UserError(
            f"{run.path}/metrics.jsonl: no perf/clips_per_second in it; the run ended before its first point"
        )
    panels = []
    for label, curves in PANELS:
        found = [(name, *run.series(key), factor) for key, name, factor in curves if len(run.series(key)[0])]
        if found:
            panels.append((label, found))
    with figure(0.6 + 1.45 * len(panels), out) as fig:
        axes = fig.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        fig.suptitle(f"Speed and load: {run.summary.get('model') or run.name}", x=0.01, ha="left", fontsize=9.5)
        for ax, (label, found) in zip(axes, panels, strict=True):
            for (name, steps, values, factor), colour in zip(found, COLOURS, strict=False):
                marker = "o" if len(steps) < 3 else None
                ax.plot(steps, factor * values, color=colour, lw=1.4, marker=marker, ms=3.5, label=name, gid=name)
            ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
            ax.set_ylabel(label)
            gridded(ax, "y")
            ax.legend(loc="upper right", ncols=len(found), borderaxespad=0.1)
        axes[-1].set_xlabel("optimizer step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    return fig

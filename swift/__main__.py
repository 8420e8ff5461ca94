"""`swift-fmri COMMAND ...`: one console command for what `python -m swift.COMMAND ...` does."""

from __future__ import annotations

import runpy
import sys
from difflib import get_close_matches

COMMANDS = {
    "data": "bring NIfTI and BIDS scans into a store; check, repair, split and export it",
    "train": "pre-train a model, or fine-tune one on a task; go on with a run",
    "baselines": "what simple methods reach on a task",
    "report": "figures and tables from run directories",
    "embed": "embeddings of scans from a trained model",
    "attribute": "which voxels a prediction rests on",
    "export": "weights, settings and input contract in one file",
    "plan": "parameters, FLOPs, memory and step time, before a run",
    "runs": "progress, restarts and goodput of runs",
    "health": "whether a node can train",
    "study": "a study of many runs, that stops and goes on",
    "series": "time series of every layer, for temporal fidelity",
    "replay": "run a bad training step again",
}
"""Command -> what it does; the code is the module swift.COMMAND."""


def usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        ["usage: swift-fmri COMMAND ...", "", *lines, "", "swift-fmri COMMAND --help says what a command takes."]
    )


def main() -> None:
    """Run one command, as `python -m` would."""
    given = sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if given else sys.stderr)
        sys.exit(0 if given else 2)
    name = given[0]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"legal are {', '.join(COMMANDS)}"
        print(f"swift-fmri: {name} is no command: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = sys.argv[1:]
    runpy.run_module(f"swift.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

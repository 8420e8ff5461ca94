"""The commands, for the console and for completion."""

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
    "doctor": "what a bug report needs: versions, device, threads, disk, a store",
    "completion": "print a script that completes words in bash, zsh or fish",
}
"""Command -> what it does; the code is the module swift.COMMAND."""

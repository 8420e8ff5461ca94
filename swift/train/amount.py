"""What a run is about to see: said in one line before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np

from swift.config.schema import Config

DEMO_MODEL = "tiny"
DEMO_SCANS = 2
"""The demo's model, and the scans that its defaults were chosen for."""
MUCH = 100
"""So many times the demo's scans are no demo any more."""


def amount(cfg: Config, data: Any, ranks: int) -> tuple[str, str]:
    """What the training part holds and how often the run sees it.

    Args:
        cfg: Settings.
        data: The run's ClipDataModule.
        ranks: Processes that train together.

    Returns:
        A line of subjects, scans, clips, clips an epoch and epochs; and a warning, "" where none is due.
    """
    index = data.train_index
    scans = np.unique(index.scan).tolist()
    subjects = {data.store.scans[scan].subject for scan in scans}
    step = cfg.data.batch_size * cfg.trainer.accumulate * ranks
    seen = cfg.trainer.max_steps * step
    epochs = seen / len(index)
    line = (
        f"training on {len(subjects):,} subjects, {len(scans):,} scans, {len(index):,} clips (an epoch); "
        f"{cfg.trainer.max_steps:,} steps of {step} clips are {epochs:.3g} epochs"
    )
    if len(scans) < MUCH * DEMO_SCANS or (cfg.model.name != DEMO_MODEL and epochs >= 1):
        return line, ""
    small = f"model={DEMO_MODEL} is the demo's" if cfg.model.name == DEMO_MODEL else ""
    few = f"trainer.max_steps={cfg.trainer.max_steps} shows it {100 * epochs:.3g} % of the clips" if epochs < 1 else ""
    why = " and ".join(text for text in (small, few) if text)
    whole = -(-len(index) // step)
    return (
        line,
        f"a store of {len(scans):,} scans, but {why}: an epoch is trainer.max_steps={whole}, sizes: swift-fmri plan",
    )

"""What the server of tests.distributed.ranks does once before it forks, so that no rank does it again.

Imports that Lightning, DeepSpeed and Hydra put off until a run begins, Hydra's search for plug-ins, and the settings
of the strategies (tests.small keeps what it has composed).
"""

from __future__ import annotations

import contextlib
import importlib

from tests.small import settings

MODULES = [
    "torch",
    "torch.utils.tensorboard",
    "torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook",
    "lightning.pytorch",
    "setuptools",
    "distutils.ccompiler",
    "deepspeed",
    # What DeepSpeed imports when it is set up: it loads the whole compiler of torch.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "tests.distributed.jobs",
    "tests.distributed.tasks",
]

for _module in MODULES:
    with contextlib.suppress(ImportError):  # of another version: ranks then import what they need
        importlib.import_module(_module)
for _name in ("single", "ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"):
    settings(f"parallel={_name}")

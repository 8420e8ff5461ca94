"""Scripts of experiments/ that are no modules, loaded from their files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(script: str) -> ModuleType:
    """The module of a file under experiments/, as in `mu_transfer/valleys.py`."""
    file = Path(__file__).parents[1] / "experiments" / script
    spec = importlib.util.spec_from_file_location(f"experiments_{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module

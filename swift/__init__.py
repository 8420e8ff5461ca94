"""swift: pre-train, scale and fine-tune 4D Swin transformers on functional MRI."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from swift.inference.embedding import Embedder
    from swift.inference.pretrained import load_model

__all__ = ["Embedder", "load_model"]


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while a command still imports what it needs: one line; Python then ends with the signal's status."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Threads of torch that wait for others soon sleep, unless the user says how they wait.

    GNU OpenMP, which comes with torch for Linux, else lets them spin for milliseconds: where another job takes a core,
    two threads then need more than twice the CPU time and twice the wall time of the work. About 50 microseconds of
    spinning bridge the gap between two operations. It reads this once, when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")


# As a command only (python -m calls itself "-m" for now), never for who imports swift.
if sys.argv and (sys.argv[0] == "-m" or sys.argv[0].endswith("swift-fmri")):
    sys.excepthook = _quiet_interrupt
    _wait_briefly(os.environ)


def __getattr__(name: str) -> Any:
    """`swift.Embedder` is imported when it is asked for, so that `import swift` stays cheap."""
    if name == "Embedder":
        from swift.inference.embedding import Embedder

        return Embedder
    if name == "load_model":
        from swift.inference.pretrained import load_model

        return load_model
    raise AttributeError(f"module 'swift' has no attribute {name!r}")

"""swift: pre-train, scale and fine-tune 4D Swin transformers on functional MRI."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift.inference.embedding import Embedder
    from swift.inference.pretrained import load_model

__all__ = ["Embedder", "load_model"]


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while a command still imports what it needs: one line; Python then ends with the signal's status."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# As a command only (python -m calls itself "-m" for now), never for who imports swift.
if sys.argv and (sys.argv[0] == "-m" or sys.argv[0].endswith("swift-fmri")):
    sys.excepthook = _quiet_interrupt


def __getattr__(name: str) -> Any:
    """`swift.Embedder` is imported when it is asked for, so that `import swift` stays cheap."""
    if name == "Embedder":
        from swift.inference.embedding import Embedder

        return Embedder
    if name == "load_model":
        from swift.inference.pretrained import load_model

        return load_model
    raise AttributeError(f"module 'swift' has no attribute {name!r}")

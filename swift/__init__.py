"""swift: pre-train, scale and fine-tune 4D Swin transformers on functional MRI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift.inference.embedding import Embedder

__all__ = ["Embedder"]


def __getattr__(name: str) -> Any:
    """`swift.Embedder` is imported when it is asked for, so that `import swift` stays cheap."""
    if name == "Embedder":
        from swift.inference.embedding import Embedder

        return Embedder
    raise AttributeError(f"module 'swift' has no attribute {name!r}")

"""SwiFT V2 for Brainmarks: a plug-in that its registry finds, see docs/brainmarks.md. Never imported by swift."""

from __future__ import annotations

from typing import Any

from brainmarks.models.base import Embeddings
from brainmarks.models.registry import register_model

from swift.inference.brainmarks_model import BrainmarksModel, SampleReader, reader_of


class SwiftV2(BrainmarksModel):
    """A trained encoder, whose embeddings have Brainmarks' type."""

    def forward(self, batch: dict[str, Any]) -> Embeddings:
        """Embeddings: cls (B, 1, E), no registers, patch (B, L, E)."""
        return Embeddings(*super().forward(batch))


@register_model
def swift_v2(**kwargs: Any) -> tuple[SampleReader, SwiftV2]:
    """A model of swift, named by `model_kwargs.model`; see `swift.inference.brainmarks_model.reader_of`."""
    reader, clips = reader_of(**kwargs)
    return reader, SwiftV2(reader, clips)

"""Any swift store of MNI volumes for Brainmarks' volume models, see docs/brainmarks.md. Never imported by swift."""

from __future__ import annotations

from functools import partial
from typing import Any

from brainmarks.datasets.registry import register_dataset

from swift.inference.brainmarks_model import template_mask
from swift.inference.brainmarks_rows import Space, StoreRows, store_rows
from swift.utils.errors import UserError

SPACES = ("mni", "mni_cortex", "schaefer400_tians3_buckner7")
"""Spaces that are made of volumes; the others are of surfaces."""


def space_of(name: str, mask: str | None) -> Space:
    """What is taken of a volume.

    Raises:
        UserError: a space of surfaces.
    """
    if name == "mni":
        return Space(template_mask(mask).T)
    if name not in SPACES:
        raise UserError(f"space {name} is not made of volumes: a store serves {', '.join(SPACES)} (docs/brainmarks.md)")
    if mask is not None:
        raise UserError(f"mask={mask}: of space mni only; {name} has its own")
    from brainmarks import nisc

    if name == "mni_cortex":
        return Space(nisc.read_mni152_2mm_data(nisc.fetch_schaefer(400, space="mni"), interpolation="nearest") > 0)
    parcels = nisc.parcel_average_schaefer400_tians3_buckner7()
    mean = partial(nisc.parcellate_timeseries, parc_one_hot=parcels.parc_one_hot, eps=parcels.eps)
    return Space(parcels.mask, mean)


@register_dataset
def swift_store(space: str, mask: str | None = None, **kwargs: Any) -> dict[str, StoreRows]:
    """train, validation and test of a store; see `swift.inference.brainmarks_rows.store_rows`.

    Args:
        space: Of the model.
        mask: The template's brain mask; None: TemplateFlow's.
        kwargs: store, task, split, ...
    """
    return store_rows(space_of(space, mask), **kwargs)

"""Where the grid of a store lies in the world: one fixed box for each known template, or around each scan's own brain.

This file is the one place that knows templates. All MNI spaces share one box: their brains differ by a millimetre or
two, which is less than a voxel, and stores of both can be mixed. A template is added with the middle of the bounding
box of its brain mask, in mm of its own world, and the source of that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OWN = "own mask"
"""Placement of a store whose scans are each centred on their own brain mask: they are not in one space."""


@dataclass(frozen=True)
class Template:
    """A box that scans of several spaces share."""

    name: str
    spaces: tuple[str, ...]
    """Names of the BIDS entity space-; `MNI`: one of them, which one is not said."""
    centre: tuple[float, float, float]
    """Middle of the box, world mm (RAS+)."""
    source: str


TEMPLATES = (
    Template(
        "MNI152",
        (
            "MNI",
            "MNI152Lin",
            *(f"MNI152NLin2009{letter}{kind}" for letter in "abc" for kind in ("Sym", "Asym")),
            "MNI152NLin6Sym",
            "MNI152NLin6Asym",
            "MNI305",
            "MNIColin27",
            "IXI549Space",
        ),
        (0.0, -17.0, 5.0),
        "bounding box of the brain mask of ICBM 152 2009a nonlinear (Fonov et al. 2009) as nilearn 0.14 ships it: "
        "x -72 to 72, y -107 to 73, z -72 to 82 mm; names: BIDS specification 1.10, standard template identifiers",
    ),
)
V1 = "SwiFT v1"
"""Placement that SwiFT v1's weights know: another box in MNI space. No store has it; clips are shifted to it."""
V1_CENTRE = (1.0, -17.0, 17.0)
MNI = TEMPLATES[0].name
NATIVE = ("T1w", "T2w", "anat", "bold", "boldref", "epi", "func", "individual", "orig", "native", "scanner", "ACPC")
"""Names of spaces that are a subject's own."""
MNI_CODE = 4
"""NIfTI code of an affine into MNI 152 space."""


def template_of(space: str) -> Template | None:
    """The template whose box scans of a space get; None: no template that is known here."""
    wanted = space.casefold()
    for template in TEMPLATES:
        if wanted in (name.casefold() for name in template.spaces):
            return template
    return None


def placement_of(space: str) -> str:
    """What a store of scans of this space says: the name of a box, or OWN."""
    template = template_of(space)
    return template.name if template else OWN


def known_spaces() -> str:
    """All names that `--space` knows, for messages."""
    return ", ".join([*(name for template in TEMPLATES for name in template.spaces), *NATIVE])


def is_known(space: str) -> bool:
    """A template of this file, or a name for a subject's own space."""
    return template_of(space) is not None or space.casefold() in (name.casefold() for name in NATIVE)


def box_affine(placement: str, grid: Sequence[int], spacing: float) -> np.ndarray:
    """(4, 4) voxel to world mm of a template's box.

    Voxel centres lie at whole multiples of the spacing from the world's origin, whatever the scan's own grid: as in
    FSL's and HCP's MNI images. The box is as close to the template's middle as that allows.

    Args:
        placement: Name of a template of TEMPLATES.
        grid: Voxels x, y, z.
        spacing: mm.
    """
    (template,) = (one for one in TEMPLATES if one.name == placement)
    first = (np.asarray(template.centre) - (np.asarray(grid) - 1) / 2 * spacing) / spacing
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = np.floor(np.round(first, 6) + 0.5) * spacing
    return affine


def v1_box(grid: Sequence[int], spacing: float = 2.0) -> np.ndarray:
    """(3,) world mm of the first voxel (left, back, below) of the box that SwiFT v1 keeps of an MNI image.

    Of 91x109x91 voxels of 2 mm it keeps 96x96x96 (pads by 3 and 2, cuts 7 and 6, pads by 3 and 2); boxes of other sizes
    lie around the same middle.
    """
    first = (np.asarray(V1_CENTRE) - (np.asarray(grid) - 1) / 2 * spacing) / spacing
    return np.asarray(np.floor(first + 0.5) * spacing)


def placement_text(placement: str, version: int = 2) -> str:
    """One line for people."""
    if placement == OWN:
        early = " (format version 1: whatever their space is)" if version == 1 else ""
        return f"own mask: every scan is centred on its own brain{early}; voxels of two scans are not the same place"
    centre = ", ".join(f"{value:g}" for one in TEMPLATES if one.name == placement for value in one.centre)
    return f"{placement}: one fixed box for all scans" + (f" around {centre} mm" if centre else "")

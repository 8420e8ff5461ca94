"""Options that the commands here have in common; nothing heavy is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swift.inference.fit_scan import Fitting


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which weights, and how scans are brought to what they were trained on."""
    parser.add_argument("--which", default="latest", help="of a run: latest (default), best, or a checkpoint's name")
    parser.add_argument("--config", type=Path, metavar="RUN", help="settings for a SwiFT v1 file, which has none")
    add_scan_options(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ..., xpu")


def add_scan_options(parser: argparse.ArgumentParser) -> None:
    """How scans are brought to what a model was trained on."""
    parser.add_argument(
        "--mask", type=Path, metavar="NIFTI", help="brain mask of NIfTI scans (else: the one beside, or computed)"
    )
    parser.add_argument("--tr", type=float, metavar="S", help="TR in seconds, where files do not say")
    parser.add_argument(
        "--other-tr",
        choices=("refuse", "resample", "keep"),
        default="refuse",
        help="scans of another TR than the model was trained on (default: refuse)",
    )
    parser.add_argument("--any-size", action="store_true", help="take brains below 0.05 or above 5 litres: it is meant")
    parser.add_argument("--cropped", action="store_true", help="take brains of which more than 10 %% are cut off")


def fitting_of(options: argparse.Namespace) -> Fitting:
    """What `add_scan_options` was given."""
    from swift.inference.fit_scan import Fitting

    return Fitting(options.tr, options.other_tr, options.mask, options.any_size, options.cropped)

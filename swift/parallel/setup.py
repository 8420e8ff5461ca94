"""What the settings of a run come to on this machine: worked out once, handed to everything that is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swift.config.schema import Config
from swift.parallel.ranks import Place, current_place
from swift.plan.geometry import Geometry, build_geometry
from swift.utils.errors import UserError


@dataclass(frozen=True)
class Setup:
    """The settings of a run and what follows from them here.

    Attributes:
        cfg: The settings.
        place: This process among the ranks of the run.
        accelerator: Lightning's name of the device: cpu or gpu.
        precision: Lightning's name of the precision: 32-true or bf16-mixed.
        geometry: Sizes of the model that is trained.
    """

    cfg: Config
    place: Place
    accelerator: str
    precision: str
    geometry: Geometry

    @property
    def narrow(self) -> bool:
        """Whether products are computed in bf16."""
        return self.precision == "bf16-mixed"


def resolve(cfg: Config) -> Setup:
    """Work out device, precision and sizes.

    Raises:
        UserError: a device or a precision that is not here, or an architecture that does not fit the grid.
    """
    accelerator = accelerator_of(cfg)
    geometry = build_geometry(cfg.model, (*cfg.data.grid, cfg.data.frames))
    return Setup(cfg, current_place(), accelerator, _precision(cfg, accelerator), geometry)


def accelerator_of(cfg: Config) -> str:
    """Lightning's name of the device: cpu or gpu.

    Raises:
        UserError: a GPU is asked for and none is there.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu: torch sees no GPU here; use cpu or auto")
    if cfg.trainer.accelerator == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return cfg.trainer.accelerator


def _precision(cfg: Config, accelerator: str) -> str:
    """Lightning's name of the precision; auto is bf16 where a GPU has it in hardware, else float32.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    wanted = cfg.trainer.precision
    has_bf16 = accelerator == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and accelerator == "gpu" and not has_bf16:
        raise UserError("trainer.precision=bf16: this GPU has no bf16; use 32")
    return "bf16-mixed" if wanted == "bf16" or (wanted == "auto" and has_bf16) else "32-true"

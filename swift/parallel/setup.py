"""What the settings of a run come to on this machine: worked out once, handed to everything that is built."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swift.config.schema import Config, TrainerConfig
from swift.parallel.ranks import Place, current_place
from swift.plan.geometry import Geometry, geometry_of
from swift.utils import device
from swift.utils.errors import UserError


@dataclass(frozen=True)
class Setup:
    """The settings of a run and what follows from them here.

    Attributes:
        cfg: The settings; trainer.log_every is a number.
        place: This process among the ranks of the run.
        accelerator: Kind of the device of every rank: cpu, cuda or xpu.
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

    @property
    def log_every(self) -> int:
        """Optimizer steps between logged points."""
        every = self.cfg.trainer.log_every
        assert every is not None
        return every


def resolve(cfg: Config) -> Setup:
    """Work out device, precision and sizes.

    Raises:
        UserError: a device or a precision that is not here, or an architecture that does not fit the grid.
    """
    accelerator = accelerator_of(cfg)
    geometry = geometry_of(cfg)
    cfg = replace(cfg, trainer=replace(cfg.trainer, log_every=_log_every(cfg.trainer, accelerator)))
    return Setup(cfg, current_place(), accelerator, _precision(cfg, accelerator), geometry)


def _log_every(trainer: TrainerConfig, accelerator: str) -> int:
    """Optimizer steps between logged points: what is asked for, else what a device can stand.

    On a GPU the host works ahead, and reading a number makes it wait for all the work it has queued.
    """
    if trainer.log_every is not None:
        return trainer.log_every
    return 2 if accelerator == "cpu" else max(1, min(50, trainer.max_steps // 20))


def accelerator_of(cfg: Config) -> str:
    """Kind of the device of a run here: cpu, cuda or xpu.

    Raises:
        UserError: the settings name one that is not here; a job has frozen the one of its machine.
    """
    return device.require(cfg.trainer.accelerator, "trainer.accelerator")


def _precision(cfg: Config, accelerator: str) -> str:
    """Lightning's name of the precision; auto is bf16 where a GPU has it in hardware, else float32.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    wanted = cfg.trainer.precision
    has_bf16 = device.has_bf16(accelerator)
    if wanted == "bf16" and accelerator != "cpu" and not has_bf16:
        raise UserError("trainer.precision=bf16: this GPU has no bf16; use 32")
    return "bf16-mixed" if wanted == "bf16" or (wanted == "auto" and has_bf16) else "32-true"

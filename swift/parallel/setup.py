"""What the settings of a run come to on this machine: worked out once, handed to everything that is built."""

from __future__ import annotations

from dataclasses import dataclass, replace

from swift.config.check import cannot_compile
from swift.config.derive import log_every
from swift.config.schema import Config
from swift.parallel.ranks import Place, current_place
from swift.plan.geometry import Geometry, geometry_of
from swift.utils import device
from swift.utils.errors import UserError


@dataclass(frozen=True)
class Setup:
    """The settings of a run and what follows from them here.

    Attributes:
        cfg: The settings; trainer.log_every is a number, parallel.compile is true or false.
        place: This process among the ranks of the run.
        accelerator: Kind of the device of every rank: cpu, cuda or xpu.
        precision: Lightning's name of the precision: 32-true or bf16-mixed.
        geometry: Sizes of the model that is trained.
        why: A line on compiling its blocks, where that is not plain from the settings; else empty.
    """

    cfg: Config
    place: Place
    accelerator: str
    precision: str
    geometry: Geometry
    why: str = ""

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
        UserError: a device, a precision or a compiler that is not here, or an architecture that does not fit the grid.
    """
    accelerator = accelerator_of(cfg)
    geometry = geometry_of(cfg)
    compiled, why = _compile(cfg, accelerator)
    trainer = replace(cfg.trainer, log_every=log_every(cfg.trainer, accelerator == "cpu"))
    cfg = replace(cfg, trainer=trainer, parallel=replace(cfg.parallel, compile=compiled))
    return Setup(cfg, current_place(), accelerator, _precision(cfg, accelerator), geometry, why)


COMPILED = ("single", "ddp", "zero1", "fsdp")
"""Strategies whose blocks were taken up as one graph here, and compile by default."""


def _compile(cfg: Config, accelerator: str) -> tuple[bool, str]:
    """Whether blocks are compiled, and a line that says so where the settings leave it open on a GPU.

    A CPU gains little by it and would wait for a C++ compiler in every first step.

    Raises:
        UserError: asked for where there is no compiler.
    """
    wanted = cfg.parallel.compile
    if wanted:
        if lacks := device.lacks_for_compile(accelerator):
            raise UserError(f"parallel.compile=true: torch.compile needs {lacks}, or use false")
        return True, ""
    if wanted is not None or accelerator == "cpu":
        return False, ""
    if not (device.software() or "").startswith("CUDA"):
        return False, "parallel.compile=false: never tried on a GPU that is not NVIDIA's; true asks for it"
    if cfg.model.tokens == "brain" and cfg.data.brain == "cohort":
        return False, "parallel.compile=false: blocks on a cohort's tokens are compiled only when asked for (true)"
    if found := cannot_compile(cfg):
        name, value, reason = found
        named = "" if name == "parallel.compile" else f"{name}={value}: "
        return False, f"parallel.compile=false: {named}{reason}"
    if cfg.parallel.name not in COMPILED:
        return False, f"parallel.compile=false: never tried with parallel={cfg.parallel.name}; true asks for it"
    if lacks := device.lacks_for_compile(accelerator):
        return False, f"parallel.compile=false: torch.compile needs {lacks}; training goes on without, slower"
    return True, "parallel.compile=true, NVIDIA's GPUs have that by default: the first steps take up to a minute longer"


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

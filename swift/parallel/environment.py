"""Where ranks run, in Lightning's words: who started them, and which device each takes."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from swift.config.schema import ParallelConfig
from swift.parallel.ranks import Place, free_port
from swift.utils import device as layer
from swift.utils.errors import UserError


class Ranks(ClusterEnvironment):
    """The ranks of a `Place`, for Lightning; they exist already."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        address, port = _meeting_point(place)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", port)

    @property
    def creates_processes_externally(self) -> bool:
        """Whether something else starts the ranks: always."""
        return True

    @property
    def main_address(self) -> str:
        """Host of rank 0."""
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        """Port of rank 0."""
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        """Never chosen by Lightning itself."""
        return False

    def world_size(self) -> int:
        """Ranks of the run."""
        return self.place.world

    def set_world_size(self, size: int) -> None:
        """Only checked: the launcher has decided."""
        assert size == self.place.world, (size, self.place)

    def global_rank(self) -> int:
        """Of all ranks."""
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has decided. Lightning counts node by node, which a launcher need not (srun -m cyclic)."""
        rank = self.place.rank
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    def local_rank(self) -> int:
        """Of the ranks of this node."""
        return self.place.local_rank

    def node_rank(self) -> int:
        """The node of this rank."""
        return self.place.rank // self.place.local_world


def _meeting_point(place: Place) -> tuple[str, str]:
    """Address and port where ranks meet that their launcher has told none; the same for all of them."""
    if place.source != "slurm" or place.world == 1:
        return "127.0.0.1", str(free_port())
    # Other steps of a job, and other jobs on a shared node, meet elsewhere.
    port = 10240 + (int(os.environ.get("SLURM_JOB_ID", 0)) * 16 + int(os.environ["SLURM_STEP_ID"])) % 20000
    if place.nodes == 1:
        return "127.0.0.1", str(port)
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    return SLURMEnvironment.resolve_root_node_address(nodes), str(port)


class Gpus(Accelerator):
    """The GPUs that torch sees, of any kind: those of the ranks of this node in order, or one that is each rank's own.

    A launcher may show each rank its own device only (srun --gpus-per-task=1): all of them are then number 0. Lightning
    expects every rank to see the devices of all ranks of its node and refuses this (its issue 16828); and it knows no
    xpu.
    """

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """The number of ranks on this node, unchecked: this rank may not see the other devices."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The device of every rank of this node.

        Raises:
            UserError: there are several, but fewer than ranks.
        """
        return [layer.of_local_rank("gpu", "trainer.accelerator", rank) for rank in range(int(devices))]

    @staticmethod
    def auto_device_count() -> int:
        """All that are seen."""
        return layer.count()

    @staticmethod
    def is_available() -> bool:
        """Whether there is any."""
        return layer.count() > 0

    @staticmethod
    def name() -> str:
        """The kind."""
        return layer.kind_here()

    def setup_device(self, device: torch.device) -> None:
        """Make this rank's device the one it uses where none is named."""
        layer.set_current(device)

    def teardown(self) -> None:
        """Give unused memory back."""
        layer.free_cache()


class CudaGpus(Gpus, CUDAAccelerator):
    """The same for cuda: Lightning asks by type whether the GPUs that it sees are used."""


def build_accelerator(kind: str, place: Place) -> Accelerator:
    """What Lightning shall know of the device of a rank.

    Args:
        kind: cpu | cuda | xpu.
        place: This rank.

    Raises:
        UserError: more ranks on this node than devices, where it sees several.
    """
    if kind == "cpu":
        return CPUAccelerator()
    Gpus.get_parallel_devices(place.local_world)
    return CudaGpus() if kind == "cuda" else Gpus()


def check_place(cfg: ParallelConfig, place: Place) -> None:
    """Refuse ranks that a run cannot have, or another number of ranks or nodes than the settings say.

    Raises:
        UserError: with both numbers, or with what is missing.
    """
    if place.problem:
        raise UserError(place.problem)
    if place.source == "none":
        return
    if cfg.name == "single" and place.world > 1:
        raise UserError(f"parallel=single: {place.source} started {place.world} ranks; choose parallel=ddp or another")
    if cfg.devices and cfg.devices != place.local_world:
        raise UserError(
            f"parallel.devices={cfg.devices}: {place.source} started {place.local_world} ranks on a node; "
            "start as many, or parallel.devices=0 for as many as there are"
        )
    if cfg.nodes != place.nodes and not (cfg.nodes == 1 and cfg.devices == 0):
        raise UserError(f"parallel.nodes={cfg.nodes}: {place.source} started ranks on {place.nodes} nodes")

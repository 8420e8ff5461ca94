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
from swift.utils.errors import UserError


class Ranks(ClusterEnvironment):
    """The ranks of a `Place`, for Lightning; they exist already."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))

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
        """Only checked: the launcher has decided."""
        assert rank == self.place.rank, (rank, self.place)
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    def local_rank(self) -> int:
        """Of the ranks of this node."""
        return self.place.local_rank

    def node_rank(self) -> int:
        """The node of this rank."""
        return self.place.rank // self.place.local_world


class OneGpuEach(CUDAAccelerator):
    """CUDA where a launcher shows each rank one device only (srun --gpus-per-task=1): all of them are cuda:0.

    Lightning expects every rank to see the devices of all ranks of its node and refuses this (its issue 16828).
    """

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        """The number of ranks on this node, unchecked: this rank cannot see the other devices."""
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The one visible device for every rank of this node."""
        return [torch.device("cuda", 0)] * int(devices)


def build_environment(place: Place) -> ClusterEnvironment:
    """What tells Lightning of the ranks."""
    return SLURMEnvironment(auto_requeue=False) if place.source == "slurm" else Ranks(place)


def build_accelerator(name: str, place: Place) -> Accelerator:
    """The device of this rank, by the name of its kind: cpu | gpu."""
    if name == "cpu":
        return CPUAccelerator()
    return OneGpuEach() if torch.cuda.device_count() == 1 < place.local_world else CUDAAccelerator()


def check_place(cfg: ParallelConfig, place: Place) -> None:
    """Refuse a launcher that has started another number of ranks or nodes than the settings say.

    Raises:
        UserError: with both numbers.
    """
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

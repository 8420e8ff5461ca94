"""What each `parallel=` becomes, who is refused, and where a process stands among the ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from swift.config.schema import Config
from swift.parallel.environment import Ranks, check_place
from swift.parallel.ranks import LAUNCH, SETTINGS, Place, current_place, first_to_report
from swift.parallel.setup import resolve
from swift.parallel.strategies import cpu_adam, deepspeed_config
from swift.plan.geometry import build_geometry
from swift.plan.memory import reduce_bucket
from swift.train.wiring import build_module
from swift.utils import device
from swift.utils.errors import UserError
from tests.small import settings

ALONE = Place(0, 0, 1, 1, "none")
SLURM = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}
SHELL = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40733"}
MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "MPI_LOCALRANKID": "1", "PMI_SIZE": "8", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("env", "place", "nodes"),
    [
        ({}, ALONE, 1),
        (SLURM, Place(11, 3, 16, 8, "slurm"), 2),
        # srun inside salloc keeps the name of the shell's job.
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, Place(11, 3, 16, 8, "slurm"), 2),
        # A shell inside an allocation is no rank, nor is a batch script.
        (SHELL, ALONE, 1),
        (SLURM | {"SLURM_STEP_ID": "4294967290"}, ALONE, 1),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, ALONE, 1),
        (TORCHRUN, Place(5, 1, 8, 4, "torchrun"), 2),
        # torchrun inside a job of one task a node.
        (SLURM | TORCHRUN, Place(5, 1, 8, 4, "torchrun"), 2),
        (TORCHRUN | {SETTINGS: "file"}, Place(5, 1, 8, 4, "swift"), 2),
        # A second rank has no shell: it was started by srun from inside one.
        (SHELL | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, Place(1, 1, 2, 2, "slurm"), 1),
        # An allocation of three tasks, a step of two on one of its nodes.
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"},
            Place(11, 3, 2, 2, "slurm"),
            1,
        ),
        (OPENMPI | MEETING, Place(5, 1, 8, 4, "openmpi"), 2),
        # mpirun on several nodes of a job: what it started by srun was one process a node.
        (OPENMPI | MEETING | SLURM, Place(5, 1, 8, 4, "openmpi"), 2),
        (MPICH | MEETING, Place(5, 1, 8, 4, "mpich"), 2),
        (MPICH | {"PMI_SIZE": "1", "PMI_RANK": "0"}, ALONE, 1),
        # srun --mpi=pmi2 numbers ranks too, but Slurm knows more.
        (SLURM | {"PMI_RANK": "11", "PMI_SIZE": "16"}, Place(11, 3, 16, 8, "slurm"), 2),
        # PyTorchJob: a process a pod, nothing said of the node.
        (MEETING | {"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 0, 2, 1, "environment"), 2),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "1"}, ALONE, 1),
        (
            MEETING | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Place(5, 1, 8, 4, "environment"),
            2,
        ),
    ],
)
def test_place_is_read_from_the_launcher(env: dict[str, str], place: Place, nodes: int) -> None:
    assert current_place(env) == place
    assert place.nodes == nodes


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (OPENMPI, "openmpi started 8 ranks, but MASTER_ADDR and MASTER_PORT are not set"),
        (MPICH, "mpich started 8 ranks, but MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "environment started 2 ranks, but MASTER_ADDR"),
        (MEETING | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "LOCAL_WORLD_SIZE is missing"),
        (
            MEETING | {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            "WORLD_SIZE=3: is no multiple of LOCAL_WORLD_SIZE=2",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "a launcher that speaks PMI started 2 ranks"),
        ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "6"}, "jsrun started 6 ranks"),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "3,1"},
            "srun started 4 ranks on 2 nodes, not as many on each",
        ),
        (SLURM | {"SLURM_NTASKS": "15"}, "srun started 15 ranks on 2 nodes, not as many on each"),
    ],
)
def test_ranks_that_cannot_be_placed_are_refused_by_name(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_place(settings("parallel=ddp").parallel, current_place(env))


def test_a_shell_has_a_terminal_and_the_ranks_it_starts_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun leaves SLURM_PTY_PORT of the shell in the environment of the ranks that are started from there."""
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("swift.parallel.ranks._has_terminal", lambda: False)
    assert current_place() == Place(0, 0, 2, 2, "slurm")
    monkeypatch.setattr("swift.parallel.ranks._has_terminal", lambda: True)
    assert current_place() == ALONE


def test_ranks_of_a_job_meet_at_its_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_JOB_ID": "30", "SLURM_STEP_ID": "2", "SLURM_JOB_NODELIST": "a[07-08,12]"}
    for place, address in ((Place(3, 1, 4, 2, "slurm"), "a07"), (Place(1, 1, 2, 2, "slurm"), "127.0.0.1")):
        for name in MEETING:
            # Left to be restored: Ranks sets them itself.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in step.items():
            monkeypatch.setenv(name, value)
        ranks = Ranks(place)
        assert (ranks.main_address, ranks.main_port) == (address, 10240 + 30 * 16 + 2)


@pytest.mark.parametrize(
    ("overrides", "place", "says"),
    [
        (["parallel=single"], Place(0, 0, 2, 2, "slurm"), "parallel=single: slurm started 2 ranks"),
        (["parallel=ddp", "parallel.devices=4"], Place(0, 0, 2, 2, "torchrun"), "torchrun started 2 ranks on a node"),
        (["parallel=ddp", "parallel.nodes=3"], Place(0, 0, 4, 2, "slurm"), "slurm started ranks on 2 nodes"),
        (["parallel=ddp", "parallel.devices=2"], Place(0, 0, 4, 2, "slurm"), "parallel.nodes=1: slurm started"),
    ],
)
def test_a_launcher_that_contradicts_the_settings_is_refused(overrides: list[str], place: Place, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_place(settings(*overrides).parallel, place)


def test_a_launcher_that_agrees_is_not() -> None:
    check_place(settings("parallel=zero1").parallel, Place(3, 1, 4, 2, "slurm"))
    check_place(settings("parallel=zero1", "parallel.devices=2", "parallel.nodes=2").parallel, Place(3, 1, 4, 2, "x"))


def test_one_rank_speaks_for_all_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = TORCHRUN | {LAUNCH: "launch-1"}
    assert [first_to_report(env | {"RANK": str(rank)}) for rank in range(3)] == [True, False, False]
    assert first_to_report(env | {LAUNCH: "launch-2"})
    assert first_to_report({})
    assert first_to_report({})


def test_ranks_are_what_the_launcher_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 0)
    ranks = Ranks(Place(5, 1, 8, 4, "torchrun"))
    assert (ranks.world_size(), ranks.global_rank(), ranks.local_rank(), ranks.node_rank()) == (8, 5, 1, 1)
    assert ranks.creates_processes_externally
    # Counted node by node this would be another: the launcher has decided.
    ranks.set_global_rank(3)
    assert ranks.global_rank() == 5
    with pytest.raises(AssertionError):
        ranks.set_world_size(4)


def zero(*overrides: str) -> dict[str, Any]:
    cfg = settings(*overrides)
    bucket = reduce_bucket(cfg, 300_000_000, bf16=True)
    found: dict[str, Any] = deepspeed_config(cfg.parallel, bucket, element_bytes=2)["zero_optimization"]
    return found


def test_deepspeed_is_told_what_the_settings_say() -> None:
    one = zero(
        "parallel=zero1", "parallel.reduce_bucket_mb=10", "parallel.gather_bucket_mb=4", "parallel.overlap=false"
    )
    # Megabytes become elements of two bytes.
    assert (one["stage"], one["reduce_bucket_size"], one["allgather_bucket_size"]) == (1, 5_000_000, 2_000_000)
    assert one["overlap_comm"] is False
    assert "offload_optimizer" not in one
    assert zero("parallel=zero2")["stage"] == 2
    three = zero("parallel=zero3_offload", "parallel.gather_bucket_mb=4")
    assert (three["stage"], three["stage3_prefetch_bucket_size"]) == (3, 2_000_000)
    assert three["offload_optimizer"]["device"] == three["offload_param"]["device"] == "cpu"
    slower = deepspeed_config(settings("parallel=zero3_offload", "parallel.cpu_adam=false").parallel, 1e6, 4)
    assert slower["zero_force_ds_cpu_optimizer"] is False


def test_a_bucket_left_open_holds_the_largest_gradient_where_that_saves_memory() -> None:
    """Under ZeRO 1 without accumulation; 100 MB, 50 million elements of two bytes, elsewhere and for small models."""
    assert zero("parallel=zero1")["reduce_bucket_size"] == 300_000_000
    assert zero("parallel=zero1", "trainer.accumulate=2")["reduce_bucket_size"] == 50_000_000
    assert zero("parallel=zero2")["reduce_bucket_size"] == zero("parallel=zero3")["reduce_bucket_size"] == 50_000_000
    assert reduce_bucket(settings("parallel=zero1"), 1000, bf16=False) == 1e8


@cache
def plain() -> Config:
    """Settings of a small run."""
    return settings()


@pytest.mark.parametrize(
    ("kind", "tools", "needs"),
    [
        ("cpu", [], "a C++ compiler on a CPU; install g++, or use false"),
        ("cpu", ["gcc"], "a C++ compiler on a CPU; install g++, or use false"),
        ("cpu", ["g++"], "Python's headers; install python3-dev, or use false"),
        ("gpu", ["gcc"], "Triton on a GPU, and none that knows this one is installed; install triton, or use false"),
        ("gpu", ["triton", "g++"], "a C compiler on a GPU; install gcc, or use false"),
        ("gpu", ["triton", "gcc"], "Python's headers; install python3-dev, or use false"),
        ("gpu", ["triton", "gcc", "Python.h"], None),
        ("cpu", ["clang++", "Python.h"], None),
    ],
)
def test_compiling_without_a_compiler_is_one_line(
    kind: str, tools: list[str], needs: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "kind_here", lambda: "xpu")
    monkeypatch.setattr(device, "has_bf16", lambda kind: True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: "triton" in tools)
    for name in tools:
        (tmp_path / name).touch(mode=0o755)
    for name, value in {"PATH": str(tmp_path), "CC": "", "CXX": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    cfg = plain()
    cfg = replace(cfg, trainer=replace(cfg.trainer, accelerator=kind))
    asked = replace(cfg, parallel=replace(cfg.parallel, compile=True))
    if needs is None:
        assert resolve(asked).cfg.parallel.compile is True
    else:
        with pytest.raises(UserError) as caught:
            resolve(asked)
        assert str(caught.value) == f"parallel.compile=true: torch.compile needs {needs}"
    # Left open, a run goes on without: a CPU in any case, a GPU with a line that says so.
    setup = resolve(cfg)
    assert setup.cfg.parallel.compile is (kind == "gpu" and needs is None)
    if kind == "cpu":
        assert setup.why == ""
    else:
        assert setup.why.startswith(f"parallel.compile={str(needs is None).lower()}")


@pytest.mark.parametrize(
    ("section", "given", "why"),
    [
        ("model", {"tokens": "brain"}, "parallel.compile=false: brains differ in their tokens"),
        (
            "data",
            {"brain": "cohort"},
            "parallel.compile=false: blocks on a cohort's tokens are compiled only when asked",
        ),
        ("task", {"hidden": "drop"}, "parallel.compile=false: is not built with task.hidden=drop"),
        (
            "parallel",
            {"activation_checkpointing": "selective"},
            "parallel.compile=false: parallel.activation_checkpointing=selective: selective checkpointing cannot look",
        ),
        ("parallel", {"name": "zero3", "zero_stage": 3}, "parallel.compile=false: ZeRO 3 gathers weights inside"),
        ("parallel", {"name": "fsdp", "unit_mb": 9.0}, "parallel.compile=false: a block gathered layer by layer"),
        ("parallel", {"name": "zero2", "zero_stage": 2}, "parallel.compile=false: never tried with parallel=zero2"),
        ("parallel", {"name": "fsdp", "activation_checkpointing": "block"}, "parallel.compile=true, NVIDIA's GPUs"),
        ("parallel", {"compile": True}, ""),
        ("parallel", {"compile": False}, ""),
    ],
)
def test_a_gpu_compiles_unless_the_settings_rule_it_out(
    section: str, given: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "kind_here", lambda: "cuda")
    monkeypatch.setattr(device, "has_bf16", lambda kind: True)
    monkeypatch.setattr(device, "lacks_for_compile", lambda kind: None)
    monkeypatch.setattr(device, "software", lambda: "CUDA 13.0")
    monkeypatch.setattr("swift.parallel.setup.geometry_of", lambda cfg: None)  # a drop model wants a larger grid
    cfg = plain()
    if section == "data":
        cfg = replace(cfg, model=replace(cfg.model, tokens="brain"))
    setup = resolve(replace(cfg, **{section: replace(getattr(cfg, section), **given)}))
    assert setup.why.startswith(why)
    assert bool(setup.why) == bool(why)
    assert setup.cfg.parallel.compile is ("compile=true" in why or given.get("compile", False))
    # Written down, that is what the run goes on with, wherever that is.
    monkeypatch.setattr(device, "software", lambda: "ROCm 7.0")
    assert resolve(setup.cfg).cfg.parallel.compile is setup.cfg.parallel.compile


def test_offload_without_a_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # nothing has been compiled before
    monkeypatch.setenv("PATH", "/nowhere")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(UserError) as caught:
        cpu_adam(optimizer)
    assert str(caught.value).startswith("parallel=zero3_offload: DeepSpeed's CPU Adam cannot be compiled here (")
    assert str(caught.value).endswith("ninja, or go on with torch's slower one: parallel.cpu_adam=false")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "asked", "steps", "every"),
    [
        *[("cpu", "null", 100_000, 2), ("cpu", "7", 100, 7), ("gpu", "7", 100_000, 7)],
        *[("gpu", "null", 100_000, 50), ("gpu", "null", 1000, 50), ("gpu", "null", 999, 49), ("gpu", "null", 3, 1)],
    ],
)
def test_a_gpu_logs_less_often(kind: str, asked: str, steps: int, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "kind_here", lambda: "xpu")
    monkeypatch.setattr(device, "has_bf16", lambda kind: False)
    words = (f"trainer.accelerator={kind}", f"trainer.log_every={asked}", f"trainer.max_steps={steps}")
    setup = resolve(settings(*words))
    assert setup.log_every == setup.cfg.trainer.log_every == every


def test_bf16_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is one line; `auto` takes float32. A CPU computes it in software."""
    assert resolve(settings("trainer.precision=bf16", "trainer.accelerator=cpu")).precision == "bf16-mixed"
    assert resolve(settings("trainer.precision=auto", "trainer.accelerator=cpu")).precision == "32-true"
    monkeypatch.setattr(device, "kind_here", lambda: "xpu")
    for has, name in ((False, "32-true"), (True, "bf16-mixed")):
        monkeypatch.setattr(device, "has_bf16", lambda kind, has=has: has)
        assert resolve(settings("trainer.accelerator=gpu")).precision == name
    monkeypatch.setattr(device, "has_bf16", lambda kind: False)
    with pytest.raises(UserError, match=r"trainer.precision=bf16: this GPU has no bf16; use 32"):
        resolve(settings("trainer.precision=bf16", "trainer.accelerator=gpu"))


def as_rank(monkeypatch: pytest.MonkeyPatch, world: int, local: int) -> None:
    monkeypatch.setenv(SETTINGS, "unused")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.setenv(name, str(value))


def test_more_shards_than_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1_000_000, 8)
    with pytest.raises(UserError, match=r"parallel=zero3: 1000000 ranks, but the model has \d+ parameters"):
        build_module(resolve(settings("parallel=zero3", "trainer.accelerator=cpu")), empty=True)


@pytest.mark.parametrize(
    ("parallel", "world", "fits"),
    # Room for ten bytes a parameter. One device needs 16. Of four, ZeRO 1 takes 4 and a quarter of 16; ZeRO 3 a quarter
    # of 20 and 4 for what is too small to be sharded, which here is everything.
    [("single", 1, False), ("ddp", 4, False), ("zero1", 4, True), ("zero3", 4, True), ("zero3", 2, False)],
)
def test_states_must_fit_into_memory(monkeypatch: pytest.MonkeyPatch, parallel: str, world: int, fits: bool) -> None:
    cfg = settings(f"parallel={parallel}", "trainer.accelerator=cpu")
    as_rank(monkeypatch, world, 1)
    room = SimpleNamespace(total=10 * build_geometry(cfg.model, (*cfg.data.grid, cfg.data.frames)).total_parameters)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    if fits:
        build_module(resolve(cfg), empty=True)
        return
    with pytest.raises(UserError, match="GiB for weights, gradients and optimizer, and this machine has"):
        build_module(resolve(cfg), empty=True)


def test_what_is_frozen_needs_no_gradients_and_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for five bytes a parameter: weights alone are four."""
    task = ["task=sex", "data.split=unused.json", "trainer.accelerator=cpu"]
    probe = settings(*task, "task.adapt=linear")
    parameters = build_module(resolve(probe), empty=True).parameter_count
    room = SimpleNamespace(total=5 * parameters)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    assert build_module(resolve(probe), empty=True).parameter_count == parameters
    with pytest.raises(UserError, match="GiB for weights, gradients and optimizer, and this machine has"):
        build_module(resolve(settings(*task, "task.adapt=scratch")), empty=True)

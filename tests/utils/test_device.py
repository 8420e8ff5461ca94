"""The device layer: what settings mean, how copies are kept safe, and a whole training on a stand-in for Aurora."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import swift
from swift.config.compose import typed
from swift.parallel.checkpoint.saver import Saver
from swift.parallel.environment import CudaGpus, Gpus, build_accelerator
from swift.parallel.ranks import Place
from swift.parallel.setup import resolve
from swift.parallel.strategies import build_strategy
from swift.train.run import ranks_to_start, train
from swift.utils import device
from swift.utils.errors import UserError
from tests.runs import weights
from tests.small import command, composed, metrics, settings
from tests.utils.fake_device import LATE, NAME, FakeXpu, RefusedCall, SpoiltCopy

PACKAGE = Path(swift.__file__).parent
KNOWS_CUDA = {"utils/device.py", "models/attention.py", "models/window_kernel.py"}
"""The layer itself, and the kernel that Triton makes for CUDA and ROCm."""


def show(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    """Let torch see devices of a kind; the layer's own logic stays."""
    found = None if kind == "cpu" else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(device, "_module", lambda: SimpleNamespace(get_device_name=lambda index: f"{kind}-{index}"))


def test_only_the_layer_calls_torch_cuda() -> None:
    calls = re.compile(r"torch\.(cuda|xpu|accelerator)\b|[\"']cuda[\"':]|\.cuda\(\)")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if calls.search(path.read_text(encoding="utf-8"))
    }
    # A name in a list of legal settings is no call.
    assert found - KNOWS_CUDA <= {"config/check.py", "config/launcher.py", "train/optim.py", "parallel/environment.py"}


@pytest.mark.parametrize(
    ("wanted", "here", "means"),
    [
        ("auto", "cpu", "cpu"),
        ("auto", "cuda", "cuda"),
        ("auto", "xpu", "xpu"),
        ("auto", "mps", "cpu"),
        ("gpu", "xpu", "xpu"),
        ("cpu", "cuda", "cpu"),
        ("cuda", "cuda", "cuda"),
        ("cuda", "xpu", "trainer.accelerator=cuda: torch sees 2 x xpu (xpu-0) here; "),
        ("xpu", "cuda", "trainer.accelerator=xpu: torch sees 2 x cuda (cuda-0) here; "),
        ("xpu", "cpu", "trainer.accelerator=xpu: torch sees no GPU here; "),
        ("gpu", "cpu", "trainer.accelerator=gpu: torch sees no GPU here; "),
    ],
)
def test_what_a_setting_means_here(monkeypatch: pytest.MonkeyPatch, wanted: str, here: str, means: str) -> None:
    show(monkeypatch, here, 0 if here == "cpu" else 2)
    if " " not in means:
        assert device.require(wanted, "trainer.accelerator") == means
        return
    with pytest.raises(UserError) as caught:
        resolve(settings(f"trainer.accelerator={wanted}"))
    assert str(caught.value).startswith(means)
    assert "\n" not in str(caught.value)


def test_ranks_take_devices_in_order_or_the_one_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, "xpu", 12)
    place = Place(17, 5, 24, 12, "torchrun")
    assert type(build_accelerator("xpu", place)) is Gpus
    assert Gpus.get_parallel_devices(12) == [torch.device("xpu", index) for index in range(12)]
    with pytest.raises(UserError, match="local rank 12, but only 12 devices are visible"):
        Gpus.get_parallel_devices(13)
    show(monkeypatch, "cuda", 1)
    assert isinstance(build_accelerator("cuda", place), CudaGpus)
    assert Gpus.get_parallel_devices(Gpus.parse_devices(3)) == [torch.device("cuda", 0)] * 3


@pytest.mark.parametrize("seen", [1, 2])
def test_swift_starts_no_more_ranks_than_there_are_devices(monkeypatch: pytest.MonkeyPatch, seen: int) -> None:
    """One visible device may be each rank's own, but only where a launcher has started them."""
    show(monkeypatch, "cuda", seen)
    given = ["parallel=ddp", "trainer.precision=32"]
    with pytest.raises(UserError, match=rf"parallel.devices=3: torch sees {seen} x cuda \(cuda-0\) here; take as many"):
        ranks_to_start(settings(*given, "parallel.devices=3"))
    assert ranks_to_start(settings(*given, f"parallel.devices={seen}")) == (seen if seen > 1 else 0)
    assert ranks_to_start(settings(*given, "parallel.devices=3", "trainer.accelerator=cpu")) == 3


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("xpu", "xccl")])
def test_strategies_are_told_the_device(monkeypatch: pytest.MonkeyPatch, kind: str, backend: str) -> None:
    show(monkeypatch, kind, 2)
    monkeypatch.setattr(device, "has_bf16", lambda kind: True)
    monkeypatch.setattr("swift.parallel.setup.current_place", lambda: Place(1, 1, 2, 2, "torchrun"))
    monkeypatch.setattr("swift.parallel.environment.rank_zero_only", SimpleNamespace())
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("ddp", "zero1", "fsdp"):
        built = build_strategy(resolve(settings(f"parallel={name}", f"trainer.accelerator={kind}")))
        assert built["strategy"].process_group_backend == backend
        assert built["accelerator"].name() == kind
        if name == "ddp":
            assert built["strategy"].precision_plugin.device == kind
    assert os.environ["DS_ACCELERATOR"] == kind
    monkeypatch.setattr("swift.parallel.setup.current_place", lambda: Place(0, 0, 1, 1, "none"))
    single = build_strategy(resolve(settings("parallel=single", f"trainer.accelerator={kind}")))
    assert single["strategy"].root_device == torch.device(kind, 0)


SHORT = ("trainer.max_steps=12", "trainer.val_every=12", "trainer.log_every=12", "trainer.precision=32")


def trained(store: Path, run: Path, *overrides: str) -> dict[str, Any]:
    return train(typed(composed(*command(store, run, *SHORT, "trainer.figures=false", *overrides))))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_whole_training_on_the_stand_in(
    monkeypatch: pytest.MonkeyPatch, store: Path, tmp_path: Path, workers: int
) -> None:
    """Training, validation, checkpoints and judgement come out as on the CPU, and nothing asks for CUDA."""
    loading = f"data.workers={workers}", "trainer.checkpoint_every=6"
    plain = trained(store, tmp_path / "cpu", *loading, "trainer.accelerator=cpu")
    fake = FakeXpu(monkeypatch)
    found = trained(store, tmp_path / "xpu", *loading, "trainer.accelerator=xpu")
    fake.finish()
    assert {name: value for name, value in found.items() if name != "seconds"} == plain
    assert metrics(tmp_path / "xpu") == metrics(tmp_path / "cpu")
    # Every field of every batch went through page-locked memory, and no copy was waited for.
    assert fake.copies >= 12 * 4
    assert fake.waited == 0
    assert fake.pins >= fake.copies
    assert {"synchronize", "pinned", "copied", "mark", "set_current"} <= fake.asked
    # The save in the middle was still being copied when the next step began; after the last one there is none.
    saves = [save for save in fake.saves if "numbers" not in save.copies]  # those are the guard's
    assert [save.held for save in saves] == [True, False]
    held, wanted = weights(tmp_path / "xpu"), weights(tmp_path / "cpu")
    assert held.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in held.items())
    assert NAME in (tmp_path / "xpu" / "provenance.json").read_text()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("broken", ["slots", "freed", "saved", "cuda"])
def test_the_stand_in_finds_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, store: Path, tmp_path: Path, broken: str
) -> None:
    """It fails a run that copies straight from the ring, one that lets page-locked memory go, one that asks CUDA, and
    one whose optimizer does not wait for the copy of a save."""
    fake = FakeXpu(monkeypatch)
    wrong: type[AssertionError] = SpoiltCopy
    if broken == "slots":
        monkeypatch.setattr(device, "pins", lambda where: False)
        monkeypatch.setattr(device, "is_pinned", lambda tensor: True)
    elif broken == "freed":
        # As if every copy had ended at once: nothing is held.
        monkeypatch.setattr(device, "mark", lambda where: SimpleNamespace(query=lambda: True))
    elif broken == "saved":
        monkeypatch.setattr(Saver, "before_step", lambda saver: None)
    else:
        wrong = RefusedCall
        monkeypatch.setattr(device, "count", torch.cuda.device_count)
        monkeypatch.setattr(device, "name", lambda index=0: NAME)

    def whole() -> None:
        trained(store, tmp_path, "trainer.accelerator=xpu", "trainer.checkpoint_every=6")
        fake.finish()

    with pytest.raises(wrong):
        whole()


def test_a_copy_for_a_checkpoint_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls: it begins after what was given before, the device waits where told to, then the host."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if name == "main" else "side"

        def wait_stream(self, other: Any) -> None:
            calls.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Any) -> None:
            calls.append(f"{self.name} waits for the copy")

    def record(stream: Any) -> None:
        calls.append(f"end on {stream.name}")

    event = SimpleNamespace(record=record, synchronize=lambda: calls.append("host waits"))
    module = SimpleNamespace(
        Stream=Stream, Event=lambda: event, current_stream=lambda where: Stream("main"), stream=lambda _: nullcontext()
    )
    monkeypatch.setattr(torch, "get_device_module", lambda where: module)
    monkeypatch.setattr(device, "on_host", lambda where: False)
    monkeypatch.setattr(device, "pinned_like", torch.empty_like)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: calls.append(f"kept for {stream.name}"))
    buffers: dict[str, torch.Tensor] = {}
    live = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    copy = device.HostCopy(live, torch.device("xpu"), buffers)
    begun = ["side waits for main", "kept for side", "kept for side", "end on side"]
    assert calls == begun
    copy.hold()
    assert calls == [*begun, "main waits for the copy"]
    found = copy.wait()
    assert calls[-1] == "host waits"
    assert all(torch.equal(found[name], tensor) for name, tensor in live.items())
    # The next one takes the same memory, but where a shape has changed.
    places = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    again = device.HostCopy({"a": torch.zeros(3), "b": torch.zeros(5)}, torch.device("xpu"), buffers).wait()
    assert again["a"].data_ptr() == places["a"]
    assert again["b"].shape == (5,)


def test_copies_hold_their_sources_until_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeXpu(monkeypatch)
    copies, where = device.Copies(), torch.device("cpu")
    for number in range(2 * LATE):
        batch = {"codes": device.pinned(torch.full((3,), number)), "fresh": torch.ones(2), "voxels": [1, 2]}
        moved = copies(batch, where)
        assert moved["codes"].tolist() == [number] * 3
        assert moved["voxels"] == [1, 2]
        del batch
        # Those before a mark that LATE others have followed have ended.
        assert len(copies._held) == min(number + 1, LATE + 1)
    assert (fake.copies, fake.waited) == (2 * LATE, 2 * LATE)
    fake.finish()

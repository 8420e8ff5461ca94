"""A run goes on under another strategy, on another number of ranks, and from the checkpoint before a damaged one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from swift.parallel.checkpoint import files as checkpoint
from tests.distributed import jobs
from tests.distributed.ranks import Failed, run
from tests.distributed.strategies import HSDP, stopped

pytestmark = [pytest.mark.distributed]

RUN = ["trainer.max_steps=8", "trainer.val_every=4", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9"]
SAVED = ["parallel=zero1", "data.batch_size=2"]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight steps under zero1 on two ranks without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    ranks = run(jobs.train, 2, store, folder, [*RUN, *SAVED])
    samples = {step: sorted(seen for rank in ranks for seen in rank["samples"][step]) for step in ranks[0]["samples"]}
    return {"folder": folder, "losses": ranks[0]["losses"], "samples": samples}


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel=ddp", "data.batch_size=2"]),
        pytest.param(1, ["parallel=zero3", "data.batch_size=4"], marks=pytest.mark.slow),
        (4, ["parallel=zero3", "data.batch_size=1"]),
        (2, ["parallel=fsdp", "data.batch_size=2"]),
        pytest.param(2, ["parallel=zero2", "data.batch_size=1", "trainer.accumulate=2"], marks=pytest.mark.slow),
        (1, ["parallel=single", "data.batch_size=2", "trainer.accumulate=2"]),
    ],
    ids=lambda value: "" if isinstance(value, int) else value[0].removeprefix("parallel="),
)
@pytest.mark.parametrize("step", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_another_strategy_goes_on_as_if_nothing_had_been(
    whole: dict[str, Any], step: int, ranks: int, overrides: list[str], store: Path, tmp_path: Path
) -> None:
    seen = run(jobs.train, ranks, store, stopped(whole["folder"], tmp_path, step), [*RUN, *overrides])
    steps = range(step + 1, 9)
    assert seen[0]["losses"] == pytest.approx({s: whole["losses"][s] for s in steps}, rel=1e-6)
    for s in steps:
        assert sorted(sample for rank in seen for sample in rank["samples"][s]) == whole["samples"][s]


@pytest.mark.slow
def test_every_kind_saves_what_the_others_read(whole: dict[str, Any], store: Path, tmp_path: Path) -> None:
    """Handed on: fsdp on two ranks to zero3 on two, to single on one."""
    stopped(whole["folder"], tmp_path, 2)
    two = [*RUN, "data.batch_size=2"]
    for stop, ranks, overrides in [
        (4, 2, [*two, "parallel=fsdp"]),
        (6, 2, [*two, "parallel=zero3"]),
        (8, 1, [*RUN, "parallel=single", "data.batch_size=4"]),
    ]:
        # The schedule is that of eight steps; only the end comes earlier.
        seen = run(jobs.train, ranks, store, tmp_path, overrides, stop)[0]
        steps = range(stop - 1, stop + 1)
        assert seen["losses"] == pytest.approx({step: whole["losses"][step] for step in steps}, rel=1e-6)


@pytest.fixture(scope="module")
def grouped(whole: dict[str, Any], store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run under hsdp on four ranks, two groups of two, as far as step 4."""
    folder = tmp_path_factory.mktemp("grouped")
    seen = run(jobs.train, 4, store, folder, [*RUN, *HSDP], 4)[0]
    assert seen["losses"] == pytest.approx({step: whole["losses"][step] for step in range(1, 5)}, rel=1e-6)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel=hsdp", "parallel.group=1", "data.batch_size=2"]),
        (4, ["parallel=hsdp", "parallel.group=1", "data.batch_size=1"]),
        (2, ["parallel=zero1", "data.batch_size=2"]),
        (2, ["parallel=fsdp", "data.batch_size=2"]),
        (2, ["parallel=zero2", "data.batch_size=2"]),
        (2, ["parallel=zero3", "data.batch_size=2"]),
        (2, ["parallel=ddp", "data.batch_size=2"]),
        (1, ["parallel=single", "data.batch_size=4"]),
    ],
    ids=lambda value: "" if isinstance(value, int) else value[0].removeprefix("parallel="),
)
def test_groups_of_ranks_save_what_every_kind_reads(
    whole: dict[str, Any], grouped: Path, ranks: int, overrides: list[str], store: Path, tmp_path: Path
) -> None:
    seen = run(jobs.train, ranks, store, stopped(grouped, tmp_path, 4), [*RUN, *overrides], 6)[0]
    assert seen["losses"] == pytest.approx({step: whole["losses"][step] for step in (5, 6)}, rel=1e-6)


@pytest.mark.slow
def test_a_copy_is_written_once(grouped: Path) -> None:
    """Every element of every tensor lies in one file, and each group writes about half of them."""
    manifest = checkpoint.Manifest.read(checkpoint.finished(grouped / "checkpoints")[0])
    assert manifest.world == 4
    for name, shape in manifest.shapes.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            parts = manifest.places(checkpoint.tensor_key(kind, name))
            bounds = [0, *(stop for _, stop, _ in parts)]
            assert [start for start, _, _ in parts] == bounds[:-1]
            assert bounds[-1] == math.prod(shape)
    written = [sum(stop - start for start, stop in ranges.values()) for _, ranges in sorted(manifest.ranges.items())]
    first, second = written[0] + written[1], written[2] + written[3]
    assert first == pytest.approx(second, rel=0.05)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(whole: dict[str, Any], store: Path, tmp_path: Path) -> None:
    folder = stopped(whole["folder"], tmp_path, 6) / "checkpoints"
    damage(folder / "step-0000006" / "rank-00001.safetensors")
    seen = run(jobs.train, 2, store, tmp_path, [*RUN, *SAVED])
    assert seen[0]["losses"] == {step: whole["losses"][step] for step in range(5, 9)}
    assert seen[0]["warnings"] == [
        "checkpoint step-0000006 is damaged (rank-00001.safetensors has another checksum): going on from step-0000004"
    ]
    assert seen[1]["warnings"] == []
    # The damaged one has been replaced on the way.
    for path in checkpoint.finished(folder):
        checkpoint.verify(path, checkpoint.Manifest.read(path))


def test_nothing_whole_or_another_model_is_one_line_on_all_ranks(
    whole: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    folder = stopped(whole["folder"], tmp_path, 2)
    with pytest.raises(Failed) as caught:
        run(jobs.train, 2, store, folder, [*RUN, *SAVED, "model.depths=[1,1]"])
    assert caught.value.kind == "UserError"
    assert "step-0000002 is of another model: 21 tensors differ (model.encoder.stages.1." in caught.value.message
    assert caught.value.message.count(" there, nothing here") == 5
    damage(folder / "checkpoints" / "step-0000002" / "manifest.json")
    with pytest.raises(Failed) as caught:
        run(jobs.train, 2, store, folder, [*RUN, *SAVED])
    assert caught.value.kind == "UserError"
    assert caught.value.message.endswith("no checkpoint there can be read")

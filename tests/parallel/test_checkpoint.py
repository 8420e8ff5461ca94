"""The folder of checkpoints: what is written, what a kill at any moment leaves, what damage is recognised."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swift.parallel.checkpoint import files as checkpoint
from swift.parallel.checkpoint import saver as saving
from swift.parallel.checkpoint import write as tensors
from swift.parallel.checkpoint.files import WEIGHT, Damaged, Manifest, Piece, Reader, tensor_key
from swift.parallel.checkpoint.saver import Saver, restore
from swift.utils.errors import UserError

SHAPES = {"a.weight": [3, 4], "b": [5]}


def values(step: int) -> dict[str, torch.Tensor]:
    """Weights and moments that a step decides."""
    generator = torch.Generator().manual_seed(step)
    return {
        tensor_key(kind, name): torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
        for kind in (WEIGHT, "exp_avg", "exp_avg_sq")
    }


def pieces(content: dict[str, torch.Tensor]) -> list[Piece]:
    """All of it, each parameter in one piece."""
    kinds = (WEIGHT, "exp_avg", "exp_avg_sq")
    return [
        Piece(name, tuple(shape), 0, {kind: content[tensor_key(kind, name)].view(-1) for kind in kinds})
        for name, shape in SHAPES.items()
    ]


def draft(step: int, score: float | None = None) -> Manifest:
    return Manifest(step, score, {"config": {"seed": step}}, dict(SHAPES), {}, {}, world=1, optimizer_steps=step)


def save(folder: Path, step: int, score: float | None = None, keep: int = 9) -> None:
    saver = Saver(0, 1, keep, background=False, timeout=5)
    saver.save(folder, pieces(values(step)), draft(step, score))


def taken(folder: Path) -> int:
    """The step that a run would go on from, its tensors compared with what was saved."""
    content = {key: torch.full_like(value, -1.0) for key, value in values(0).items()}
    path, manifest = restore(folder, SHAPES, lambda steps: pieces(content), 0, 1)
    assert path.name == checkpoint.step_folder(manifest.step)
    assert manifest.optimizer_steps == manifest.step == manifest.state["config"]["seed"]
    for key, value in values(manifest.step).items():
        assert torch.equal(content[key], value), key
    return manifest.step


def test_a_save_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    save(tmp_path, 7, 0.5)
    assert taken(tmp_path) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000007"]
    # Anybody's safetensors reads it.
    found = load_file(tmp_path / "step-0000007" / "rank-00000.safetensors")
    assert {key: value.view(-1).tolist() for key, value in values(7).items()} == {
        key: value.tolist() for key, value in found.items()
    }


@pytest.mark.parametrize("background", [False, True])
def test_a_save_keeps_the_values_of_its_moment(tmp_path: Path, background: bool) -> None:
    content = values(3)
    saver = Saver(0, 1, 2, background, timeout=5)
    saver.save(tmp_path, pieces(content), draft(3))
    for value in content.values():
        value.zero_()  # the next step
    saver.finish()
    assert taken(tmp_path) == 3


def test_a_range_may_lie_in_several_files(tmp_path: Path) -> None:
    whole = torch.arange(20.0)
    cuts = {"rank-00000.safetensors": (0, 6), "rank-00001.safetensors": (6, 13), "rank-00002.safetensors": (13, 20)}
    manifest = draft(1)
    manifest.shapes = {"w": [4, 5]}
    for file, (start, stop) in cuts.items():
        part = whole[start:stop].clone()
        entry = tensors.Entry("weight/w", part.dtype, tuple(part.shape), lambda part=part: part)
        manifest.files[file] = tensors.write_safetensors(tmp_path / file, [entry], {})
        manifest.ranges[file] = {"weight/w": [start, stop]}
    reader = Reader(tmp_path, manifest)
    assert torch.equal(reader.whole(WEIGHT, "w"), whole.view(4, 5))
    for start in range(20):
        for stop in range(start, 21):
            parts = [part for _, part in reader.read(WEIGHT, "w", start, stop)]
            assert torch.equal(torch.cat([torch.empty(0), *parts]), whole[start:stop])
    ranges = {file: found for file, found in manifest.ranges.items() if "1" not in file}
    with pytest.raises(Damaged, match="elements 6 to 20 of weight/w are in no file"):
        Reader(tmp_path, replace(manifest, ranges=ranges, _places={})).whole(WEIGHT, "w")


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in [(1, 0.9), (2, 0.3), (3, 0.5), (4, None), (5, 0.6), (6, None)]:
        save(tmp_path, step, score, keep=2)
    assert [path.name[-1] for path in checkpoint.finished(tmp_path)] == ["6", "5", "2"]
    assert checkpoint.best(tmp_path) == tmp_path / "step-0000002"
    assert taken(tmp_path) == 6


FLIPPED = ("rank-00000.safetensors", "manifest.json")


@pytest.mark.parametrize("file", FLIPPED)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-0000002" / file
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        path.write_bytes({"flipped": flipped, "cut": content[:middle], "empty": b""}[how])
    with caplog.at_level("WARNING", logger="swift"):
        assert taken(tmp_path) == 1
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"checkpoint step-0000002 is damaged ({file} ")
    assert caplog.messages[0].endswith("going on from step-0000001")


def test_every_bit_of_a_small_checkpoint_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-0000001" / "rank-00000.safetensors"
    content, manifest = path.read_bytes(), Manifest.read(path.parent)
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(Damaged):
            checkpoint.verify(path.parent, manifest)


def test_a_pointer_that_is_gone_or_garbage_does_no_harm(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    for text in (b"\xff\xfe", b"", b"step-0000009", b"../.."):
        (tmp_path / "latest").write_bytes(text)
        assert taken(tmp_path) == 2
    (tmp_path / "latest").unlink()
    assert taken(tmp_path) == 2
    # What was renamed but never became the latest is not taken.
    (tmp_path / "latest").write_text("step-0000001\n")
    assert taken(tmp_path) == 1


def test_nothing_whole_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-0000001" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint there can be read"):
        taken(tmp_path)


class Killed(BaseException):
    """As kill -9: nothing runs after it."""


CALLS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "mkdir"),
    (Path, "unlink"),
    (shutil, "rmtree"),
    (tensors.xxhash, "xxh3_64"),
]


def kill_at(monkeypatch: pytest.MonkeyPatch, nth: int, after: bool) -> Callable[[], int]:
    """From the `nth` call to the disk on (before or after it) nothing happens any more; tells how many there were."""
    count = 0

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > nth or (count == nth and not after):
                raise Killed
            result = original(*args, **kwargs)
            if count == nth:
                raise Killed
            return result

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return lambda: count


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, after: bool) -> None:
    start = tmp_path / "start"
    save(start, 1, 0.1, keep=1)
    save(start, 2, 0.2, keep=1)
    found = set()
    for nth in range(1, 100):
        folder = tmp_path / str(nth)
        shutil.copytree(start, folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = kill_at(monkeypatch, nth, after)
            saver = Saver(0, 1, 1, background=False, timeout=5)
            fresh: Any = None
            try:
                fresh = checkpoint.begin(folder)
                copies = {key: value.view(-1).clone() for key, value in values(3).items()}
                ranges = {key: [0, value.numel()] for key, value in copies.items()}
                saver._write(folder, fresh, copies, ranges, draft(3))
            except Killed:
                pass
            done = calls() < nth
        found.add(taken(folder))
        # The next run cleans up and saves as ever.
        save(folder, 4, keep=1)
        assert taken(folder) == 4
        assert not list(folder.glob(".unfinished-*"))
        if done:
            break
    assert found == {2, 3}
    assert nth > 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_line_and_the_run_can_go_on_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, background: bool
) -> None:
    save(tmp_path, 1)

    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    saver = Saver(0, 1, 2, background, timeout=5)

    def save_and_wait() -> None:
        saver.save(tmp_path, pieces(values(2)), draft(2))
        saver.finish()

    with pytest.raises(UserError) as caught:
        save_and_wait()
    assert "\n" not in str(caught.value)
    if number != errno.EIO:
        assert str(caught.value).endswith("is full: free some space, or lower trainer.keep_checkpoints")
    assert not list(tmp_path.glob(".unfinished-*"))  # the room is needed
    monkeypatch.undo()
    assert taken(tmp_path) == 1


def test_another_model_is_named_by_its_first_five_tensors(tmp_path: Path) -> None:
    there = {f"t{place}": [2, 3] for place in range(7)}
    here = there | {"t1": [3, 2], "new": [1]}
    del here["t6"]
    with pytest.raises(UserError) as caught:
        checkpoint.compare_shapes("RUN", there, here)
    assert str(caught.value) == (
        "RUN is of another model: 3 tensors differ (t1 is 2×3 there, 3×2 here; new is nothing there, 1 here; "
        "t6 is 2×3 there, nothing here)"
    )
    with pytest.raises(UserError, match=r"7 tensors differ \(.*t4 is 2×3 there, nothing here; \.\.\.\)"):
        checkpoint.compare_shapes("RUN", there, {})


def test_a_later_format_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = draft(1)
    manifest.format = 9
    (tmp_path / "step-0000001").mkdir()
    (tmp_path / "step-0000001" / "manifest.json").write_text(manifest.text())
    with pytest.raises(UserError, match="has format 9, this version of swift reads 1"):
        taken(tmp_path)


def test_rank_zero_waits_for_the_others(tmp_path: Path) -> None:
    (fresh := tmp_path / ".unfinished-1").mkdir()
    saver = Saver(0, 2, 2, background=False, timeout=0.1)
    with pytest.raises(UserError, match="rank 1 has not written its part"):
        saver._write(tmp_path, fresh, {"weight/b": torch.ones(5)}, {"weight/b": [0, 5]}, draft(1))
    assert saving.checkpoint.finished(tmp_path) == []

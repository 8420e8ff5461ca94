"""Import of SwiFT v1 weights: names, layouts, report, refusals. The state dicts are made by hand in v1's own layout."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from swift.models.encoder import SwinEncoder
from swift.models.v1 import load_v1, read_weights
from tests.models import cases
from tests.models import reference as ref

CASE = cases.SHAPES["padded"]
CFG = cases.config("v1", CASE)
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def v1_state() -> dict[str, Tensor]:
    """A float32 state dict with the names and shapes of SwiFT v1, for CASE: tokens 6x5x5x3, 3x3x3x3, 2x2x2x3."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, centre: float = 0.0, scale: float = 0.2) -> None:
        state[name] = centre + scale * torch.randn(*shape, generator=generator)

    def norm(name: str, size: int) -> None:
        draw(f"{name}.weight", size, centre=1.0)
        draw(f"{name}.bias", size)

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        draw(f"{name}.weight", rows, columns)
        if bias:
            draw(f"{name}.bias", rows)

    px, py, pz, pt = CASE.patch
    linear("patch_embed.fc", CASE.embed_dim, px * py * pz * pt)
    grids = [(6, 5, 5), (3, 3, 3), (2, 2, 2)]
    for stage, ((x, y, z), depth) in enumerate(zip(grids, CASE.depths, strict=True)):
        c = CASE.embed_dim * 2**stage
        draw(f"pos_embeds.{stage}.pos_embed", 1, c, x, y, z, 1)
        draw(f"pos_embeds.{stage}.time_embed", 1, c, 1, 1, 1, 3)
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            norm(f"{name}.norm1", c)
            linear(f"{name}.attn.qkv", 3 * c, c)
            linear(f"{name}.attn.proj", c, c)
            norm(f"{name}.norm2", c)
            linear(f"{name}.mlp.linear1", 2 * c, c)
            linear(f"{name}.mlp.linear2", c, 2 * c)
        if stage < 2:
            norm(f"layers.{stage}.downsample.norm", 8 * c)
            linear(f"layers.{stage}.downsample.reduction", 2 * c, 8 * c, bias=False)
    norm("norm", CASE.embed_dim * 4)
    return state


def lightning_state() -> dict[str, Tensor]:
    """The same as a Lightning module saves it, beside an output head."""
    head = {"output_head.head.weight": torch.ones(2, 64), "output_head.head.bias": torch.ones(2)}
    return {f"model.{name}": value for name, value in v1_state().items()} | head


def encoder() -> SwinEncoder:
    torch.manual_seed(1)
    return SwinEncoder(CFG, CASE.grid, CASE.frames).eval()


def reference_state(state: dict[str, Tensor]) -> ref.State:
    """v1's tensors under the names of the slow reference, written out one by one."""
    out: ref.State = {"patch_embed.proj.weight": state["patch_embed.fc.weight"], "norm.weight": state["norm.weight"]}
    out |= {"patch_embed.proj.bias": state["patch_embed.fc.bias"], "norm.bias": state["norm.bias"]}
    for stage, depth in enumerate(CASE.depths):
        out[f"stages.{stage}.position.space"] = torch.einsum("acxyzb->xyzc", state[f"pos_embeds.{stage}.pos_embed"])
        out[f"stages.{stage}.position.time"] = torch.einsum("acxyzt->tc", state[f"pos_embeds.{stage}.time_embed"])
        pairs = {"attn.norm": "norm1", "attn.fn.qkv": "attn.qkv", "attn.fn.proj": "attn.proj", "mlp.norm": "norm2"}
        pairs |= {"mlp.fn.fc1": "mlp.linear1", "mlp.fn.fc2": "mlp.linear2"}
        for block in range(depth):
            for ours, theirs in pairs.items():
                for kind in ("weight", "bias"):
                    value = state[f"layers.{stage}.blocks.{block}.{theirs}.{kind}"]
                    out[f"stages.{stage}.blocks.{block}.{ours}.{kind}"] = value
        if stage < 2:
            for name in ("norm.weight", "norm.bias", "reduction.weight"):
                out[f"stages.{stage}.downsample.{name}"] = state[f"layers.{stage}.downsample.{name}"]
    return out


@pytest.mark.parametrize("style", ["bare", "lightning"])
def test_imported_weights_compute_what_v1_computes(style: str) -> None:
    model = encoder()
    report = load_v1(model, v1_state() if style == "bare" else lightning_state())
    clip = torch.randn(2, 1, *CASE.grid, CASE.frames, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        fast = model(clip)
    slow = ref.encode(CFG, CASE.grid, CASE.frames, reference_state(v1_state()), clip)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    assert report.missing == []
    assert report.left_out == ([] if style == "bare" else ["output_head.head.weight", "output_head.head.bias"])
    prefix = "" if style == "bare" else "model."
    assert sorted(report.matched) == sorted(prefix + name for name in v1_state())


def test_every_tensor_lands_where_it_belongs() -> None:
    model = encoder()
    load_v1(model, v1_state())
    state, expected = model.state_dict(), reference_state(v1_state())
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_what_is_not_in_the_file_keeps_its_value_and_is_named() -> None:
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = v1_state()
    del state["norm.weight"], state["layers.1.blocks.0.attn.qkv.bias"]
    report = load_v1(model, state)
    assert sorted(report.missing) == ["norm.weight", "stages.1.blocks.0.attn.fn.qkv.bias"]
    for name in report.missing:
        assert torch.equal(model.state_dict()[name], before[name])
    text = str(report)
    assert text.startswith(f"SwiFT v1 import: {len(state)} tensors matched, 0 left out")
    assert "not in the checkpoint, kept as they were: " in text
    assert "stages.1.blocks.0.attn.fn.qkv.bias" in text


def test_the_report_names_what_is_left_out() -> None:
    text = str(load_v1(encoder(), lightning_state() | {"model.layers.0.blocks.0.attn.relative": torch.ones(3)}))
    assert "3 left out" in text
    assert "left out: output_head.head.weight, output_head.head.bias, model.layers.0.blocks.0.attn.relative" in text


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("layers.0.blocks.1.attn.qkv.weight", (48, 15), r"\(48, 15\) in the file, \(48, 16\) in the model"),
        ("patch_embed.fc.weight", (16, 216), r"\(16, 216\) in the file, \(16, 24\) in the model"),
        ("pos_embeds.0.pos_embed", (1, 16, 16, 16, 16, 1), r"\(1, 16, 16, 16, 16, 1\) in the file"),
        ("pos_embeds.0.time_embed", (1, 16, 1, 1, 1, 20), r"\(1, 16, 1, 1, 1, 20\) in the file"),
        # A table with time in it, or one without its outer axes, is not cut down to fit.
        ("pos_embeds.0.pos_embed", (1, 16, 6, 5, 5, 3), r"\(1, 16, 6, 5, 5, 3\) in the file"),
        ("pos_embeds.0.pos_embed", (2, 16, 6, 5, 5, 1), r"\(2, 16, 6, 5, 5, 1\) in the file"),
        ("pos_embeds.0.time_embed", (1, 16, 2, 1, 1, 3), r"\(1, 16, 2, 1, 1, 3\) in the file"),
        ("pos_embeds.0.pos_embed", (16, 6, 5, 5), r"\(16, 6, 5, 5\) in the file, \(6, 5, 5, 16\) in the model"),
    ],
)
def test_tensors_of_another_shape_are_refused(name: str, shape: tuple[int, ...], says: str) -> None:
    model = encoder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"1 tensors of another shape, {name}: {says}"):
        load_v1(model, v1_state() | {name: torch.ones(shape)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_many_wrong_shapes_are_counted_and_five_named() -> None:
    state = {name: torch.ones(1, 1) for name in v1_state()}
    with pytest.raises(ValueError, match=f"^{len(state)} tensors of another shape") as caught:
        load_v1(encoder(), state)
    assert str(caught.value).count("in the file") == 5


def test_foreign_weights_and_tensors_given_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="is it a SwiFT v1 checkpoint"):
        load_v1(encoder(), {"conv1.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="twice"):
        load_v1(encoder(), v1_state() | {"model.norm.weight": torch.ones(64)})


# --- files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("style", ["bare", "lightning"])
def test_files_of_both_styles_are_read(tmp_path: Path, style: str) -> None:
    path = tmp_path / "v1.ckpt"
    if style == "bare":
        torch.save(v1_state(), path)
    else:
        torch.save({"epoch": 3, "state_dict": lightning_state(), "hyper_parameters": {"depths": [2, 2]}}, path)
    tensors = read_weights(path)
    expected = v1_state() if style == "bare" else lightning_state()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


@pytest.mark.parametrize("old_format", [False, True])
def test_harmless_objects_beside_the_weights_are_named(
    tmp_path: Path, old_format: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v1.ckpt"
    extras = {"best": np.float64(0.5), "hyper_parameters": argparse.Namespace(depths=[2, 2])}
    torch.save({"state_dict": lightning_state(), **extras}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=r"plain weights: it holds other objects too \(.+\), and reading") as said:
        read_weights(path)
    line = str(said.value)
    assert "multiarray.scalar" in line
    assert old_format or "argparse.Namespace" in line  # of an old format torch names the first only
    assert "\n" not in line
    assert "\x1b" not in line
    # What it tells the user to do works.
    command = line.split('python -c "')[1].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    found = read_weights(tmp_path / "weights.pt")
    assert all(torch.equal(found[name], value) for name, value in lightning_state().items())


def test_a_scan_is_no_file_of_weights(tmp_path: Path) -> None:
    for name, content, says in (
        ("scan.nii.gz", b"\x1f\x8b\x08", "a NIfTI image"),
        ("notes.txt", b"hello", "neither zip nor pickle"),
        ("empty.ckpt", b"", "neither zip nor pickle"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as plain weights \(it is {says}\)$"):
            read_weights(tmp_path / name)


class Payload:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "was-run"
    torch.save({"state_dict": v1_state(), "extra": Payload(proof)}, tmp_path / "lightning.ckpt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"weight": Payload(proof)}, protocol=2))
    for name in ("lightning.ckpt", "plain.pkl"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as plain weights") as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not proof.exists()


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    torch.save({"state_dict": v1_state()}, tmp_path / "cut.ckpt")
    whole = (tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name, says in [
        ("none", "holds no state dict"),
        ("list", "holds no state dict"),
        ("cut", "cannot be read"),
        ("empty", "cannot be read"),
        ("gone", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=says):
            read_weights(tmp_path / f"{name}.ckpt")

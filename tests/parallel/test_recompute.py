"""Activation checkpointing and torch.compile change no result; checkpointing keeps less."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swift.parallel.recompute import prepare_blocks
from swift.parallel.setup import resolve
from swift.train.pretrain import PretrainModule
from swift.train.wiring import build_module
from swift.utils.bits import to_text
from tests.small import settings
from tests.train.test_pretrain import make_batch

MODEL = ["model.dropout=0.1", "model.drop_path=0.1"]


def made(*overrides: str) -> PretrainModule:
    cfg = settings(*overrides)
    module = build_module(resolve(cfg)).train()
    prepare_blocks(module.model, cfg.parallel)
    return module


def clip() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    bold = torch.randn(2, 1, 12, 12, 12, 8, generator=generator)
    return bold, torch.rand(2, 3, 3, 3, 4, generator=generator) < 0.5


def gradients(module: PretrainModule) -> tuple[Tensor, dict[str, Tensor], int]:
    """Prediction, gradients by name, and bytes that the backward pass keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = module.model(*clip())
    # Weights are held anyway.
    held = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    prediction.square().mean().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return prediction.detach(), found, sum(size for place, size in kept.items() if place not in held)


@pytest.mark.parametrize("how", ["block", "selective"])
@pytest.mark.parametrize("variant", ["factorized", "joint"])
def test_recomputing_changes_nothing_but_what_is_kept(how: str, variant: str) -> None:
    model = [*MODEL, f"model/variant={variant}", "model.patch_size=[4,4,4,2]", "model.window=[2,2,2,2]"]
    model += ["model.depths=[1,2]"]
    plain, prepared = made(*model), made(*model, f"parallel.activation_checkpointing={how}")
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in prepared.named_parameters()]
    expected, found = gradients(plain), gradients(prepared)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name
    if how == "block":  # what selective checkpointing keeps by itself escapes the hooks that count here
        assert found[2] < 0.5 * expected[2]


class Products(TorchDispatchMode):
    """Counts matrix products and other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm") or ("attention" in name and "backward" not in name):
            self.products += 1
        elif name in ("native_layer_norm", "gelu"):
            self.others += 1
        return func(*args, **(kwargs or {}))


def test_selective_does_not_repeat_matrix_products() -> None:
    counts = {}
    for how in ("none", "selective", "block"):
        module = made(f"parallel.activation_checkpointing={how}")
        loss = module.model(*clip()).square().mean()
        with Products() as found:
            loss.backward()
        counts[how] = found.products, found.others
    assert counts["none"][1] == 0
    assert counts["selective"][0] == counts["none"][0] < counts["block"][0]
    # Norms and GELU are computed again: three norms and one GELU a block.
    assert counts["selective"][1] == counts["block"][1] == 4 * 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("how", ["none", "block"])
def test_compiled_blocks_compute_the_same(how: str) -> None:
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()  # else the limit of what is compiled in a process may be reached, and nothing is
    plain = made()
    compiled = made("parallel.compile=true", f"parallel.activation_checkpointing={how}")
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in compiled.named_parameters()]
    expected, found = gradients(plain), gradients(compiled)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
    # One graph a stage: a shifted block differs from a plain one only in the index that it is given.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_the_tokens_of_a_cohort_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips with other brains and masks in every step: the graphs of the first step serve all, and change nothing.

    The graphs run as they were taken up: what a compiler makes of them does not decide whether they are made again.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    words = ["model.tokens=brain", "data.brain=cohort", "model.patch_size=[2,2,2,2]", "model.depths=[1,1]"]
    cells = np.random.default_rng(0).random((6, 6, 6)) < 0.6
    modules = []
    for compiles in ("false", "true"):
        cfg = settings(*words, f"parallel.compile={compiles}")
        cfg = replace(cfg, model=replace(cfg.model, cohort=to_text(cells)))
        module = build_module(resolve(cfg)).train()
        prepare_blocks(module.model, cfg.parallel)
        modules.append(module)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    made = []
    for step in range(3):
        batch = make_batch([3 + step, 8 + step])
        found = []
        for module in modules:
            module.zero_grad()
            module.loss(batch).backward()
            found.append([parameter.grad.clone() for parameter in module.parameters()])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)
        made.append(counters["stats"]["unique_graphs"])
    assert made == [2, 2, 2]
    assert not counters["graph_break"]

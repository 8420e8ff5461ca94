"""Every way to compute window attention against the slow reference: outputs and all gradients.

The kernel runs in Triton's interpreter here, in float32; on a GPU in `tests/gpu`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swift.models import attention, window_kernel
from swift.models.attention import METHODS, WindowAttention, kernel_slots, method_for, tile_slots
from swift.models.encoder import SwinEncoder
from swift.models.rope import WindowRotary
from swift.models.window_layout import pack, plan_groups
from swift.plan.__main__ import composed
from tests.models import cases
from tests.models import reference as ref

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CASES = [
    # grid, window, head_dim
    ((4, 4, 4, 3), (4, 4, 4, 1), 6),
    ((5, 3, 4, 2), (4, 4, 4, 1), 16),
    ((2, 1, 2, 7), (1, 1, 1, 3), 16),
    ((1, 2, 1, 21), (1, 1, 1, 10), 6),
    ((2, 2, 2, 2), (2, 2, 2, 1), 130),
]


def layer_of(window: tuple[int, ...], shifted: bool, head_dim: int, heads: int = 2) -> WindowAttention:
    axes = tuple(axis for axis in range(4) if window[axis] > 1)
    rotary = WindowRotary(window, axes, head_dim, 100.0)
    torch.manual_seed(0)
    return WindowAttention(heads * head_dim, heads, window, shifted, rotary, 0.0, 0.0)


def results(layer: WindowAttention, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and gradients of input and weights."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], weight)]


def far(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window", "head_dim"), CASES)
def test_tiles_and_kernel_equal_groups(
    grid: tuple[int, ...], window: tuple[int, ...], head_dim: int, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups equal the slow reference in float64 (test_reference.py). Two samples, so that their tokens could mix."""
    layer = layer_of(window, shifted, head_dim).double()
    x, weight = (torch.randn(2, *grid, 2 * head_dim, dtype=torch.float64) for _ in range(2))
    expected = results(layer, x, weight)
    monkeypatch.setattr(WindowAttention, "method", "tiles")
    assert far(results(layer, x, weight), expected) < 1e-12
    monkeypatch.setattr(WindowAttention, "method", "kernel")
    assert far(results(layer.float(), x.float(), weight.float()), expected) < 2e-6


def test_a_program_takes_several_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six heads of a tile in one program, as where a launch has programs enough."""
    layer = layer_of((2, 2, 2, 1), True, 6, heads=6)
    x, weight = torch.randn(2, 3, 2, 2, 2, 36), torch.randn(2, 3, 2, 2, 2, 36)
    expected = [part.double() for part in results(layer, x, weight)]
    monkeypatch.setattr(WindowAttention, "method", "kernel")
    monkeypatch.setattr(window_kernel, "PROGRAMS", 1)
    assert far(results(layer, x, weight), expected) < 2e-6


@pytest.mark.parametrize("shape", ["padded", "divisible"])
@pytest.mark.parametrize("variant", ["v1", "joint-rope", "factorized", "factorized-rope_global"])
def test_encoder_by_tiles_equals_reference(variant: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, size = cases.config(variant, shape), cases.SHAPES[shape]
    monkeypatch.setattr(WindowAttention, "method", "tiles")
    generator = torch.Generator().manual_seed(1)
    state = ref.random_state(ref.parameter_shapes(cfg, size.grid, size.frames), generator)
    model = SwinEncoder(cfg, size.grid, size.frames).double()
    model.load_state_dict(state)
    x = torch.randn(1, 1, *size.grid, size.frames, generator=generator, dtype=torch.float64)
    for got, expected in zip(model(x), ref.encode(cfg, size.grid, size.frames, state, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("most_rows", "most_elements"), [(3, 2**31 - 1), (65_535, 3 * 128 * 2 * 8)])
def test_tiles_beyond_a_limit_go_in_several_calls(
    most_rows: int, most_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of((1, 1, 1, 3), True, 6)
    x, weight = torch.randn(1, 6, 5, 4, 7, 12), torch.randn(1, 6, 5, 4, 7, 12)
    expected = [part.double() for part in results(layer, x, weight)]
    rows = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda *a, **k: rows.append(len(a[0])) or sdpa(*a, **k)
    )
    monkeypatch.setattr(WindowAttention, "method", "tiles")
    monkeypatch.setattr(attention, "MOST_ROWS", most_rows)
    monkeypatch.setattr(attention, "MOST_ELEMENTS", most_elements)
    assert far(results(layer, x, weight), expected) < 2e-6
    assert len(rows) > 1
    assert max(rows) <= 3


@pytest.mark.parametrize("window", [(1, 1, 1, 3), (2, 2, 2, 1)])
def test_groups_beyond_a_limit_go_in_several_calls_on_cuda(
    window: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(window, True, 6)
    x, weight = torch.randn(1, 6, 5, 4, 7, 12), torch.randn(1, 6, 5, 4, 7, 12)
    monkeypatch.setattr(WindowAttention, "method", "groups")
    expected = [part.double() for part in results(layer, x, weight)]
    rows = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda *a, **k: rows.append(len(a[0])) or sdpa(*a, **k)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(attention, "MOST_ROWS", 3)
    assert far(results(layer, x, weight), expected) < 2e-6
    assert max(rows) == 3


@pytest.mark.parametrize("shifted", [False, True])
def test_every_token_lies_in_one_slot_with_its_own_window(shifted: bool) -> None:
    grid, window, slots = (5, 3, 4, 2), (4, 2, 2, 1), 32
    tiles = pack(grid, window, shifted, window, slots, CPU)
    used = tiles.token >= 0
    assert sorted(tiles.token[used].tolist()) == list(range(math.prod(grid)))
    assert torch.equal(tiles.token.flatten()[tiles.slot], torch.arange(math.prod(grid), dtype=torch.int32))
    windows = [
        (tile, int(segment)) for tile, row in enumerate(tiles.segment) for segment in row.unique() if segment >= 0
    ]
    assert len(windows) == sum(group.windows for group in plan_groups(grid, window, shifted))
    for tile, segment in windows:
        inside = tiles.segment[tile] == segment
        at = torch.stack(torch.unravel_index(tiles.token[tile][inside].long(), grid))
        place = torch.stack(torch.unravel_index(tiles.place[tile][inside].long(), window))
        # A window is a box, and a token's place is its distance from the corner.
        assert torch.equal(at - at.min(1, keepdim=True).values, place)


def test_the_ladder_stays_inside_the_limits_of_a_launch() -> None:
    """Rows of SDPA or programs along the second axis of a launch, for every size at 64 clips of 96x96x96x20."""
    for model in ("7m", "51m", "202m", "806m", "1b2", "3b", "4b1", "8b8", "14b5", "v1"):
        cfg = composed(["data=store", "data.path=none", f"model={model}"])[0].model
        with torch.device("meta"):
            encoder = SwinEncoder(cfg, (96, 96, 96), 20)
        for stage, grid in zip(encoder.stages, encoder.grids):
            for layer in (part for part in stage.modules() if isinstance(part, WindowAttention)):
                window = layer.window_on(grid)
                tokens = math.prod(min(w, n) for w, n in zip(window, grid))
                method = method_for(CUDA, torch.bfloat16, tokens, 0.0, False)
                assert method == ("tiles" if model == "v1" and tokens > 64 else "kernel")
                slots = kernel_slots(tokens) if method == "kernel" else tile_slots(tokens)
                tiles = pack(grid, window, layer.shifted, window, slots, CPU).token.shape[0]
                # The kernel counts tiles and heads along the first axis, 2^31 - 1, and clips along the second.
                assert tiles * layer.heads < 2**31 if method == "kernel" else tiles <= attention.MOST_ROWS
                assert tiles * slots <= 1.3 * math.prod(grid) + slots


def test_which_method() -> None:
    assert method_for(CPU, torch.float32, 64, 0.0, False) == "groups"
    assert method_for(CPU, torch.float32, 64, 0.0, True) == "tiles"
    assert method_for(CUDA, torch.bfloat16, 64, 0.0, True) == "kernel"
    for dtype, tokens, dropout in ((torch.float64, 64, 0.0), (torch.float32, 65, 0.0), (torch.float32, 64, 0.1)):
        assert method_for(CUDA, dtype, tokens, dropout, False) == "tiles"
    assert METHODS == ("groups", "tiles", "kernel")


def test_flops_of_the_kernel_are_those_of_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products of N x N x head_dim forward and four backward; what lies between two windows of a tile is none."""
    layer, x = layer_of((4, 4, 4, 1), True, 16), torch.randn(2, 5, 3, 4, 2, 32)
    monkeypatch.setattr(WindowAttention, "method", "kernel")
    with FlopCounterMode(display=False) as counter:
        layer(x.requires_grad_()).sum().backward()
    # Windows of a shifted axis: 5 is cut into 2 + 3, the others no longer than the window are one.
    pairs = 2 * 2 * ((2 * 3 * 4) ** 2 + (3 * 3 * 4) ** 2)
    linear = 3 * 2 * (2 * 5 * 3 * 4 * 2) * 32 * (96 + 32)
    assert counter.get_total_flops() == linear + 3 * 4 * pairs * 32


@pytest.mark.parametrize("method", ["tiles", "kernel"])
def test_a_layer_compiles_to_one_graph(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of((4, 4, 4, 1), True, 16)
    x = torch.randn(2, 5, 3, 4, 2, 32)
    monkeypatch.setattr(WindowAttention, "method", method)
    layer.plan(x)
    explained = torch._dynamo.explain(layer)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)

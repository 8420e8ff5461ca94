"""The fast model equals the slow reference: outputs and gradients, every variant, shifted or not, padded or not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift.models.attention import WindowAttention
from swift.models.autoencoder import MaskedAutoencoder, clip_sums
from swift.models.decoders import build_decoder
from swift.models.encoder import SwinEncoder
from swift.models.masking import mask_voxels
from tests.models import cases
from tests.models import reference as ref

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def loaded(model: nn.Module, state: ref.State) -> nn.Module:
    """The model in float64 and evaluation mode with these weights; every name and shape must be known."""
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert names == {name: tuple(value.shape) for name, value in state.items()}
    model.double().load_state_dict(state)
    return model.eval()


def check_gradients(
    fast: Tensor, slow: Tensor, model: nn.Module, state: ref.State, inputs: tuple[Tensor, Tensor]
) -> None:
    """Gradients of two equal scalars with respect to the input and every parameter."""
    names = [name for name, _ in model.named_parameters()]
    assert names
    assert set(names) == set(state)
    parameters = [inputs[0], *(dict(model.named_parameters())[name] for name in names)]
    fast_grads = torch.autograd.grad(fast, parameters, allow_unused=True)
    slow_grads = torch.autograd.grad(slow, [inputs[1], *(state[name] for name in names)], allow_unused=True)
    for name, got, expected in zip(["the input", *names], fast_grads, slow_grads, strict=True):
        assert (got is None) == (expected is None), name
        if got is not None:
            scale = expected.abs().max().item() + 1.0
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}")


def weighted(features: list[Tensor]) -> Tensor:
    """A scalar to which every feature contributes with its own weight."""
    total = torch.zeros((), dtype=torch.float64)
    for index, feature in enumerate(features):
        total = total + (feature * normal(*feature.shape, seed=100 + index)).sum() / feature[0].numel()
    return total


@pytest.mark.parametrize("shape", list(cases.SHAPES))
@pytest.mark.parametrize("variant", list(cases.VARIANTS))
def test_encoder_equals_reference(variant: str, shape: str) -> None:
    cfg, size = cases.config(variant, shape), cases.SHAPES[shape]
    state = ref.random_state(ref.parameter_shapes(cfg, size.grid, size.frames), seeded())
    model = loaded(SwinEncoder(cfg, size.grid, size.frames), state)
    # The clip is a permuted view of (B, T, X, Y, Z) memory, as the data path delivers it.
    x = normal(2, size.frames, *size.grid, seed=1).permute(0, 2, 3, 4, 1).unsqueeze(1)
    inputs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    state = {name: value.requires_grad_() for name, value in state.items()}
    fast = model(inputs[0])
    slow = ref.encode(cfg, size.grid, size.frames, state, inputs[1])
    assert len(fast) == len(slow) == len(cfg.depths)
    for got, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)
    check_gradients(weighted(fast), weighted(slow), model, state, inputs)


def test_the_cases_reach_shifted_clipped_and_ragged_windows() -> None:
    """What the comparison above covers, so that a change of the cases cannot hollow it out."""
    seen = set()
    for shape in cases.SHAPES.values():
        cfg = cases.config("joint", shape)
        for tokens in ref.stage_grids(cfg, shape.grid, shape.frames):
            for axis, (length, window) in enumerate(zip(tokens, cfg.window, strict=True)):
                cut = "covered" if length <= window else "ragged" if length % window else "even"
                seen.add(("space" if axis < 3 else "time", cut))
        if any((n % p) for n, p in zip((*shape.grid, shape.frames), shape.patch, strict=True)):
            seen.add("padded patches")
    assert seen == {(a, c) for a in ("space", "time") for c in ("covered", "ragged", "even")} | {"padded patches"}


@pytest.mark.parametrize("channels", [2, 3])
def test_input_channels_equal_reference(channels: int) -> None:
    cfg, size = cases.config("joint", "divisible"), cases.SHAPES["divisible"]
    state = ref.random_state(ref.parameter_shapes(cfg, size.grid, size.frames, channels), seeded())
    model = loaded(SwinEncoder(cfg, size.grid, size.frames, in_channels=channels), state)
    x = normal(1, channels, *size.grid, size.frames, seed=1)
    for got, expected in zip(model(x), ref.encode(cfg, size.grid, size.frames, state, x), strict=True):
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_of_many_grids_equal_reference(shifted: bool) -> None:
    """One attention layer over 60 random grids and windows, one-token windows and one-token axes among them."""
    cfg = cases.config("joint-none", "divisible")
    generator = seeded(5)
    for _ in range(60):
        tokens = torch.randint(1, 7, (4,), generator=generator).tolist()
        window = tuple(torch.randint(1, 5, (4,), generator=generator).tolist())
        layer = WindowAttention(8, 2, window, shifted, None, 0.0, 0.0).double()
        state = ref.random_state({f"a.{n}": tuple(p.shape) for n, p in layer.named_parameters()}, generator)
        layer.load_state_dict({name[2:]: value for name, value in state.items()})
        x = torch.randn(1, *tokens, 8, generator=generator, dtype=torch.float64)
        expected = ref.attention(cfg, state, "a", "attn", x, 2, window, shifted)
        torch.testing.assert_close(layer(x), expected, **TIGHT, msg=lambda m, t=tokens, w=window: f"{t} {w}: {m}")


# --- decoders -----------------------------------------------------------------------------------------------------
def decoder_shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
    widths = [cfg.embed_dim * 2**stage for stage in range(len(cfg.depths))]
    patch = math.prod(cfg.patch_size)
    if cfg.decoder == "linear":
        cell = math.prod(cfg.patch_size[:3]) * 8 ** (len(cfg.depths) - 1)
        c, pt = widths[-1], cfg.patch_size[3]
        return {
            "decoder.expand.weight": (pt * c, c),
            "decoder.time_embed": (pt, c),
            "decoder.head.weight": (cell, c),
            "decoder.head.bias": (cell,),
        }
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, width in enumerate(widths):
        shapes[f"decoder.norms.{stage}.weight"] = shapes[f"decoder.norms.{stage}.bias"] = (width,)
        shapes[f"decoder.laterals.{stage}.weight"] = (cfg.decoder_dim, width)
        shapes[f"decoder.laterals.{stage}.bias"] = (cfg.decoder_dim,)
    shapes["decoder.norm.weight"] = shapes["decoder.norm.bias"] = (cfg.decoder_dim,)
    return shapes | {"decoder.head.weight": (patch, cfg.decoder_dim), "decoder.head.bias": (patch,)}


@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize("shape", list(cases.SHAPES))
def test_decoder_equals_reference(shape: str, decoder: str) -> None:
    cfg, size = cases.config("factorized", shape, decoder=decoder), cases.SHAPES[shape]
    state = ref.random_state(decoder_shapes(cfg), seeded())
    model = loaded(
        build_decoder(cfg, size.grid, size.frames), {n.removeprefix("decoder."): v for n, v in state.items()}
    )
    grids = ref.stage_grids(cfg, size.grid, size.frames)
    features = [
        normal(2, *tokens, cfg.embed_dim * 2**stage, seed=stage).requires_grad_() for stage, tokens in enumerate(grids)
    ]
    state = {name: value.requires_grad_() for name, value in state.items()}
    decode = ref.decode_local if decoder == "local" else ref.decode_linear
    slow, fast = decode(cfg, size.grid, size.frames, state, features), model(features)
    assert fast.shape == (2, 1, *size.grid, size.frames)
    torch.testing.assert_close(fast, slow, **TIGHT)
    short = {name.removeprefix("decoder."): value for name, value in state.items()}
    check_gradients(weighted([fast]), weighted([slow]), model, short, (features[-1], features[-1]))


# --- masked autoencoder -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize(
    ("variant", "shape"),
    [("factorized", "divisible"), ("factorized-rope_global", "padded"), ("joint", "thin"), ("v1", "long")],
)
def test_masked_autoencoder_equals_reference(variant: str, shape: str, decoder: str) -> None:
    """From voxels and hidden patches to the prediction, the loss over hidden brain voxels, and all gradients."""
    cfg, size = cases.config(variant, shape, decoder=decoder), cases.SHAPES[shape]
    grid, frames = size.grid, size.frames
    encoder_state = ref.random_state(ref.parameter_shapes(cfg, grid, frames), seeded())
    rest = ref.random_state({"mask_token": (cfg.embed_dim,), **decoder_shapes(cfg)}, seeded(1))
    state = {f"encoder.{name}": value for name, value in encoder_state.items()} | rest
    model = loaded(MaskedAutoencoder(cfg, grid, frames), state)
    state = {name: value.requires_grad_() for name, value in state.items()}
    plain = {name.removeprefix("encoder."): value for name, value in state.items()}

    x = normal(2, 1, *grid, frames, seed=2)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    hidden = torch.rand(2, *ref.stage_grids(cfg, grid, frames)[0], generator=seeded(3)) < 0.6
    brain = torch.rand(2, *grid, generator=seeded(4)) < 0.5
    fast = model(inputs[0], hidden)
    features = ref.encode(cfg, grid, frames, plain, inputs[1], hidden)
    decode = ref.decode_local if decoder == "local" else ref.decode_linear
    slow = decode(cfg, grid, frames, plain, features)
    torch.testing.assert_close(fast, slow, **TIGHT)
    check_gradients(weighted([fast]), weighted([slow]), model, state, inputs)

    voxels = mask_voxels(hidden, cfg.patch_size, (*grid, frames))
    expected = ref.voxels_of_patches(hidden, cfg, grid, frames)
    assert torch.equal(voxels, expected[:, 0])
    sums, count = clip_sums(fast, x, voxels & brain[..., None], "l1")
    loss = sums.double().sum() / count.sum()
    torch.testing.assert_close(loss, ref.masked_l1(slow, x, expected, brain), rtol=1e-6, atol=1e-6)

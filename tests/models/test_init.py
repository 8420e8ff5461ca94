"""Initial values: a function of seed, name and element, whatever is drawn with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from swift.models.init import NORMAL, ONE, ZERO, Init, fill, initial_values
from swift.parallel.setup import resolve
from swift.train.wiring import build_module
from tests.small import settings


def drawn(numel: int, seed: int = 0, name: str = "w", start: int = 0) -> torch.Tensor:
    part = torch.full((numel,), math.nan)
    fill(part, NORMAL, seed, name, start)
    return part


def reference(place: int, seed: int, name: str) -> float:
    """SplitMix64 in Python's integers and the normal quantile of the standard library."""
    from statistics import NormalDist

    import xxhash

    word, top = xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()), 1 << 64
    word = (word + (place + 1) * 0x9E3779B97F4A7C15) % top
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % top
    word = (word ^ word >> 27) * 0x94D049BB133111EB % top
    word ^= word >> 31
    return NormalDist(0, 0.02).inv_cdf(((word >> 11) + 0.5) / 2**53)


def test_values_are_those_of_the_definition() -> None:
    values = drawn(50, seed=3, name="model.a")
    assert values.tolist() == pytest.approx([reference(place, 3, "model.a") for place in range(50)], rel=1e-6)


def test_any_cut_gives_the_same_bits() -> None:
    whole = drawn(3_000_001)
    for start, stop in [
        (0, 1),
        (1, 8),
        (7, 1007),
        (1_048_575, 1_048_578),
        (999_999, 2_500_003),
        (3_000_000, 3_000_001),
    ]:
        assert torch.equal(drawn(stop - start, start=start), whole[start:stop])


def test_values_are_normal_and_depend_on_seed_and_name() -> None:
    values = drawn(1_000_000).double()
    assert float(values.mean()) == pytest.approx(0, abs=4 * 0.02 / 1000)
    assert float(values.std()) == pytest.approx(0.02, rel=0.004)
    assert float((values.abs() < 0.02).double().mean()) == pytest.approx(0.6827, abs=0.002)
    for other in (drawn(1_000_000, seed=1), drawn(1_000_000, name="v")):
        assert abs(float((values * other.double()).mean())) < 5 * 0.02**2 / 1000
        # No stream is another one, moved.
        assert not set(values[:1000].tolist()) & set(other[:1000].double().tolist())


def test_every_parameter_of_every_variant_has_its_values() -> None:
    for overrides in (
        ["model.decoder=linear"],
        ["model/variant=joint", "model.depths=[1,2]", "model.patch_size=[4,4,4,2]", "model.window=[2,2,2,2]"],
        ["model/variant=v1", "model.depths=[1,2]", "model.patch_size=[4,4,4,2]", "model.window=[2,2,2,2]"],
        ["model.position=rope_global"],
    ):
        module = build_module(resolve(settings(*overrides)))
        values = module.initial_values()
        assert values.keys() == dict(module.named_parameters()).keys()
        for name, parameter in module.named_parameters():
            if values[name].normal:
                assert parameter.numel() < 20 or 0.01 < float(parameter.detach().std()) < 0.03, name
            else:
                assert torch.all(parameter == values[name].value), name


def test_a_part_of_a_model_is_drawn_by_its_module() -> None:
    values = initial_values(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), {"0.weight": 0.5})
    assert values == {"0.weight": Init(True, 0.01), "0.bias": ZERO, "1.weight": ONE, "1.bias": ZERO}
    with pytest.raises(AssertionError, match=r"PReLU \(0\) lacks own_initial_values"):
        initial_values(nn.Sequential(nn.PReLU()))

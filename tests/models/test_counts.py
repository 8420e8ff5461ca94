"""Parameter counts as integers, from the YAML files through the built model, without any memory (the meta device)."""

from __future__ import annotations

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from swift.config.compose import conf_dir, typed
from swift.config.schema import ModelConfig
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.encoder import SwinEncoder
from tests.models import reference as ref

GRID, FRAMES = (96, 96, 96), 20

FACTORIZED = {
    "7m": 7_346_268,
    "51m": 51_938_208,
    "202m": 207_390_528,
    "806m": 828_837_504,
    "1b2": 1_206_662_784,
    "3b": 3_313_900_800,
    "4b1": 4_069_213_440,
    "8b8": 8_814_549_888,
    "14b5": 14_460_934_656,
    "130b": 130_394_048_256,
}
JOINT = {
    "7m": 7_326_108,
    "51m": 50_916_768,
    "202m": 202_251_072,
    "806m": 806_172_288,
    "3b": 3_219_025_152,
    "8b8": 7_238_558_592,
    "14b5": 12_864_772_608,
}
PUBLISHED_FACTORIZED = {"7m": 9_355_932, "51m": 66_144_672, "202m": 264_115_008}
"""Of a descendant of the code, with 18 blocks in stage 3."""
JOINT_WITH_LINEAR_DECODER = {"51m": 137_143_200, "806m": 1_164_902_016, "3b": 3_974_122_752, "14b5": 14_525_852_160}


def composed(*overrides: str) -> ModelConfig:
    """The architecture that `python -m swift.train OVERRIDES` would train on 96^3 x 20 clips."""
    clip = [f"data.grid=[{','.join(map(str, GRID))}]", f"data.frames={FRAMES}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return typed(compose("config", overrides=[*overrides, *clip])).model


def count(model: nn.Module) -> int:
    parameters = list(model.parameters())
    assert all(parameter.is_meta and parameter.requires_grad for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters)


def test_the_next_step_of_the_report() -> None:
    """130 billion within 3 %, by the arithmetic of the ladder; heads of 128 channels at most, by growing in number."""
    cfg = composed("model=130b")
    assert (cfg.embed_dim, cfg.depths, cfg.num_heads) == (2304, [2, 2, 86, 2], [18, 36, 72, 144])
    widths = [2304, 4608, 9216, 18432]
    assert [width // heads for width, heads in zip(widths, cfg.num_heads)] == [128] * 4
    blocks = sum(depth * (16 * width**2 + 22 * width) for depth, width in zip(cfg.depths, widths))
    merging = sum(16 * width**2 + 16 * width for width in widths[:3])
    patches, norms = 216 * 2304 + 2304 + 2 * 2304, 2 * 18432
    assert blocks + merging + patches + norms == FACTORIZED["130b"]
    assert abs(FACTORIZED["130b"] / 130e9 - 1) < 0.03


def encoder_count(cfg: ModelConfig) -> int:
    with torch.device("meta"):
        built = count(SwinEncoder(cfg, GRID, FRAMES))
    assert built == sum(math.prod(shape) for shape in ref.parameter_shapes(cfg, GRID, FRAMES).values())
    return built


def test_v1() -> None:
    assert encoder_count(composed("model=v1")) == 4_315_212


@pytest.mark.parametrize(("size", "expected"), FACTORIZED.items())
def test_factorized(size: str, expected: int) -> None:
    cfg = composed(f"model={size}")
    assert (cfg.name, cfg.variant, cfg.attention) == (size, "factorized", "factorized")
    assert encoder_count(cfg) == expected


@pytest.mark.parametrize(("size", "expected"), JOINT.items())
def test_joint(size: str, expected: int) -> None:
    cfg = composed(f"model={size}", "model/variant=joint")
    assert (cfg.variant, cfg.attention, cfg.patch_size) == ("joint", "joint", [6, 6, 6, 2])
    assert encoder_count(cfg) == expected


@pytest.mark.parametrize(("size", "expected"), PUBLISHED_FACTORIZED.items())
def test_factorized_as_published(size: str, expected: int) -> None:
    assert encoder_count(composed(f"model={size}", "model.depths=[2,2,18,2]")) == expected


@pytest.mark.parametrize(("size", "expected"), JOINT_WITH_LINEAR_DECODER.items())
def test_joint_with_the_linear_decoder(size: str, expected: int) -> None:
    """The totals of the report leave out the mask token (one width)."""
    cfg = composed(f"model={size}", "model/variant=joint", "model.decoder=linear")
    with torch.device("meta"):
        assert count(MaskedAutoencoder(cfg, GRID, FRAMES)) == expected + cfg.embed_dim


def test_a_block_of_the_factorized_ladder() -> None:
    """16 d^2 + 22 d: two attentions with bias, one MLP, three LayerNorms, three LayerScales."""
    cfg = composed("model=51m")
    with torch.device("meta"):
        model = SwinEncoder(cfg, GRID, FRAMES)
    for stage, blocks in enumerate(model.stages):
        d = cfg.embed_dim * 2**stage
        assert [count(block) for block in blocks.blocks] == [16 * d * d + 22 * d] * cfg.depths[stage]


def test_tiny_is_small() -> None:
    assert encoder_count(composed("model=tiny")) < 5_000_000

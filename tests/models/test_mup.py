"""muP by name: kinds and factors against the paper's table, initial weights, attention, the record of a checkpoint."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from swift.config.schema import ModelConfig
from swift.models import mup
from swift.models.autoencoder import MaskedAutoencoder
from swift.models.encoder import SwinBlock
from swift.utils.errors import UserError
from tests.models import cases

SIZE = cases.SHAPES["divisible"]
BASE = 16


def build(cfg: ModelConfig) -> MaskedAutoencoder:
    return MaskedAutoencoder(cfg, SIZE.grid, SIZE.frames)


def config(variant: str = "factorized", **changes: Any) -> ModelConfig:
    return cases.config(variant, SIZE, **changes)


# What each parameter is, written down by hand; the first pattern that matches counts.
KINDS = (
    (r"encoder\.patch_embed\.proj\.weight", "input"),
    (r"encoder\..*\.(qkv|proj|fc1|fc2|reduction)\.weight", "hidden"),
    (r"decoder\.laterals\.\d\.weight", "output"),
    (r"decoder\.(laterals\.\d\.bias|norm\..*)", "finite"),
    (r"decoder\.expand\.weight", "hidden"),
    (r"decoder\.time_embed", "vector"),
    (r"local decoder\.head\..*", "finite"),
    (r"linear decoder\.head\.weight", "output"),
    (r"linear decoder\.head\.bias", "finite"),
    (r".*(bias|norm\.weight|norms\.\d\.weight|gamma|mask_token|position\.\w+)", "vector"),
)


def kind_by_hand(name: str, decoder: str) -> str:
    for pattern, kind in KINDS:
        if re.fullmatch(pattern, f"{decoder} {name}") or re.fullmatch(pattern, name):
            return kind
    raise AssertionError(name)


@pytest.mark.parametrize("decoder", ["local", "linear"])
@pytest.mark.parametrize("variant", ["factorized", "factorized-rope_global", "joint", "v1"])
@pytest.mark.parametrize("width", [8, 16, 64])
def test_every_parameter_has_its_kind_and_its_factors(variant: str, decoder: str, width: int) -> None:
    heads = [1, 1] if "rope" not in variant and width == 8 else [1, 2]
    cfg = config(variant, embed_dim=width, decoder=decoder, num_heads=heads)
    table = mup.width_table(build, cfg, BASE)
    assert list(table) == [name for name, _ in build(cfg).named_parameters()]
    m = width / BASE
    factors = {
        "input": (1, 1, 1),
        "vector": (1, 1, 1),
        "finite": (1, 1, 1),
        "hidden": (m**-0.5, 1 / m, m),
        "output": (1 / m, 1 / m, m),
    }
    for name, scale in table.items():
        assert scale.kind == kind_by_hand(name, decoder), name
        assert (scale.init, scale.lr, scale.decay) == pytest.approx(factors[scale.kind]), name
        if width == BASE:
            assert (scale.init, scale.lr, scale.decay) == (1, 1, 1)


def test_base_shapes_name_the_dimensions_that_grow() -> None:
    cfg = config("joint", embed_dim=64, decoder="linear")
    shapes = mup.record(mup.width_table(build, cfg, BASE))
    assert shapes["encoder.patch_embed.proj.weight"] == [16, None]
    assert shapes["encoder.stages.0.downsample.reduction.weight"] == [32, 128]
    assert shapes["encoder.stages.0.downsample.norm.weight"] == [128]
    assert shapes["encoder.stages.1.blocks.0.attn.fn.qkv.weight"] == [96, 32]
    assert shapes["encoder.stages.1.position.time"] == [None, 32]
    assert shapes["encoder.stages.0.position.space"] == [None, None, None, 16]
    assert shapes["decoder.head.weight"] == [None, 32]
    assert shapes["mask_token"] == [16]


@pytest.mark.parametrize("variant", ["factorized", "joint"])
@pytest.mark.parametrize("width", [16, 32, 64])
def test_attention_divides_by_head_dim_beyond_the_base_width(variant: str, width: int) -> None:
    cfg = config(variant, embed_dim=width, attention_base_width=BASE)
    seen = 0
    for name, part in build(cfg).named_modules():
        if type(part).__name__ != "WindowAttention":
            continue
        seen += 1
        stage = int(name.split(".")[2])
        head_dim, base_dim = (e * 2**stage // cfg.num_heads[stage] for e in (width, BASE))
        # At the base width the standard 1/sqrt(head_dim), to the bit.
        assert (part.scale == head_dim**-0.5) == (width == BASE)
        assert part.scale == pytest.approx(math.sqrt(base_dim) / head_dim)
    assert seen == {"factorized": 8, "joint": 4}[variant]


def test_attention_scale_reaches_the_scores() -> None:
    """One window over all tokens and no positions: plain softmax attention, written out."""
    cfg = config("joint-none", embed_dim=64, window=[4, 4, 4, 4], attention_base_width=BASE)
    layer = build(cfg).double().encoder.stages[0].blocks[0].attn.fn
    nn.init.normal_(layer.qkv.weight, std=0.3)
    x = torch.randn(1, 2, 2, 2, 2, 64, dtype=torch.float64)
    q, k, v = layer.qkv(x.reshape(16, 64)).view(16, 3, 2, 32).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) * math.sqrt(8) / 32).softmax(-1)
    expected = layer.proj((weights @ v).transpose(0, 1).reshape(16, 64)).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_names_survive_wrappers() -> None:
    cfg = config(embed_dim=32)
    table = mup.width_table(build, cfg, BASE)
    model = build(cfg)
    for stage in model.encoder.stages:
        for index, block in enumerate(stage.blocks):
            assert isinstance(block, SwinBlock)
            stage.blocks[index] = checkpoint_wrapper(block)
    wrapped = [name for name, _ in model.named_parameters()]
    assert wrapped != list(table)
    assert [mup.plain_name(name) for name in wrapped] == list(table)
    assert mup.plain_name("module.encoder._orig_mod.norm.weight") == "encoder.norm.weight"  # DDP and torch.compile


def test_infshapes_lost_with_the_parameters_are_restored() -> None:
    cfg = config(embed_dim=32)
    table = mup.width_table(build, cfg, BASE)
    model = build(cfg)
    mup.attach(model, table)
    weight = "encoder.stages.0.blocks.0.mlp.fn.fc1.weight"
    assert model.get_parameter(weight).infshape.width_mult() == 2
    fresh = build(cfg)
    fresh.load_state_dict(model.state_dict())
    assert not hasattr(fresh.get_parameter(weight), "infshape")
    # torch has both kept and dropped attributes of parameters here, by version
    for bare in (fresh, copy.deepcopy(model)):
        mup.attach(bare, table)
        assert bare.get_parameter(weight).infshape == model.get_parameter(weight).infshape
    # the table itself holds no parameter, so nothing is lost with them
    assert copy.deepcopy(table) == table


def test_a_fine_tuning_head_gets_its_scale_from_the_same_twins() -> None:
    class Tuned(nn.Module):
        def __init__(self, cfg: ModelConfig):
            super().__init__()
            self.encoder = build(cfg).encoder
            self.head = nn.Linear(2 * cfg.embed_dim, 3)

    table = mup.width_table(Tuned, config(embed_dim=64), BASE)
    assert (table["head.weight"].kind, table["head.weight"].lr) == ("output", 0.25)
    assert table["head.bias"].kind == "finite"


def test_the_record_travels_in_a_file_of_plain_numbers() -> None:
    table = mup.width_table(build, config(embed_dim=32), BASE)
    buffer = io.BytesIO()
    torch.save({"base_shapes": mup.record(table)}, buffer)
    buffer.seek(0)
    mup.check_record(torch.load(buffer, weights_only=True)["base_shapes"], table)


def test_a_missing_or_foreign_record_is_one_line() -> None:
    table = mup.width_table(build, config(embed_dim=32), BASE)
    with pytest.raises(UserError, match=r"no record of muP base shapes") as error:
        mup.check_record(None, table)
    assert "\n" not in str(error.value)
    other = mup.record(mup.width_table(build, config(embed_dim=32), 32))
    with pytest.raises(
        UserError, match=r"other muP base shapes \(\d+ differ: mask_token: \[32\] there, \[16\]"
    ) as error:
        mup.check_record(other, table)
    assert str(error.value).count(" there, ") == 5
    less = mup.record(table)
    del less["mask_token"]
    with pytest.raises(UserError, match=r"\(1 differ: mask_token: None there, \[16\] here\)"):
        mup.check_record(less, table)


def test_spatial_maps_do_not_grow_with_the_width() -> None:
    table = mup.width_table(build, config(embed_dim=64, maps=3, maps_of="shared"), BASE)
    assert {table[f"linear.{name}"].kind for name in ("maps", "log_noise")} == {"finite"}
    assert {table[f"linear.{name}"].lr for name in ("maps", "log_noise")} == {1.0}

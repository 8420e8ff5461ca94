"""Layers that take their rows in pieces equal the slow reference, and compute the same as with all rows at once."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp

from swift.models import pieces
from swift.models.attention import WindowAttention
from swift.models.layers import Residual
from swift.models.pieces import rows_at_once
from swift.models.window_layout import plan_groups, tokens_of, whole_windows
from tests.models import cases, test_reference
from tests.models.test_any_mask import test_any_mask_equals_the_slow_reference as any_mask_equals_the_slow_reference

CPU = torch.zeros(1, dtype=torch.float64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 12 rows of 48 channels in float64."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 12 * 48 * 8 // torch.get_num_threads())


@pytest.mark.parametrize(
    ("variant", "shape"),
    [("v1", "padded"), ("joint-rope", "thin"), ("factorized", "long"), ("factorized-ts-each", "padded")],
)
def test_an_encoder_in_pieces_equals_the_reference(variant: str, shape: str) -> None:
    """Outputs and all gradients."""
    size = cases.SHAPES[shape]
    assert rows_at_once(CPU, 1000, 3 * size.embed_dim) < 100, "the layers must be cut"
    test_reference.test_encoder_equals_reference(variant, shape)


def test_tokens_that_are_not_seen_equal_the_reference() -> None:
    """Outputs and all gradients, of the function of test_any_mask."""
    assert rows_at_once(CPU, 1000, 3 * 8) < 100, "the layers must be cut"
    any_mask_equals_the_slow_reference("joint-rope", "four")


def test_pieces_by_hand() -> None:
    """An axis of 5 in windows of 2: a group of two windows of 2 tokens and one of a window of 1, times two samples."""
    groups = plan_groups((1, 1, 1, 5), (1, 1, 1, 2), False)
    full, rest = groups
    assert whole_windows(groups, 2, 5) == (((full, 2),), ((full, 2), (rest, 1)), ((rest, 1),))
    assert whole_windows(groups, 2, 10) == (((full, 4), (rest, 2)),)
    # No piece has less than a window.
    assert [tokens_of(piece) for piece in whole_windows(groups, 2, 1)] == [2, 2, 2, 2, 1, 1]


def test_rows_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 960)
    threads = torch.get_num_threads()
    assert rows_at_once(CPU, 10_000, 12) == 10 * threads
    assert rows_at_once(CPU.float(), 10_000, 12) == 20 * threads
    assert rows_at_once(CPU, 7, 12) == 7
    assert rows_at_once(CPU, 10_000, 10_000) == 1
    assert rows_at_once(torch.zeros(1, device="meta"), 10_000, 12) == 10_000


def test_random_numbers_are_drawn_for_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip is dropped as a whole, and a seed draws the same as without pieces."""
    branch = Residual(8, Mlp(8, 16), layer_scale=None, drop_path=0.5).double().train()
    x = torch.randn(6, 3, 2, 2, 2, 8, dtype=torch.float64)
    torch.manual_seed(3)
    found = branch(x)
    kept = (found != x).flatten(1)
    assert (kept.all(1) == kept.any(1)).all()
    assert 0 < int(kept.all(1).sum()) < 6
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 30)
    torch.manual_seed(3)
    assert torch.equal(branch(x), found)


def test_attention_draws_for_all_windows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = WindowAttention(8, 2, (2, 2, 2, 1), False, None, 0.5, 0.0).train()
    x = torch.randn(1, 4, 4, 4, 3, 8)
    torch.manual_seed(3)
    found = layer(x)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 30)
    torch.manual_seed(3)
    assert torch.equal(layer(x), found)

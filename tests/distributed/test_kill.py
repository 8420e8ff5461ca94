"""The short form of tests.kill_test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill_test import kill_test

pytestmark = [pytest.mark.distributed]


@pytest.mark.parametrize(
    ("parallel", "ranks", "kills"),
    [("single", 1, 5), pytest.param("zero1", 2, 5, marks=pytest.mark.slow)],
)
def test_five_kills_change_nothing(tmp_path: Path, parallel: str, ranks: int, kills: int) -> None:
    found = kill_test(tmp_path, parallel, ranks, kills, steps=40, seed=1)
    assert found["weights"] == "equal bit by bit"
    assert found["kills"] >= 3

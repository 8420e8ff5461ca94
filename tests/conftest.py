"""Shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import small_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `tests.small`; read only."""
    return small_store(tmp_path_factory.mktemp("small") / "store")

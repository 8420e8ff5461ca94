from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import small_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("distributed") / "store")

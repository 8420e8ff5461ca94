from __future__ import annotations

from pathlib import Path

import pytest

from tests.cohort import cohort
from tests.small import small_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("distributed") / "store")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort with its split; tests add runs of their own names."""
    return cohort(tmp_path_factory.mktemp("cohort"))

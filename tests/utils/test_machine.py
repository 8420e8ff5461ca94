"""What a run and a bug report say of packages."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

from swift.utils import machine


def test_versions_are_those_of_our_dependencies():
    found = machine.packages()
    assert found["torch"] == metadata.version("torch")
    assert found["lightning"] == metadata.version("lightning")
    assert "hydra-core" in found
    assert "ruff" not in found  # an extra
    json.dumps(found)


def test_versions_without_an_installed_distribution(monkeypatch):
    monkeypatch.setattr(machine, "DISTRIBUTION", "no-such-distribution")
    assert machine.packages()["torch"] == metadata.version("torch")


def test_packages_are_listed_where_torch_is_broken():
    code = (
        "import sys; sys.modules['torch'] = None; from swift.utils.machine import packages; print(packages()['torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == metadata.version("torch")

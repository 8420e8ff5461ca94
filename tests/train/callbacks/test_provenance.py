"""provenance.json: git states, versions, restarts."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from swift.train.callbacks import provenance
from swift.utils.errors import UserError


def git(folder, *args):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1\n")
    git(tmp_path / "repo", "init", "-q")
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-q", "-m", "first")
    return package


def test_clean_dirty_and_untracked_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.git_state(checkout) == {"revision": head, "dirty": False}
    (checkout / "a.py").write_text("2\n")
    assert provenance.git_state(checkout) == {"revision": head, "dirty": True}
    (checkout / "a.py").write_text("1\n")
    (checkout / "new.py").write_text("")
    assert provenance.git_state(checkout)["dirty"] is True


def test_a_package_installed_inside_somebodys_checkout_is_not_that_checkout(checkout):
    installed = checkout.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("")
    assert provenance.git_state(installed) == {"revision": "not a git checkout", "dirty": None}


def test_no_repository_and_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_state(tmp_path)["revision"] == "not a git checkout"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path) == {"revision": "unknown: FileNotFoundError", "dirty": None}


def test_git_variables_of_a_hook_are_ignored(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert len(provenance.git_state(checkout)["revision"]) == 40


def test_collect_is_json_and_keeps_the_overrides():
    found = provenance.collect(["model=tiny", "task.mask_ratio=0.6"])
    assert json.loads(json.dumps(found)) == found
    assert found["overrides"] == ["model=tiny", "task.mask_ratio=0.6"]
    assert found["host"]["cores"] >= 1
    assert len(found["host"]["gpus"]) == torch.cuda.device_count()
    assert found["host"]["cpu"]


def test_restarts_are_added_with_what_changed(tmp_path):
    first = {"time": "2026-01-01T00:00:00+00:00", "overrides": ["a=1"], "python": "3.11.1"}
    again = {"time": "2026-01-02T00:00:00+00:00", "overrides": ["resume=x"], "python": "3.11.1"}
    provenance.record(tmp_path, first)
    provenance.record(tmp_path, again, step=40)
    provenance.record(tmp_path, first | {"time": "2026-01-03T00:00:00+00:00"}, step=90)
    assert json.loads((tmp_path / "provenance.json").read_text()) == {
        "started": "2026-01-01T00:00:00+00:00",
        "overrides": ["a=1"],
        "python": "3.11.1",
        "restarts": [
            {"time": "2026-01-02T00:00:00+00:00", "step": 40, "changed": {"overrides": ["resume=x"]}},
            {"time": "2026-01-03T00:00:00+00:00", "step": 90, "changed": {}},
        ],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]


def test_a_damaged_file_is_set_aside(tmp_path):
    (tmp_path / "provenance.json").write_text('{"started": ')
    with pytest.warns(UserWarning, match="damaged"):
        content = provenance.record(tmp_path, {"time": "now"})
    assert content == {"started": "now", "restarts": []}
    assert (tmp_path / "provenance.json.damaged").read_text() == '{"started": '


def test_callback_writes_on_rank_zero_only(tmp_path):
    callback = provenance.Provenance(tmp_path / "run", ["seed=3"])
    callback.on_train_start(SimpleNamespace(is_global_zero=False, global_step=0), None)
    assert not (tmp_path / "run").exists()
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=0), None)
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=5), None)
    content = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert content["overrides"] == ["seed=3"]
    assert [restart["step"] for restart in content["restarts"]] == [5]


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir="):
        provenance.record(tmp_path / "file", {"time": "now"})

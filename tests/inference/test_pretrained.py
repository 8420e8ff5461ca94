"""Folders and the hub: bit for bit there and back, a card that is true, one line for what goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import swift
from swift.data.store.reader import Store
from swift.inference.export import export
from swift.inference.pretrained import CARD, CLIENT_ERROR, CONFIG, WEIGHTS, Pretrained
from swift.utils.errors import UserError
from tests.runs import weights


class LocalHub:
    """Stands in for the hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.down = self.offline = False

    def __call__(self, token: str | None = None) -> LocalHub:  # as HfApi(token=...)
        return self

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        if self.offline:
            raise CLIENT_ERROR("no route to the host")
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"commit of {repo_id}"

    def place(self, repo_id: str) -> Path:
        if self.down:
            raise LocalEntryNotFoundError("Cannot find the requested files on the disk; check your connection.")
        if not (self.root / repo_id).is_dir():
            raise RepositoryNotFoundError("404", response=MagicMock())
        return self.root / repo_id

    def hf_hub_download(self, repo_id: str, filename: str, **_: Any) -> str:
        return str(self.place(repo_id) / filename)

    def snapshot_download(self, repo_id: str, allow_patterns: list[str], **_: Any) -> str:
        found = {path.name for path in self.place(repo_id).iterdir()}
        assert found <= set(allow_patterns)
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    made = LocalHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", made)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "model"
    swift.load_model(finished).save_pretrained(out, license="cc-by-4.0")
    return out


def test_a_folder_goes_there_and_back_bit_for_bit(folder: Path, finished: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CONFIG, CARD])
    found = swift.load_model(folder)
    expected = {name.removeprefix("model."): value for name, value in weights(finished).items()}
    state = found.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert found.contract == swift.load_model(finished).contract
    export(finished, tmp_path / "own.safetensors")
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    found.save_pretrained(tmp_path / "again")  # the licence is that of its card
    for name in (WEIGHTS, CONFIG, CARD):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_card_and_the_configuration_are_true_and_name_nobody(folder: Path, finished: Path, store: Path) -> None:
    card, config = ModelCard.load(folder / CARD), json.loads((folder / CONFIG).read_text())
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "swift-fmri")
    summary = json.loads((finished / "summary.json").read_text())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert rows["**this model**"] == f"{summary['val_l1']:.4f}"
    assert {name: rows[name] for name in summary["baselines"]} == {
        name: f"{value:.4f}" for name, value in summary["baselines"].items()
    }
    assert rows["grid"] == "12 x 12 x 12 voxels of 4 mm"
    assert f"{summary['parameters']:,} parameters, 6 optimizer steps. Trained on 2 subjects." in card.text
    assert config["contract"]["grid"] == [12, 12, 12]
    assert (config["step"], config["settings"]["model"]["embed_dim"]) == (6, 12)
    text = (folder / CARD).read_text() + (folder / CONFIG).read_text()
    for scan in Store(store).scans:
        assert scan.subject not in text
    assert str(store) not in text
    assert str(finished) not in text


def test_scores_are_those_of_the_weights_or_left_out(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"best_step": 4}))
    swift.load_model(run).save_pretrained(tmp_path / "out", license="mit")
    card = (tmp_path / "out" / CARD).read_text()
    assert "Not recorded with these weights: the run was judged with those of step 4." in card
    assert "**this model**" not in card


def test_a_file_exported_into_its_own_run_is_a_model_too(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    export(run, run / "model_of_mine.safetensors")
    swift.load_model(run / "model_of_mine.safetensors").save_pretrained(tmp_path / "out", license="mit")
    assert "Trained on 2 subjects." in (tmp_path / "out" / CARD).read_text()


def test_the_hub_there_and_back(folder: Path, hub: LocalHub) -> None:
    given = swift.load_model(folder)
    assert given.push_to_hub("lab/tiny") == "commit of lab/tiny"
    assert (hub.root / "lab" / "tiny" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    found = swift.load_model("lab/tiny")
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), given.model.parameters(), strict=True))
    assert isinstance(Pretrained.from_pretrained("lab/tiny"), Pretrained)


def test_what_goes_wrong_is_one_line(
    folder: Path, finished: Path, hub: LocalHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = swift.load_model(finished)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / WEIGHTS).touch()
    mistakes: list[tuple[Any, str]] = [
        (lambda: run.save_pretrained(tmp_path / "a"), "a model card needs a licence: say license='cc-by-4.0'"),
        (lambda: run.push_to_hub("lab/other"), "a model card needs a licence"),
        (lambda: run.save_pretrained(tmp_path / "a", license="as I like"), "write it as the hub does"),
        (lambda: run.save_pretrained(tmp_path / "full", license="mit"), "not empty; name a new folder"),
        (lambda: swift.load_model("lab/nothing"), "lab/nothing: no such model on the hub, or it is private"),
        (lambda: swift.load_model("no/such/folder"), "no such folder or file, and no name of the hub"),
        (lambda: swift.load_model(tmp_path / "empty"), "is no safetensors file"),
    ]
    for mistake, says in mistakes:
        with pytest.raises(UserError) as raised:
            mistake()
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (hub.root / "lab" / "other").exists()
    hub.offline = True
    with pytest.raises(UserError, match=r"lab/tiny: the hub cannot be reached.*no network\?"):
        run.push_to_hub("lab/tiny", license="mit")
    hub.down = True
    with pytest.raises(UserError, match=r"the hub cannot be reached and there is no copy here: no network\?"):
        swift.load_model("lab/tiny")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / CARD).write_text("# no licence\n")
    swift.load_model(bare)
    assert f"{bare}: its card names no licence" in caplog.text


def test_imported_v1_weights_get_the_same_card(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from swift.inference.model import load_trained
    from swift.models.heads import build_model
    from tests.small import settings

    cfg = settings("model=v1", "model.embed_dim=12", "model.depths=[1,2]", "model.num_heads=[1,2]",
                   "model.patch_size=[4,4,4,1]", "model.window=[2,2,2,2]")  # fmt: skip
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    model = build_model(cfg.model, cfg.task, cfg.data.grid, cfg.data.frames)
    torch.save({"state_dict": {f"model.{n}": v for n, v in model.encoder.state_dict().items()}}, tmp_path / "v1.ckpt")
    given = swift.load_model(tmp_path / "v1.ckpt", config=tmp_path / "settings")
    given.save_pretrained(tmp_path / "out", license="other")
    found = load_trained(tmp_path / "out" / WEIGHTS)
    assert found.step is None
    assert found.contract == given.contract
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), given.model.parameters(), strict=True))
    assert "SwiFT v1, imported" in (tmp_path / "out" / CARD).read_text()


def test_import_swift_stays_cheap() -> None:
    code = "import sys, swift; print([m for m in ('torch', 'huggingface_hub', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

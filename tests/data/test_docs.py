"""Every command and every piece of Python on the pages about data, run in their order on a small data set."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from swift.config.compose import typed
from swift.data import __main__ as command_line
from swift.data.clips.augment import is_on
from swift.data.module import ClipDataModule
from swift.data.store.reader import Store
from tests import small
from tests.data import scans

DOCS = Path(__file__).parents[2] / "docs"
SIZE = {"swift.data": ["--grid", "24", "--spacing", "4"], "swift.train": ["data.grid=[24,24,24]", "data.spacing=4.0"]}
"""Makes the grids small; nothing else of a command is changed."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def commands(page: str) -> list[list[str]]:
    """Words of every `python -m swift...` line after `python -m`."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    return [shlex.split(re.sub(r"  +# .*", "", line))[2:] for line in lines if line.startswith("python -m swift")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("docs")
    scans.dataset(root / "DERIVATIVES", subjects=4, frames=64)
    return root


def run_data(words: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        command_line.main([*words, *(SIZE["swift.data"] if words[0] == "ingest" else []), "--quiet"])
    assert ended.value.code == 0, words
    return out.getvalue()


def test_the_page_about_the_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    said = {words[1]: run_data(words[1:]) for words in commands("store.md")}
    assert list(said) == ["ingest", "info", "report", "verify", "copy", "repair", "export"]
    assert "4 added" in said["ingest"]
    assert "4 scans, 0 marked" in said["report"]
    assert "every checksum is right" in said["verify"]
    assert len(list((place / "NIFTI").glob("*.nii.gz"))) == 8
    (program,) = blocks("store.md", "python")
    names: dict[str, np.ndarray] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, names)
    assert out.getvalue().startswith("sub-01 2.0 [[")
    store = Store("STORE")
    np.testing.assert_allclose(names["volumes"][:, store.mask(0)], store.values(0, 0, 5), rtol=1e-6)
    assert names["volumes"].shape == (5, 24, 24, 24)


def test_the_page_about_data(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    seen = []
    for program, *words in commands("data.md"):
        if program == "swift.data":
            run_data(words)
            if not Path("OTHER").exists():
                shutil.copytree("STORE", "OTHER")
            continue
        cfg = typed(small.composed(*words, "data.workers=0", *SIZE[program]))
        if cfg.data.name != "store":
            assert is_on(cfg.data.augment)
            continue
        data = ClipDataModule(cfg.data, cfg.data.path or "unused", cfg.seed)
        for packed in islice(data.train_dataloader(), 2):
            assert data.dense(packed)["bold"].shape == (1, 1, 24, 24, 24, 20)
        subjects = {data.store.scans[s].subject for s in data.train_index.scan}
        seen.append((len(subjects), int(data.train_index.length.sum()), data.split_hash is not None))
    # 64 frames: 24 for training before the gap and the held-out part.
    assert seen[0] == (4, 96, False)
    assert [split for _, _, split in seen] == [False, True, True, False, False, False, False]
    assert seen[4] == (2, 48, False)
    assert (seen[5][0], seen[5][1] <= 60) == (2, True)

"""A run that an older swift began and was killed in goes on under this one, and ends as that swift ended it.

The archive was made by revision 99ce82c, before the folders of today: `store` and `run` (killed after the checkpoint of
step 4) and `expected`, the same run undisturbed, of six steps.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from swift.config.compose import load_frozen
from tests.runs import shell, weights
from tests.small import metrics

ARCHIVE = Path(__file__).parent / "data" / "run_of_revision_99ce82c.tar.gz"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    done = shell(folder, "resume=run")
    assert done.returncode == 0, done.stderr
    return folder


def test_it_ends_with_the_weights_of_the_undisturbed_run(resumed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(resumed)
    found, expected = weights(resumed / "run"), weights(resumed / "expected")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Other processors and versions of torch may round otherwise.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_and_with_its_numbers(resumed: Path) -> None:
    found, expected = metrics(resumed / "run"), metrics(resumed / "expected")
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert (resumed / "run" / "summary.json").is_file()
    cfg = load_frozen(resumed / "run", [])
    assert (cfg.model.tokens, cfg.model.cohort, cfg.data.brain) == ("box", None, "scan")

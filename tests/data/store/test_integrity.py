"""Short forms of experiments/data_integrity: changed bytes and killed ingests."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.data.ingest.repair import repair
from swift.data.store.check import describe, verify
from swift.data.store.reader import Damage
from swift.utils.errors import UserError
from tests.data.stores import build, content
from tests.scripts import load


def test_a_few_flips_in_every_region() -> None:
    figures = load("data_integrity/flips.py").run(55, seed=1, scans=3)
    assert figures["wrong"] == []
    assert figures["found_named_and_mended"] + figures["without_effect"] == 55
    assert min(figures["by_region"].values()) == 5


def test_the_flips_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a verify that sees nothing, every round is counted as wrong."""
    flips = load("data_integrity/flips.py")
    monkeypatch.setattr(flips, "verify", lambda store: [])
    assert len(flips.run(8, seed=1, scans=3)["wrong"]) == 8


@pytest.mark.slow
def test_four_kills() -> None:
    figures = load("data_integrity/kills.py").run(4, cli=0, seed=2)
    assert figures["wrong"] == []
    assert figures["kills"] == 4


def test_the_lists_are_mended_from_a_replica(tmp_path: Path) -> None:
    store, replica = build(tmp_path / "a", [0, 1, 2]), build(tmp_path / "b", [0, 1, 2])
    before = content(store)
    (store / "store.json").write_text((store / "store.json").read_text().replace('"spacing": 2.0', '"spacing": 3.0'))
    with pytest.raises(UserError, match=r"store\.json: differs from its own checksum"):
        verify(store)
    assert repair(store, replica=replica).fixed == [(Damage("", "", "store.json"), "replica")]
    assert describe(Damage("", "", "store.json")) == "store.json"
    manifest = store / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",22,", ",33,"))  # the age of the third
    (damage,) = verify(store)
    assert (damage.scan, damage.part) == ("sub-02_task-rest", "manifest")
    assert repair(store, replica=replica).fixed == [(damage, "replica")]
    manifest.unlink()
    repair(store, replica=replica)
    assert content(store) == before


def test_the_lists_of_another_store_are_not_taken(tmp_path: Path) -> None:
    store, other = build(tmp_path / "a", [0, 1, 2]), build(tmp_path / "b", [3, 4])
    (store / "store.json").write_text("{")
    with pytest.raises(UserError, match="not the description"):
        repair(store, replica=other)
    assert (store / "store.json").read_text() == "{"


def test_columns_may_be_added_to_a_manifest(tmp_path: Path) -> None:
    """Phenotypes that come later are no damage; those that were ingested must stay as they were."""
    store = build(tmp_path / "a", [0, 1])
    lines = (store / "manifest.csv").read_text().splitlines()
    (store / "manifest.csv").write_text("\n".join(f"{line},{x}" for line, x in zip(lines, ["iq", "99", "101"])) + "\n")
    assert verify(store) == []

"""Labels corrected at the source, by hand in the manifest, and people in doubt; export and back."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from swift.data.__main__ import main
from swift.data.ingest.bids import find
from swift.data.ingest.pipeline import Report, ingest
from swift.data.ingest.prepare import Recipe
from swift.data.store.check import verify
from swift.data.store.reader import Store
from tests.data import scans

RECIPE = Recipe(grid=(20, 20, 20), spacing=4.0)


def take(place: Path, store: Path) -> Report:
    found = find([place])
    return ingest(found.sources, store, RECIPE, notes=found.notes)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    root = scans.dataset(tmp_path / "d", subjects=2, frames=4)
    (root / "participants.tsv").write_text("participant_id\tage\tsite\nsub-01\t20\tA\nsub-02\t30\tA\n")
    assert take(root, tmp_path / "s").exit_code == 0
    return root, tmp_path / "s"


def manifest(store: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((store / "manifest.csv").read_text().splitlines()))


def test_corrected_and_new_columns_are_taken_and_said(
    made: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    root, store = made
    shards = {file.name: file.read_bytes() for file in (store / "shards").iterdir()}
    (root / "participants.tsv").write_text("participant_id\tage\tsite\tiq\nsub-01\t21\tA\t100\nsub-02\t30\tB\t\n")
    report = take(root, store)
    assert (report.relabelled, report.exit_code) == (2, 0)
    assert [(row["age"], row["site"], row["iq"]) for row in manifest(store)] == [("21", "A", "100"), ("30", "B", "")]
    assert "age 20 -> 21; iq new -> 100" in caplog.text
    assert "site A -> B" in caplog.text
    assert verify(store) == []  # the report says what was taken
    assert {file.name: file.read_bytes() for file in (store / "shards").iterdir()} == shards
    caplog.clear()
    assert take(root, store).relabelled == 0
    assert caplog.text == ""


def test_the_users_own_columns_stay_and_a_changed_value_is_named(
    made: tuple[Path, Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root, store = made
    lines = (store / "manifest.csv").read_text().splitlines()
    lines = [line + "," + ("score" if k == 0 else str(k)) for k, line in enumerate(lines)]
    lines[1] = lines[1].replace(",20,", ",25,")
    (store / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")  # as Excel saves it
    assert [scan.phenotypes["score"] for scan in Store(store).scans] == ["1", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(store), "--quiet"])
    assert ended.value.code == 0
    assert "changed: scan sub-01_ses-1_task-rest_run-1 in manifest.csv: age 25, ingested 20" in capsys.readouterr().out
    report = take(root, store)
    assert report.relabelled == 0
    assert "age 25 in manifest.csv kept, though 20 is given: changed there by hand" in caplog.text
    assert [(row["age"], row["score"]) for row in manifest(store)] == [("25", "1"), ("30", "2")]


def test_one_file_under_two_names_is_said_and_kept_together(
    made: tuple[Path, Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root, store = made
    for path in list((root / "sub-02").rglob("*")):
        if path.is_file():
            new = Path(str(path).replace("sub-02", "sub-09"))
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, new)
    report = take(root, store)
    words = "1 scans are in the store twice, byte for byte the same file under two names (sub-02_ses-1_task-rest_run-2"
    assert words in caplog.text
    assert any(words in note for note in report.notes)
    assert json.loads((store / "ingest_report.json").read_text())["notes"] == report.notes
    with pytest.raises(SystemExit):
        main(["info", str(store)])
    assert words in capsys.readouterr().out


def test_a_second_data_set_with_the_same_names(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, store = made
    other = scans.dataset(tmp_path / "other", subjects=1, frames=5)
    (row,) = [one for one in take(other, store).results if one.status == "changed"]
    assert "another scan of this name, from" in row.reason
    assert "--prefix" in row.reason


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scans.dataset(tmp_path / "d", subjects=2, frames=4)
    gone = next((root / "sub-02").rglob("*_bold.nii.gz"))
    gone.unlink()
    gone.symlink_to("../.git/annex/gone.nii.gz")
    with pytest.raises(SystemExit) as ended:
        main(["ingest", str(root), "--out", str(tmp_path / "s"), "--grid", "20", "--spacing", "4", "--workers", "1"])
    assert ended.value.code == 1
    assert "1 added, 0 there already, 0 changed, 1 failed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "s" / "ingest_report.json").read_text())["scans"]
    assert [(row["subject"], row["status"]) for row in rows] == [("sub-01", "added"), ("sub-02", "failed")]
    assert "datalad get" in rows[1]["reason"]


def test_a_guess_is_a_note_of_the_scan_and_of_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("7_rest1", "7_rest2"):
        scans.save(tmp_path / "f" / f"{name}.nii.gz", scans.bold(4))
        scans.save(tmp_path / "f" / f"{name}_mask.nii.gz", scans.ellipsoid(), dtype=np.uint8)
    with pytest.raises(SystemExit):
        main(["ingest", str(tmp_path / "f"), "--out", str(tmp_path / "s"), "--grid", "20", "--spacing", "4", "--quiet"])
    assert "2 scans name no subject" in caplog.text
    assert "7_rest1 and 7_rest2 may be one person" in caplog.text
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "s"), "--scans"])
    told = capsys.readouterr().out
    assert "note: 2 scans name no subject" in told
    assert "  note: subject 7_rest2: a guess, the name of the file" in told


def test_export_and_ingest_are_inverse(tmp_path: Path) -> None:
    root = scans.dataset(tmp_path / "d", subjects=2, frames=6)
    (root / "sub-01" / "ses-1" / "func" / "sub-01_ses-1_task-rest_run-1_events.tsv").write_text(
        "onset\tduration\ttrial_type\n1\t2\tgo\n"
    )
    (root / "task-rest_bold.json").write_text('{"StartTime": 0.5}')
    take(root, tmp_path / "a")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "nii")])
    assert take(tmp_path / "nii", tmp_path / "b").exit_code == 0
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    assert [(s.scan_id, s.subject, s.session, s.task, s.run, s.site, s.tr, s.phenotypes) for s in a.scans] == [
        (s.scan_id, s.subject, s.session, s.task, s.run, s.site, s.tr, s.phenotypes) for s in b.scans
    ]
    for place in range(2):
        assert a.events(place) == b.events(place)
        assert b.attributes(place)["start_time"] == a.attributes(place)["start_time"] == 0.5
        mine, theirs = a.confounds(place), b.confounds(place)
        assert list(mine) == list(theirs)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])
        np.testing.assert_array_equal(a.mask(place), b.mask(place))
        np.testing.assert_allclose(a.affine(place), b.affine(place), atol=1e-4)
        step = a.array(place, "scale")  # of the 16-bit codes, which are made twice
        first, second = a.values(place, 0, 6), b.values(place, 0, 6)
        assert (np.abs(first - second) <= 2 * step + 1e-3).all()

"""Subjects of a store for a split: travelling ones, columns of numbers, one person under two names."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from swift.data.__main__ import main
from swift.data.labels.splits import PARTS, load_split
from swift.data.labels.subjects import looks_continuous, people_of, same_person
from swift.data.store.format import ScanInfo
from swift.data.store.reader import StoreWriter
from swift.utils.errors import UserError
from tests.data.stores import GRID, scan


def info(subject: str, site: str = "", **phenotypes: str) -> ScanInfo:
    return ScanInfo(f"{subject}_{site}", subject, "", "", "", site, "00000.h5", 10, 5, 2.0, phenotypes)


def test_several_sites_are_a_stratum_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "swift"):
        people = people_of([info("a", "X"), info("a", "Y"), info("b", "X"), info("b", ""), info("c")])
    assert [(person.subject, person.site) for person in people] == [("a", "several sites"), ("b", "X"), ("c", "")]
    assert "1 subjects have scans of several sites, a stratum of their own: a" in caplog.text
    with pytest.raises(UserError, match="subject a has two values of label"):
        people_of([info("a", dx="0"), info("a", dx="1")], label="dx")


def test_a_column_of_many_numbers_is_continuous(caplog: pytest.LogCaptureFixture) -> None:
    assert looks_continuous([str(n) for n in range(11)] * 5)
    assert looks_continuous(["20.5", "31", "28", "", "44", "50", "33", "70"])
    assert not looks_continuous([str(n % 5) for n in range(50)])
    assert not looks_continuous([f"site{n}" for n in range(50)])
    assert not looks_continuous(["1", "2", "3", "4", "5"])
    scans = [info(f"{n:02d}", age=str(20 + n)) for n in range(20)]
    with caplog.at_level(logging.INFO, "swift"):
        people = people_of(scans, label="age", continuous=None)
    assert [person.label for person in people] == [str(n // 4) for n in range(20)]
    assert "--label age: 20 different numbers, taken as continuous" in caplog.text
    assert people_of(scans, label="age")[3].label == "23"


def test_one_person_under_two_names() -> None:
    names = ["sub-01", "01", "sub-001", "sub-MGH-001", "mgh001", "sub-02", "sub-11-1", "sub-1-11", "100"]
    found = same_person(names, {"x": {"sub-02", "100"}, "y": {"01"}, "": {"a", "b"}})
    assert list(found.values()) == [[{"100", "sub-02"}], [{"01", "sub-01", "sub-001"}, {"mgh001", "sub-MGH-001"}]]


def test_families_and_persons_are_joined() -> None:
    scans = [info(name, fam=family) for name, family in zip("abcdef", ["F", "F", "", "G", "", ""], strict=True)]
    family = {p.subject: p.family for p in people_of(scans, family="fam", together=[{"b", "c"}, {"e", "f"}])}
    assert family["a"] == family["b"] == family["c"] != ""
    assert family["e"] == family["f"] not in ("", family["a"])
    assert family["d"] == "G"


def test_the_command_keeps_one_person_in_one_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subjects = ["s1", "s2", "s3", "s4", "s5", "S05"]
    with StoreWriter(tmp_path / "s", GRID, 2.0) as writer:
        for number, subject in enumerate(subjects):
            header, mask, bold = scan(number)
            digest = "same" if subject in ("s1", "s3") else f"{number}"
            writer.add(dataclasses.replace(header, subject=subject, source_sha256=digest), mask, bold)
    for seed in range(6):
        split = tmp_path / f"{seed}.json"
        with pytest.raises(SystemExit) as status:
            main(
                [
                    "split",
                    str(tmp_path / "s"),
                    "--out",
                    str(split),
                    "--val",
                    "0.3",
                    "--test",
                    "0.3",
                    "--seed",
                    str(seed),
                ]
            )
        assert status.value.code == 0
        parts = load_split(str(split)).parts
        assert sorted(name for part in PARTS for name in parts[part]) == sorted(subjects)
        for pair in ({"s1", "s3"}, {"s5", "S05"}):
            assert sum(bool(pair & set(parts[part])) for part in PARTS) == 1
    assert "the same file (source_sha256) is a scan of s1 = s3: kept in one part" in caplog.text
    assert "one person in two spellings may be S05 = s5: kept in one part" in caplog.text
    assert "2 of 2 strata (label, site) have too few subjects for shares of 0.3, 0.3: merged" in caplog.text


def test_a_file_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(b"\x1f\x8b" * 1000)
    with pytest.raises(SystemExit) as status:
        main(["split", str(tmp_path / "scan.nii.gz"), "--out", str(tmp_path / "x.json")])
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert said.strip().endswith("scan.nii.gz: a file, not the folder of a swift store")
    assert said.count("\n") == 1

"""Which files are scans and whose they are: links, unreadable folders, labels, spellings, choices, participants."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from swift.data.ingest import tree as tree_module
from swift.data.ingest.bids import find, find_sources
from swift.data.ingest.sources import Choice, Source, parse_choice
from swift.utils.errors import UserError
from tests.data.ingest.trees import fmriprep, make

BOLD = "space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"


def ids(sources: list[Source]) -> list[str]:
    return [source.scan_id for source in sources]


# ---------------------------------------------------------------------------------------------------- links, folders
def test_annexed_clone(tmp_path: Path) -> None:
    """Links into .git/annex: the content counts once, hidden folders are not searched; what is gone is named."""
    for number in ("01", "02", "03"):
        link = make(tmp_path, [f"sub-{number}/func/sub-{number}_task-rest_bold.nii.gz"]) / (
            f"sub-{number}/func/sub-{number}_task-rest_bold.nii.gz"
        )
        link.unlink()
        content = tmp_path / ".git" / "annex" / "objects" / f"MD5E-s1--{number}.nii.gz"
        if number != "03":
            content.parent.mkdir(parents=True, exist_ok=True)
            content.write_text(number)
        link.symlink_to(os.path.relpath(content, link.parent))
    found = find([tmp_path], Choice("folder"))
    assert [source.subject for source in found.sources] == ["sub-01", "sub-02", "sub-03"]
    assert [bool(source.problem) for source in found.sources] == [False, False, True]
    assert "datalad get" in found.sources[2].problem


@pytest.mark.parametrize("what", ["desc-brain_mask.nii.gz", "desc-preproc_bold.json"])
def test_what_belongs_to_a_scan_and_leads_nowhere_fails_it(what: str, tmp_path: Path) -> None:
    root = fmriprep(tmp_path)
    beside = root / "sub-01" / "func" / f"sub-01_task-rest_space-MNI152NLin2009cAsym_{what}"
    beside.unlink(missing_ok=True)
    beside.symlink_to("../../.git/annex/gone")
    first, second = find_sources([root])
    assert beside.name in first.problem
    assert "leads nowhere" in first.problem
    assert second.problem == ""


def test_events_that_lead_nowhere_are_left_out_and_said(tmp_path: Path) -> None:
    root = fmriprep(tmp_path, ["01"])
    (root / "sub-01" / "func" / "sub-01_task-rest_events.tsv").symlink_to("gone")
    (source,) = find_sources([root])
    assert (source.events, source.problem) == (None, "")
    assert "events left out" in source.notes[0]


def test_linked_folders_are_entered_and_counted_once(tmp_path: Path) -> None:
    real = fmriprep(tmp_path / "real", ["01", "02", "03"])
    for made_by in ("fMRIPrep", None):
        root = make(tmp_path / f"set-{made_by}", [], made_by)
        shutil.copytree(real / "sub-01", root / "sub-01")
        (root / "sub-02").symlink_to(real / "sub-02")
        (root / "sub-03").mkdir()
        (root / "sub-03" / "func").symlink_to(real / "sub-03" / "func")
        (root / "all").symlink_to(root)  # a loop
        found = find([root])
        assert [source.subject for source in found.sources] == ["sub-01", "sub-02", "sub-03"]
        assert any("linked folders are listed already" in note for note in found.notes)


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fmriprep(tmp_path)
    real = os.scandir

    def deny(path: str) -> object:
        if str(path).endswith("sub-02"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(tree_module.os, "scandir", deny)
    good, bad = find_sources([root])
    assert (good.subject, good.problem) == ("sub-01", "")
    assert bad.problem == f"{root}/sub-02: the folder cannot be read (Permission denied)"
    assert find_sources([root], task="rest")[1].problem == bad.problem


def test_one_file_under_two_names_is_one_scan(tmp_path: Path) -> None:
    make(tmp_path, ["sub-01/a.nii.gz"])
    (tmp_path / "sub-02").mkdir()
    os.link(tmp_path / "sub-01" / "a.nii.gz", tmp_path / "sub-02" / "a.nii.gz")
    found = find([tmp_path])
    assert ids(found.sources) == ["sub-01_a"]
    assert any("two subjects" in note and "sub-01 and sub-02" in note for note in found.notes)


# ------------------------------------------------------------------------------------------------------- whose is it
def test_hyphens_in_labels(tmp_path: Path) -> None:
    names = [f"sub-{s}/func/sub-{s}_task-rest_run-{r}_{BOLD}" for s in ("MGH-001", "MGH-002") for r in "12"]
    root = make(tmp_path / "d", names, "fMRIPrep")
    for inputs, layout in (([root], "auto"), ([root], "folder"), ([root / name for name in names], "auto")):
        found = find(inputs, Choice(layout))
        assert [source.subject for source in found.sources] == ["sub-MGH-001"] * 2 + ["sub-MGH-002"] * 2
    assert "2 subjects have a hyphen" in find([root]).notes[0]
    assert find([root]).sources[0].scan_id == "sub-MGH-001_task-rest_run-1"


def test_subject_folder_anywhere_in_a_path(tmp_path: Path) -> None:
    make(tmp_path, [f"study/sub-{s}/ses-{k}/func/bold.nii.gz" for s in ("01", "02") for k in "12"])
    found = find([tmp_path])
    assert [source.subject for source in found.sources] == ["sub-01", "sub-01", "sub-02", "sub-02"]
    assert found.notes == []
    (one,) = find([tmp_path / "study" / "sub-02" / "ses-1"]).sources
    assert one.subject == "sub-02"
    assert one.notes == ("subject sub-02: the name of a folder above the one that was given",)
    assert find([tmp_path / "study" / "sub-02"]).notes == []


def test_guesses_are_said(tmp_path: Path) -> None:
    make(tmp_path / "flat", ["001_rest1.nii.gz", "001_rest2.nii.gz"])
    found = find([tmp_path / "flat"])
    assert [source.notes for source in found.sources] == [
        (f"subject {name}: a guess, the name of the file",) for name in ("001_rest1", "001_rest2")
    ]
    assert "001_rest1 and 001_rest2 may be one person" in found.notes[0]
    make(tmp_path / "deep", ["s1/rest.nii.gz", "s2/rest.nii.gz"])
    found = find([tmp_path / "deep"])
    assert [source.subject for source in found.sources] == ["s1", "s2"]
    assert "the name of the folder is taken" in found.notes[0]


def test_name_and_folder_of_two_subjects(tmp_path: Path) -> None:
    make(tmp_path, [f"sub-02/func/sub-01_task-rest_{BOLD}"], "fMRIPrep")
    (source,) = find_sources([tmp_path])
    assert "the name says sub-01, the folder sub-02" in source.problem


def test_two_data_sets_with_a_sub_01_each(tmp_path: Path) -> None:
    a, b = fmriprep(tmp_path / "a", ["01"]), make(tmp_path / "b", [f"sub-01/func/sub-01_task-nback_{BOLD}"], "fMRIPrep")
    found = find([a, b])
    assert any("1 subjects are in several data sets (sub-01" in note and "--prefix" in note for note in found.notes)
    mine = find([b], Choice(prefix="B-")).sources[0]
    assert (mine.subject, mine.scan_id) == ("B-sub-01", "B-sub-01_task-nback")


def test_two_spellings_are_said(tmp_path: Path) -> None:
    root = fmriprep(tmp_path, ["1", "01", "02"])
    assert any("differ in spelling only (sub-01 and sub-1)" in note for note in find([root]).notes)


# ------------------------------------------------------------------------------------------------ parts of a data set
def test_a_part_of_a_data_set_finds_what_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fmriprep(tmp_path / "d")
    (root / "task-rest_bold.json").write_text("{}")
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\nsub-02\t40\n")
    whole = find_sources([root])
    assert find_sources([root / "sub-01"]) == whole[:1]
    assert find_sources(sorted((root / "sub-02" / "func").glob("*_bold.nii.gz"))) == whole[1:]
    monkeypatch.chdir(root / "sub-01")
    assert find_sources([Path()]) == whole[:1]
    assert find_sources([Path("func") / whole[0].path.name]) == whole[:1]
    assert whole[0].phenotypes == {"age": "30"}
    assert whole[0].sidecars == (root / "task-rest_bold.json",)


def test_files_of_one_name_in_two_folders_are_two_scans(tmp_path: Path) -> None:
    make(tmp_path, ["s1/rest.nii.gz", "s2/rest.nii.gz", "s1/rest_mask.nii.gz"])
    first, second = find_sources([tmp_path / "s1" / "rest.nii.gz", tmp_path / "s2" / "rest.nii.gz"])
    assert (first.scan_id, first.subject, second.scan_id, second.subject) == ("s1_rest", "s1", "s2_rest", "s2")
    assert first.mask == tmp_path / "s1" / "rest_mask.nii.gz"


def test_events_of_the_raw_data_set(tmp_path: Path) -> None:
    make(tmp_path, ["sub-01/func/sub-01_task-rest_events.tsv"], "scanner", kind="raw")
    root = fmriprep(tmp_path / "derivatives" / "fmriprep", ["01"])
    assert find_sources([root])[0].events == tmp_path / "sub-01" / "func" / "sub-01_task-rest_events.tsv"


def test_raw_series_are_not_taken_for_derivatives(tmp_path: Path) -> None:
    root = make(tmp_path, ["sub-01/func/sub-01_task-rest_bold.nii.gz"], "scanner", kind="raw")
    with pytest.raises(UserError, match=r"no \*_desc-preproc_bold.*1 not taken: raw, not preprocessed"):
        find([root])
    make(root / "derivatives" / "f", [f"sub-01/func/sub-01_task-rest_{BOLD}"], "fMRIPrep")
    assert [source.tool for source in find([root]).sources] == ["fMRIPrep"]


# ------------------------------------------------------------------------------------------------------------ choices
def test_any_entity_chooses_and_what_does_nothing_is_refused(tmp_path: Path) -> None:
    names = [f"sub-01/func/sub-01_task-rest_acq-{a}_dir-{d}_run-01_reg-{g}_desc-preproc_bold.nii.gz"
             for a in ("x", "y") for d in ("AP", "PA") for g in ("a", "b")]  # fmt: skip
    root = make(tmp_path / "d", names, "C-PAC")

    def chosen(**entities: str) -> list[str]:
        return [source.path.name for source in find_sources([root], **entities)]

    assert chosen(acq="x", dir="PA", reg="b", run="1") == [Path(names[3]).name]
    with pytest.raises(UserError, match=r"--acq z: no scan of .*; there are x, y"):
        chosen(acq="z")
    with pytest.raises(UserError, match=r"--echo 1: no scan of .* names its echo, so there is no choice"):
        chosen(echo="1")
    with pytest.raises(UserError, match=r"--desc denoised: no series of .*; there are preproc"):
        chosen(desc="denoised")


def test_space_as_fmriprep_writes_it() -> None:
    assert parse_choice({"space": ["MNI152NLin6Asym:res-2"]}) == {"space": ("MNI152NLin6Asym",), "res": ("2",)}
    with pytest.raises(UserError, match="SPACE:res-2"):
        parse_choice({"space": ["a:b"]})


def test_options_and_a_plain_folder(tmp_path: Path) -> None:
    """--task chooses there too, --space names, --participants counts or is refused."""
    root = make(tmp_path / "r", [f"sub-01/sub-01_task-{task}_bold.nii.gz" for task in ("rest", "nback")])
    (source,) = find_sources([root], layout="folder", task="rest", space="MNI152NLin6Asym")
    assert (source.task, source.space) == ("rest", "MNI152NLin6Asym")
    assert source.notes == ("space MNI152NLin6Asym as told by --space",)
    with pytest.raises(
        UserError, match=r"--space MNI152NLin2009: sub-01_\S+ does not name its space, and known are MNI, "
    ):
        find_sources([root], layout="folder", space="MNI152NLin2009")
    people = tmp_path / "p.tsv"
    people.write_text("participant_id\tage\nsub-01\t44\n")
    assert [one.phenotypes for one in find_sources([root], participants=people)] == [{"age": "44"}] * 2
    people.write_text("participant_id\tage\nsub-09\t44\n")
    with pytest.raises(UserError, match="no line is of a subject that is here"):
        find_sources([root], participants=people)


# ------------------------------------------------------------------------------------------------------- participants
@pytest.mark.parametrize(
    ("lines", "ages", "said"),
    [
        ("01\t30\n02\t40\n", ["30", "40"], ""),
        ("1\t30\n2\t40\n", ["30", "40"], "2 lines matched by number (1 for sub-01, 2 for sub-02)"),
        (
            "sub-01\t30\n3\t9\n",
            ["30", ""],
            "1 of 2 subjects have no line (sub-02); 1 of 2 participants belong to no scan",
        ),
        ("1\t30\n001\t31\nsub-02\t40\n", ["", "40"], "1 of 2 subjects have no line"),
    ],
)
def test_participants_are_matched_or_said(lines: str, ages: list[str], said: str, tmp_path: Path) -> None:
    root = fmriprep(tmp_path)
    (root / "participants.tsv").write_bytes(
        b"\xef\xbb\xbf" + ("participant_id\tage\n" + lines).replace("\n", "\r\n").encode()
    )
    found = find([root])
    assert [source.phenotypes.get("age", "") for source in found.sources] == ages
    assert said in " ".join(found.notes)
    assert bool(found.notes) == bool(said)


# ------------------------------------------------------------------------------------------------------------- tables
def test_columns_of_a_table(tmp_path: Path) -> None:
    make(tmp_path, ["x/1.nii.gz", "x/2.nii.gz"])
    table = tmp_path / "t.csv"
    table.write_bytes(
        b"\xef\xbb\xbf"
        b"path;participant_id;session_id;space;start_time;age\r\nx/1.nii.gz;p0;1;MNI152NLin6Asym;0.5;30\r\n"
        b"x/2.nii.gz;p0;2;;;31\r\n"
    )
    first, second = find_sources([table])
    assert (first.subject, first.session, first.scan_id) == ("p0", "1", "p0_1")
    assert (first.space, first.start_time, first.phenotypes) == ("MNI152NLin6Asym", 0.5, {"age": "30"})
    assert (second.subject, second.space, second.start_time) == ("p0", None, None)
    table.write_text("path,subject,participant_id\nx/1.nii.gz,a,b\n")
    with pytest.raises(UserError, match="subject and participant_id say the same thing"):
        find_sources([table])
    table.write_text("path,eid\nx/1.nii.gz,7\n")
    assert "name no subject" in find([table]).notes[0]
    table.write_text("path,subject,mask\nx/1.nii.gz,a,m.nii.gz\nx/9.nii.gz,b,\n")
    problems = [source.problem for source in find_sources([table])]
    assert "m.nii.gz of t.csv, line 2, is not there" in problems[0]
    assert "9.nii.gz: no such file" in problems[1]

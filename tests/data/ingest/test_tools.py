"""Every row of swift.data.ingest.tools: which of a tool's files are scans, their masks, and what is not taken."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from swift.data.__main__ import main
from swift.data.ingest.bids import find
from swift.data.ingest.sources import Choice
from swift.utils.errors import UserError
from tests.data.ingest.trees import make

MNI = "space-MNI152NLin6Asym"


@dataclass
class Row:
    """A tree and what is right of it."""

    files: list[str]
    scans: dict[str, tuple[str, str, str]]
    """scan_id -> file, subject, mask ("" none)."""
    made_by: str | None = None
    not_taken: dict[str, int] = field(default_factory=dict)
    """A word of the reason -> number of files."""
    taken_for: str = ""
    chosen: dict[str, tuple[str, ...]] = field(default_factory=dict)


def run(subject: str, rest: str, task: str = "rest") -> str:
    return f"sub-{subject}/func/sub-{subject}_task-{task}_{rest}"


ROWS = {
    "fMRIPrep --me-output-echos": Row(
        [
            *(run("01", f"echo-{k}_desc-preproc_bold.nii.gz") for k in (1, 2, 3)),
            run("01", "desc-preproc_bold.nii.gz"), run("01", "desc-brain_mask.nii.gz"),
            run("01", f"{MNI}_boldref.nii.gz"), "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        ],
        {"sub-01_task-rest": (run("01", "desc-preproc_bold.nii.gz"), "sub-01", run("01", "desc-brain_mask.nii.gz"))},
        "fMRIPrep", {"single echoes": 3}, "fMRIPrep, desc-preproc",
    ),
    "fMRIPrep, one echo asked for": Row(
        [*(run("01", f"echo-{k}_desc-preproc_bold.nii.gz") for k in (1, 2)), run("01", "desc-preproc_bold.nii.gz")],
        {"sub-01_task-rest_echo-2": (run("01", "echo-2_desc-preproc_bold.nii.gz"), "sub-01", "")},
        "fMRIPrep", chosen={"echo": ("2",)},
    ),
    "fMRIPrep, two resolutions": Row(
        [run("01", f"{MNI}_res-{r}_desc-{d}.nii.gz") for r in "12" for d in ("preproc_bold", "brain_mask")],
        {"sub-01_task-rest": (run("01", f"{MNI}_res-2_desc-preproc_bold.nii.gz"), "sub-01",
                              run("01", f"{MNI}_res-2_desc-brain_mask.nii.gz"))},
        "fMRIPrep", chosen={"res": ("2",)},
    ),
    "fMRIPrep with CIFTI beside": Row(
        [run("01", f"{MNI}_desc-preproc_bold.nii.gz"), run("01", "space-fsLR_den-91k_bold.dtseries.nii")],
        {"sub-01_task-rest": (run("01", f"{MNI}_desc-preproc_bold.nii.gz"), "sub-01", "")},
        "fMRIPrep", {"CIFTI": 1},
    ),
    "fMRIPrep before 1.2": Row(
        ["sub-01/func/sub-01_task-rest_bold_space-T1w_preproc.nii.gz",
         "sub-01/func/sub-01_task-rest_bold_space-T1w_brainmask.nii.gz"],
        {"sub-01_task-rest": ("sub-01/func/sub-01_task-rest_bold_space-T1w_preproc.nii.gz", "sub-01",
                              "sub-01/func/sub-01_task-rest_bold_space-T1w_brainmask.nii.gz")},
    ),
    "XCP-D": Row(
        [
            *(run("01", f"run-{k}_{MNI}_desc-{d}_bold.nii.gz") for k in "12" for d in ("denoised", "denoisedSmoothed")),
            run("01", f"{MNI}_desc-denoised_bold.nii.gz"), run("01", f"run-1_{MNI}_stat-alff_boldmap.nii.gz"),
        ],
        {f"sub-01_task-rest_run-{k}": (run("01", f"run-{k}_{MNI}_desc-denoised_bold.nii.gz"), "sub-01", "")
         for k in "12"},
        "XCP-D", {"joined": 1, "desc-denoisedSmoothed": 2}, "XCP-D, desc-denoised",
    ),
    "C-PAC": Row(
        [run("01", "run-1_space-template_reg-36Parameter_desc-preproc_bold.nii.gz"),
         run("01", "run-1_space-template_desc-bold_mask.nii.gz")],
        {"sub-01_task-rest_run-1": (run("01", "run-1_space-template_reg-36Parameter_desc-preproc_bold.nii.gz"),
                                    "sub-01", run("01", "run-1_space-template_desc-bold_mask.nii.gz"))},
        "C-PAC", taken_for="C-PAC, desc-preproc",
    ),
    "tedana": Row(
        ["sub-01/desc-denoised_bold.nii.gz", "sub-01/desc-optcom_bold.nii.gz", "sub-01/desc-ICA_components.nii.gz",
         "sub-01/desc-adaptiveGoodSignal_mask.nii.gz"],
        {"sub-01": ("sub-01/desc-denoised_bold.nii.gz", "sub-01", "")},
        "tedana", {"desc-optcom": 1}, "tedana, desc-denoised",
    ),
    "label-brain_mask": Row(
        [run("01", f"{MNI}_desc-preproc_bold.nii.gz"), run("01", f"{MNI}_label-brain_mask.nii.gz"),
         run("01", f"{MNI}_label-GM_mask.nii.gz")],
        {"sub-01_task-rest": (run("01", f"{MNI}_desc-preproc_bold.nii.gz"), "sub-01",
                              run("01", f"{MNI}_label-brain_mask.nii.gz"))},
        "something else",
    ),
    "HCP": Row(
        [f"100307/MNINonLinear/Results/rfMRI_REST1_{d}/{name}.nii.gz" for d in ("LR", "RL") for name in
         (f"rfMRI_REST1_{d}", f"rfMRI_REST1_{d}_hp2000_clean", "brainmask_fs.2", f"rfMRI_REST1_{d}_SBRef")]
        + ["100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR_Atlas.dtseries.nii",
           "100307/MNINonLinear/T1w.nii.gz"],
        {f"100307_rfMRI_REST1_{d}": (
            f"100307/MNINonLinear/Results/rfMRI_REST1_{d}/rfMRI_REST1_{d}_hp2000_clean.nii.gz", "100307",
            f"100307/MNINonLinear/Results/rfMRI_REST1_{d}/brainmask_fs.2.nii.gz") for d in ("LR", "RL")},
        None, {"HCP pipelines": 6}, "HCP pipelines: 2 runs",
    ),
    "HCP lifespan, two visits": Row(
        [f"HCA6002236_{v}_MR/MNINonLinear/Results/rfMRI_REST/rfMRI_REST.nii.gz" for v in ("V1", "V2")],
        {f"HCA6002236_{v}_rfMRI_REST": (
            f"HCA6002236_{v}_MR/MNINonLinear/Results/rfMRI_REST/rfMRI_REST.nii.gz", "HCA6002236", "")
         for v in ("V1", "V2")},
    ),
    "UK Biobank": Row(
        [f"1000001_20227_{i}_0/fMRI/{name}" for i in "23" for name in
         ("rfMRI.ica/filtered_func_data_clean.nii.gz", "rfMRI.ica/mask.nii.gz", "rfMRI.ica/mean_func.nii.gz",
          "rfMRI.nii.gz")],
        {f"1000001_{i}_rfMRI": (f"1000001_20227_{i}_0/fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz", "1000001",
                                f"1000001_20227_{i}_0/fMRI/rfMRI.ica/mask.nii.gz") for i in "23"},
        None, {"UK Biobank": 4}, "UK Biobank: 2 runs",
    ),
    "FSL FEAT": Row(
        ["sub-07/faces.feat/filtered_func_data.nii.gz", "sub-07/faces.feat/mask.nii.gz",
         "sub-07/faces.feat/stats/zstat1.nii.gz"],
        {"sub-07_faces": ("sub-07/faces.feat/filtered_func_data.nii.gz", "sub-07", "sub-07/faces.feat/mask.nii.gz")},
        None, {"FSL": 1}, "FSL (FEAT, MELODIC): 1 runs",
    ),
    "raw series in a plain folder": Row(
        ["sub-01/func/sub-01_task-rest_bold.nii.gz", "sub-01/func/sub-01_task-rest_sbref.nii.gz",
         "sub-01/func/sub-01_task-rest_part-phase_bold.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz"],
        {"sub-01_func_sub-01_task-rest_bold": ("sub-01/func/sub-01_task-rest_bold.nii.gz", "sub-01", "")},
        None, {"sbref": 1, "part-phase": 1, "T1w": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    root = make(tmp_path / "t", row.files, row.made_by)
    found = find([root], Choice(entities=row.chosen))
    got = {
        source.scan_id: (
            str(source.path.relative_to(root)),
            source.subject,
            str(source.mask.relative_to(root)) if source.mask else "",
        )
        for source in found.sources
    }
    assert got == row.scans
    assert not [source.problem for source in found.sources if source.problem]
    for word, count in row.not_taken.items():
        assert sum(len(paths) for reason, paths in found.passed.items() if word in reason) == count, (
            word,
            found.passed,
        )
    assert row.taken_for in found.kinds[0]


def test_cifti_alone_says_which_option_gives_a_volume(tmp_path: Path) -> None:
    root = make(tmp_path, [run("01", "space-fsLR_den-91k_bold.dtseries.nii")], "fMRIPrep")
    with pytest.raises(UserError, match=r"1 series are CIFTI .*--output-spaces MNI152NLin6Asym:res-2"):
        find([root])


def test_side_files_of_tools(tmp_path: Path) -> None:
    """UK Biobank's JSON lies a folder higher; HCP's space is known, that of a tool that says nothing is not."""
    ukb = make(tmp_path / "u", ["1000001_20227_2_0/fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz",
                                "1000001_20227_2_0/fMRI/rfMRI.json"])  # fmt: skip
    (source,) = find([ukb]).sources
    assert source.sidecars == (ukb / "1000001_20227_2_0/fMRI/rfMRI.json",)
    assert (source.session, source.task, source.space, source.tool) == ("2", "rfMRI", None, "UK Biobank")
    hcp = make(tmp_path / "h", ["100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz"])
    assert find([hcp]).sources[0].space == "MNI152NLin6Asym"
    assert find([hcp / "100307"]).sources[0].subject == "100307"  # the subject's own folder


def test_a_run_without_the_form_that_is_taken_is_named(tmp_path: Path) -> None:
    root = make(tmp_path, [run("01", "desc-denoised_bold.nii.gz"), run("02", "desc-optcom_bold.nii.gz")], "tedana")
    good, bad = find([root]).sources
    assert (good.scan_id, good.problem) == ("sub-01_task-rest", "")
    assert bad.scan_id == "sub-02_task-rest"
    assert "has no desc-denoised; --desc optcom takes this one" in bad.problem
    assert find([root], Choice(entities={"desc": ("optcom",)})).sources[0].subject == "sub-02"


def test_two_data_sets_below_one_folder_have_to_be_named(tmp_path: Path) -> None:
    for tool in ("fMRIPrep", "XCP-D"):
        make(tmp_path / "derivatives" / tool, [run("01", "desc-preproc_bold.nii.gz")], tool)
    make(tmp_path, [run("01", "bold.nii.gz")], "scanner", kind="raw")
    with pytest.raises(UserError, match=r"2 data sets of derivatives: .*XCP-D.*fMRIPrep.*name those"):
        find([tmp_path])
    found = find([tmp_path / "derivatives" / "fMRIPrep"])
    assert [source.scan_id for source in found.sources] == ["sub-01_task-rest"]


def test_list_shows_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = ROWS["XCP-D"]
    root = make(tmp_path / "x", row.files, row.made_by)
    with pytest.raises(SystemExit) as ended:
        main(["ingest", str(root), "--list", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert (told["subjects"], told["runs"], told["masks"]) == (1, 2, 0)
    assert told["taken_for"] == [f"{root}: BIDS derivatives (XCP-D, desc-denoised)"]
    assert {len(paths) for paths in told["not_taken"].values()} == {1, 2}
    with pytest.raises(SystemExit):
        main(["ingest", str(root), "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "1 subjects, 2 runs, 0 brain masks"
    assert any(line.startswith("2 not taken: desc-denoisedSmoothed") for line in lines)

"""What is known of the programs that made a tree: which of its series is the scan, and which file is its mask.

The one place for such knowledge; every row is a test in tests/data/ingest/test_tools.py. Names are those of the
programs' own lists of outputs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BidsTool:
    """A program whose results are named as BIDS derivatives."""

    name: str
    made_by: str
    """Matched against GeneratedBy / Name of dataset_description.json, lower case."""
    series: tuple[str, ...]
    """desc- labels of the series that is the scan: the first one that the data set has is taken."""
    masks: tuple[tuple[str, str], ...] = (("desc", "brain"), ("label", "brain"))
    """Entity and label of the brain mask, best first."""
    joins_runs: bool = False
    """Also writes a file without run- that holds all runs one after the other."""


BIDS_TOOLS = (
    # Also --me-output-echos: echo-1, echo-2, ... beside the combined series.
    BidsTool("fMRIPrep", r"fmriprep|nibabies", ("preproc",)),
    # Mean removed, no mask and no boldref beside it. 0.1 to 0.2: residual.
    BidsTool("XCP-D", r"xcp", ("denoised", "residual"), joins_runs=True),
    # reg- names the nuisance regression.
    BidsTool(
        "C-PAC", r"c-?pac", ("preproc", "cleaned"), masks=(("desc", "bold"), ("desc", "brain"), ("label", "brain"))
    ),
    # desc-ICA_components, desc-ICAOrth_mixing and the like are no series; optcom is the one before denoising.
    BidsTool("tedana", r"tedana", ("denoised", "optcomDenoised", "optcom")),
    BidsTool("BIDS derivatives", r"", ("preproc", "denoised", "optcom")),
)
"""The last row is for any other program."""


@dataclass(frozen=True)
class FolderTool:
    """A program with folders of its own, without BIDS names.

    `folder` is matched against the scan's folder with / between the parts; its groups `sub`, `ses`, `task`, `run` name
    the scan.
    """

    name: str
    folder: str
    series: tuple[str, ...]
    """Patterns of whole file names, the best first: one folder's matches are one scan. {task} is the folder's own."""
    masks: tuple[str, ...]
    sidecar: str = ""
    """JSON with RepetitionTime, from the scan's folder."""
    space: str | None = None


FOLDER_TOOLS = (
    FolderTool(
        "HCP pipelines",
        r"(?:.*/)?(?P<sub>[^/]+?)(?:_(?P<ses>V\d+)(?:_MR)?)?/MNINonLinear/Results/(?P<task>[^/]+)",
        (
            r"{task}_hp\d+_clean_rclean_tclean\.nii\.gz",
            r"{task}_hp\d+_clean_tclean\.nii\.gz",
            r"{task}_hp\d+_clean\.nii\.gz",
            r"{task}\.nii\.gz",
        ),
        ("brainmask_fs.2.nii.gz", "brainmask_fs.nii.gz", "{task}_finalmask.nii.gz"),
        space="MNI152NLin6Asym",  # FSL's MNI152, which the pipelines register to
    ),
    FolderTool(
        "UK Biobank",
        r"(?:.*/)?(?P<sub>\d{7})_\d{5}_(?P<ses>\d+)_\d+/fMRI/(?P<task>[rt]fMRI)\.(?:ica|feat)",
        (r"filtered_func_data_clean\.nii(?:\.gz)?", r"filtered_func_data\.nii(?:\.gz)?"),
        ("mask.nii.gz",),
        sidecar="../{task}.json",
    ),
    FolderTool(
        "FSL (FEAT, MELODIC)",
        r"(?:(?:.*/)?(?P<sub>[^/]+)/)?(?P<task>[^/]+)\.(?:ica|feat)",
        (r"filtered_func_data_clean\.nii(?:\.gz)?", r"filtered_func_data\.nii(?:\.gz)?"),
        ("mask.nii.gz",),
    ),
)
INSIDE = re.compile(r"(?:^|/)(?:MNINonLinear|T1w|fMRI|[^/]+\.(?:ica|feat))(?:/|$)")
"""Folders of these programs, in which nothing else is a scan (raw series, means, reference volumes, maps)."""


def bids_tool(root: Path) -> BidsTool:
    """The program that made a BIDS data set, by its dataset_description.json."""
    for made_by in _generators(root):
        for tool in BIDS_TOOLS[:-1]:
            if re.search(tool.made_by, made_by.lower()):
                return tool
    return BIDS_TOOLS[-1]


def is_derivative(root: Path) -> bool:
    """Whether a data set says of itself that it is derived; BIDS: one that says nothing is raw."""
    return str(describe(root).get("DatasetType", "")).lower() == "derivative" or bool(_generators(root))


def describe(root: Path) -> dict[str, object]:
    """dataset_description.json, or {} where it is not there or not readable."""
    try:
        content = json.loads((root / "dataset_description.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _generators(root: Path) -> list[str]:
    content = describe(root)
    made = content.get("GeneratedBy", content.get("PipelineDescription", []))
    entries = made if isinstance(made, list) else [made]
    return [str(entry.get("Name", "")) for entry in entries if isinstance(entry, dict)]

"""The BOLD series of BIDS derivatives, one a run, with what belongs to each.

https://bids-specification.readthedocs.io (file names, inheritance principle, derivatives).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from swift.data.ingest.folder import NOT_MAGNITUDE, is_mask_name, one_file, without_echoes
from swift.data.ingest.inherit import NIFTI, Relatives
from swift.data.ingest.names import SUFFIXES, Name, is_surface, parse_name
from swift.data.ingest.sources import Choice, Found, Source, scan_name, subject_label
from swift.data.ingest.tools import BidsTool, bids_tool, is_derivative
from swift.data.ingest.tree import Tree
from swift.utils.errors import UserError

SERIES = re.compile(
    r".*_desc-[^_]+_bold\.nii(?:\.gz)?|desc-[^_]+_bold\.nii(?:\.gz)?|.*_bold_(?:space-[^_]+_)?preproc\.nii(?:\.gz)?"
)
"""Names by which a folder is known as BIDS derivatives."""


def dataset_above(folder: Path) -> Path | None:
    """The BIDS data set that a folder of one subject (or a part of it) lies in."""
    here = Path(os.path.abspath(folder))
    if not any(re.fullmatch(r"sub-[^_]+", part) for part in here.parts):
        return None
    for above in here.parents:
        if (above / "dataset_description.json").is_file():
            return above
    return None


def find_bids(tree: Tree, choice: Choice, found: Found) -> list[Source]:
    """The BOLD series of a data set of derivatives, one a run, with what belongs to it."""
    groups: dict[Path, list[tuple[Path, Name]]] = {}
    roots: dict[Path, Path] = {}
    surfaces, odd = [], []
    for path in tree.walk(SUFFIXES):
        name = parse_name(path)
        if is_surface(path):
            surfaces.append(path)
        elif is_mask_name(path):
            continue
        elif name.suffix != "bold":
            if not name.entities or "-" in name.suffix:
                odd.append(path)
            else:
                found.pass_over(f"no BOLD series: {name.suffix}", path)
        elif name.entities.get("part") in NOT_MAGNITUDE:
            found.pass_over(f"part-{name.entities['part']}: no magnitude image", path)
        else:
            root = roots.setdefault(path.parent, _root_of(path.parent, tree))
            groups.setdefault(root, []).append((path, name))
    groups = _one_data_set(tree, groups, found)
    sources: list[Source] = []
    for root, series in groups.items():
        sources += _of_data_set(tree, root, series, choice, found)
    if surfaces and not sources:
        raise UserError(
            f"{tree.root}: its {len(surfaces)} series are CIFTI ({surfaces[0].name}), on a surface; swift reads "
            "volumes: run fMRIPrep with --output-spaces MNI152NLin6Asym:res-2 (XCP-D: --file-format nifti)"
        )
    for path in surfaces:
        found.pass_over("CIFTI, on a surface: no volume", path)
    for path in odd if sources else []:
        found.pass_over("no BIDS name (--layout folder takes any NIfTI)", path)
    return sources


def _root_of(folder: Path, tree: Tree) -> Path:
    """The data set that a folder is of: the nearest one above that describes itself."""
    for here in [folder, *folder.parents]:
        if here == tree.root:
            break
        if "dataset_description.json" in tree.files.get(str(here), ()):
            return here
    return tree.root


def _one_data_set(
    tree: Tree, groups: dict[Path, list[tuple[Path, Name]]], found: Found
) -> dict[Path, list[tuple[Path, Name]]]:
    """Data sets that hold derivatives; two that are beside each other have to be named by the user."""
    kept = {}
    for root, series in groups.items():
        if not is_derivative(root) and all("desc" not in name.entities for _, name in series):
            for path, _ in series:
                found.pass_over("raw, not preprocessed", path)
        else:
            kept[root] = series
    named = [root for root in kept if bids_tool(root).name != "tedana"]  # one folder a run, each describes itself
    if len(named) > 1:
        raise UserError(
            f"{tree.root} holds {len(named)} data sets of derivatives: {', '.join(map(str, named[:6]))}; name those "
            "that you mean"
        )
    return kept


def _of_data_set(tree: Tree, root: Path, series: list[tuple[Path, Name]], choice: Choice, found: Found) -> list[Source]:
    # Of one subject's folder, what the data set above it says counts too.
    top = (dataset_above(root) or root) if root == tree.root else root
    tool = bids_tool(top)
    chosen, lacking, labels = _choose_desc(root, tool, series, choice, found)
    relatives = Relatives(tree, top)
    sources = [bids_source(path, name, top, tool, relatives) for path, name in chosen]
    sources = sources if choice.labels("echo") else without_echoes(sources, found)
    if tool.joins_runs and not choice.labels("run"):
        sources = _without_joined(sources, found)
    for path, name in lacking:
        problem = f"{path.name}: its run has no desc-{labels[0]}; --desc {name.entities.get('desc', '')} takes this one"
        sources.append(replace(bids_source(path, name, top, tool, relatives), problem=problem))
    found.kinds.append(f"{tool.name}, {' and '.join(f'desc-{one}' if one else 'no desc' for one in labels)}")
    hyphens = sorted({source.subject for source in sources if source.subject.count("-") > 1})
    if hyphens:
        found.notes.append(
            f"{len(hyphens)} subjects have a hyphen in their label ({', '.join(hyphens[:3])}), which BIDS "
            "forbids: taken whole"
        )
    return sources


def _choose_desc(
    root: Path, tool: BidsTool, series: list[tuple[Path, Name]], choice: Choice, found: Found
) -> tuple[list[tuple[Path, Name]], list[tuple[Path, Name]], list[str]]:
    """The series of the desc- that is the scan, those of runs that lack it, and the labels that are taken."""
    there = sorted({name.entities.get("desc", "") for _, name in series})
    wanted = list(choice.labels("desc"))
    if wanted and not set(wanted) & set(there):
        listed = ", ".join(one or "(no desc)" for one in there)
        raise UserError(f"--desc {' '.join(wanted)}: no series of {root}; there are {listed}")
    if not wanted:
        known = [label for label in tool.series if label in there]
        if not known and len(there) > 1:
            raise UserError(
                f"{root}: series with desc {', '.join(one or '(none)' for one in there)}; choose one with --desc"
            )
        if not known:
            found.notes.append(
                f"{root}: its only series, {'desc-' + there[0] if there[0] else 'without desc'}, are taken"
            )
        wanted = known[:1] or there
    kept = [(path, name) for path, name in series if name.entities.get("desc", "") in wanted]
    runs = {_run(name) for _, name in kept}
    lacking: dict[frozenset[tuple[str, str]], tuple[Path, Name]] = {}
    for path, name in series:
        label = name.entities.get("desc", "")
        if label in wanted:
            continue
        if _run(name) in runs or choice.labels("desc"):
            what = f"desc-{label}" if label else "no desc"
            found.pass_over(f"{what}: another form of a run (--desc {label} takes it)", path)
        else:
            lacking.setdefault(_run(name), (path, name))
    return kept, list(lacking.values()), wanted


def _run(name: Name) -> frozenset[tuple[str, str]]:
    return frozenset(name.run_entities.items())


def _without_joined(sources: list[Source], found: Found) -> list[Source]:
    """Leave out files without run- that hold the runs of one session one after the other."""

    def key(source: Source) -> frozenset[tuple[str, str]]:
        return frozenset(item for item in source.entities.items() if item[0] != "run")

    runs = {key(source) for source in sources if source.run}
    kept = []
    for source in sources:
        if not source.run and key(source) in runs:
            found.pass_over("all runs joined; the single runs are taken", source.path)
        else:
            kept.append(source)
    return kept


def bids_source(path: Path, name: Name, root: Path, tool: BidsTool, relatives: Relatives) -> Source:
    """A series with its mask, sidecars, confounds and events."""
    run = name.run_entities
    label, folder = subject_label(path)
    problem = ""
    if label and folder and label != folder:
        problem = f"{path.name}: the name says {label}, the folder {folder}: whose scan it is, is not known"
    subject = label or folder
    notes: tuple[str, ...] = ()
    pairs = [f"{key}-{value}" for key, value in run.items()]
    if not subject:
        guess = one_file(path, root if root in path.parents else None, relatives.tree)
        subject, notes = guess.subject, guess.notes
    if "sub" not in run:
        pairs = [subject, *name.words, *pairs]
    return Source(
        scan_id=scan_name("_".join(pairs)),
        path=path,
        subject=subject,
        session=run.get("ses", ""),
        task=run.get("task", ""),
        run=run.get("run", ""),
        mask=relatives.nearest(path, name, ("mask",), NIFTI, tool.masks, same_space=True),
        sidecars=relatives.sidecars(path, name),
        confounds=relatives.nearest(path, name, ("timeseries", "regressors"), (".tsv",), (("desc", "confounds"),)),
        events=relatives.nearest(path, name, ("events",), (".tsv",), beyond=True),
        space=name.entities.get("space"),
        tool=tool.name,
        entities=dict(name.entities),
        dataset=root,
        notes=notes,
        problem=problem,
    )

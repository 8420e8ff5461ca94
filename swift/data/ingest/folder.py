"""Scans in folders that are no BIDS derivatives: any NIfTI, the folders of HCP, UK Biobank and FSL, SwiFT v1 frames.

Whose a scan is, in this order: the label of `sub-LABEL` in the file's name or in any folder above it; the place that
the tool's folders give it (swift.data.ingest.tools); the first folder below the one that was named; the file's own
name. The last two are guesses, and are said.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from swift.data.ingest.names import FRAME, Name, is_surface, legal_name, parse_name, strip_suffix
from swift.data.ingest.sources import Found, Source, scan_name, subject_label
from swift.data.ingest.tools import FOLDER_TOOLS, INSIDE, FolderTool
from swift.data.ingest.tree import Tree

MASK_ENDINGS = ("_brainmask", "_desc-brain_mask", "_brain_mask", "_mask")
NIFTI = (".nii.gz", ".nii")
NO_BOLD = re.compile(
    r"(?i)sbref|boldref|epi|t1w|t2w|t2star|flair|pdw?|angio|dwi|phase\d?|phasediff|magnitude\d?|fieldmap|dseg|probseg|"
    r"boldmap|statmap|m0scan|asl|unit1|t1map|inplanet[12]|defacemask|xfm"
)
"""BIDS suffixes of files that are no series of BOLD volumes."""
NOT_MAGNITUDE = ("phase", "real", "imag")
"""Labels of part- for images that are no magnitude."""
GUESS_FOLDER = "subject {subject}: a guess, the name of the folder"
FROM_ABOVE = "subject {subject}: the name of a folder above the one that was given"
GUESS_FILE = "subject {subject}: a guess, the name of the file"


def is_mask_name(path: Path) -> bool:
    """A file that belongs to a scan rather than being one."""
    return strip_suffix(path).lower().endswith("mask")


def no_series(path: Path, name: Name) -> str:
    """Why a file is no BOLD series, by its name; "": it may be one."""
    if is_surface(path):
        return "CIFTI or GIFTI, on a surface: no volume"
    if name.entities and NO_BOLD.fullmatch(name.suffix):
        return f"no BOLD series: {name.suffix}"
    if name.entities.get("part") in NOT_MAGNITUDE:
        return f"part-{name.entities['part']}: no magnitude image"
    return ""


def mask_beside(scan: Path, tree: Tree | None = None) -> Path | None:
    """<scan>_brainmask.nii.gz or the like, next to a scan (or to X_bold.nii.gz: X_mask.nii.gz)."""
    stem = strip_suffix(scan)
    stems = [stem, *([stem.removesuffix("_bold")] if stem.endswith("_bold") else [])]
    tree = tree or Tree(scan.parent)
    for start in stems:
        for ending in MASK_ENDINGS:
            for suffix in NIFTI:
                if tree.has(mask := scan.with_name(f"{start}{ending}{suffix}")):
                    return mask
    return None


def sidecars_beside(scan: Path, tree: Tree | None = None) -> tuple[Path, ...]:
    """<scan>.json, next to a scan."""
    file = scan.with_name(strip_suffix(scan) + ".json")
    return (file,) if (tree or Tree(scan.parent)).has(file) else ()


def one_file(path: Path, root: Path | None = None, tree: Tree | None = None) -> Source:
    """A NIfTI file, named by its place below `root` (None: by its own name alone)."""
    relative = path.relative_to(root) if root is not None else Path(path.name)
    parts = [*relative.parts[:-1], strip_suffix(relative)]
    entities = parse_name(path).entities
    label, folder = subject_label(path)
    notes: tuple[str, ...] = ()
    subject, problem = label or folder, ""
    if label and folder and label != folder:
        problem = f"{path.name}: the name says {label}, the folder {folder}: whose scan it is, is not known"
    if subject and not label and root is not None and folder not in (root.name, *relative.parts):
        notes = (FROM_ABOVE.format(subject=subject),)
    if not subject:
        subject = legal_name(parts[0]) or "unnamed"
        notes = ((GUESS_FOLDER if len(parts) > 1 else GUESS_FILE).format(subject=subject),)
    return Source(
        scan_name("_".join(parts)),
        path,
        subject,
        session=entities.get("ses", ""),
        task=entities.get("task", ""),
        run=entities.get("run", ""),
        mask=mask_beside(path, tree),
        sidecars=sidecars_beside(path, tree),
        space=entities.get("space"),
        entities=entities,
        dataset=root or path.parent,
        notes=notes,
        problem=problem,
    )


def find_folder(tree: Tree, found: Found) -> list[Source]:
    """Every NIfTI series below a folder; masks are paired with their scans. Known tools' folders are read as theirs."""
    sources, rest = _of_tools(tree, found)
    for path in rest:
        if is_mask_name(path):
            continue
        if reason := no_series(path, parse_name(path)):
            found.pass_over(reason, path)
        else:
            sources.append(one_file(path, tree.root, tree))
    sources = without_echoes(sources, found)
    found.notes += guesses(sources)
    return sorted(sources, key=lambda source: source.path)


def without_echoes(sources: list[Source], found: Found) -> list[Source]:
    """Leave out single echoes of a run whose combined series is there too: all are one scan."""
    runs = {_run_of(source, "") for source in sources if "echo" not in source.entities}
    kept = []
    for source in sources:
        if "echo" in source.entities and _run_of(source, "echo") in runs:
            found.pass_over("single echoes; the combined series is taken (--echo N takes one)", source.path)
        else:
            kept.append(source)
    left = Counter(_run_of(source, "echo") for source in kept if "echo" in source.entities)
    if several := sum(count > 1 for count in left.values()):
        found.notes.append(f"{several} runs are there as single echoes only: each echo is a scan; --echo N takes one")
    return kept


def _run_of(source: Source, but: str) -> tuple[Path, frozenset[tuple[str, str]]]:
    return source.path.parent, frozenset(item for item in source.entities.items() if item[0] != but)


def guesses(sources: list[Source]) -> list[str]:
    """What has to be said of subjects that were guessed: one sentence for each kind of guess."""
    notes = []
    above = sorted({one.subject for one in sources if FROM_ABOVE.format(subject=one.subject) in one.notes})
    if above:
        notes.append(f"subject {' and '.join(above)}: the name of a folder above the one that was given")
    for guess, what in ((GUESS_FILE, "file"), (GUESS_FOLDER, "folder")):
        names = [one.subject for one in sources if guess.format(subject=one.subject) in one.notes]
        if not names:
            continue
        shown = ", ".join(list(dict.fromkeys(names))[:3]) + (", ..." if len(set(names)) > 3 else "")
        note = f"{len(names)} scans name no subject: the name of the {what} is taken for it ({shown})"
        alike = Counter(re.sub(r"[_-]?[A-Za-z]*[_-]?\d*$", "", name) for name in set(names))
        stem = next((stem for stem, count in alike.items() if stem and count > 1), "")
        if stem and what == "file":
            two = sorted(name for name in set(names) if name.startswith(stem))[:2]
            note += f"; {two[0]} and {two[1]} may be one person"
        notes.append(note + "; give a table with the columns path, subject, or folders called sub-LABEL")
    return notes


# --------------------------------------------------------------------------------------------- folders of known tools
def _of_tools(tree: Tree, found: Found) -> tuple[list[Source], list[Path]]:
    """Scans in the folders of known tools, and the NIfTI files outside of such folders."""
    sources: list[Source] = []
    counts: Counter[str] = Counter()
    inside: list[Path] = []
    rest: list[Path] = []
    by_folder: dict[Path, list[Path]] = {}
    for path in tree.walk(NIFTI):
        by_folder.setdefault(path.parent, []).append(path)
    for folder, paths in by_folder.items():
        place = Path(os.path.abspath(folder)).as_posix()
        for tool in FOLDER_TOOLS:
            match = re.fullmatch(tool.folder, place)
            taken = _series(tool, match, paths) if match else None
            if match and taken is not None:
                counts[tool.name] += 1
                sources.append(_tool_source(tool, match, taken, tree))
                inside += [path for path in paths if path != taken and path != sources[-1].mask]
                break
        else:
            (inside if INSIDE.search(place) else rest).extend(paths)
    if not sources:
        return [], [*rest, *inside]
    for path in inside:
        found.pass_over(f"other files of {', '.join(counts)} beside the cleaned series", path)
    found.kinds += [f"{name}: {count} runs" for name, count in counts.items()]
    return sources, rest


def _series(tool: FolderTool, match: re.Match[str], paths: list[Path]) -> Path | None:
    for pattern in tool.series:
        pattern = pattern.replace("{task}", re.escape(match["task"]))
        for path in paths:
            if re.fullmatch(pattern, path.name):
                return path
    return None


def _tool_source(tool: FolderTool, match: re.Match[str], path: Path, tree: Tree) -> Source:
    parts = match.groupdict()
    task = parts["task"]
    source = one_file(path, None, tree)
    if parts.get("sub") and not source.subject.startswith("sub-"):
        source = replace(source, subject=legal_name(parts["sub"]), notes=())
    elif source.notes:  # the folder above the tool's own
        subject = legal_name(Path(os.path.abspath(path)).parents[1].name)
        source = replace(source, subject=subject, notes=(GUESS_FOLDER.format(subject=subject),))
    masks = [path.with_name(name.replace("{task}", task)) for name in tool.masks]
    mask = next((mask for mask in masks if tree.has(mask)), source.mask)
    sidecars = source.sidecars
    if tool.sidecar:
        file = Path(os.path.normpath(path.parent / tool.sidecar.replace("{task}", task)))
        sidecars = (file,) if tree.has(file) else sidecars
    session = parts.get("ses") or ""
    return replace(
        source,
        scan_id=scan_name("_".join(part for part in (source.subject, session, task) if part)),
        session=session,
        task=task,
        mask=mask,
        sidecars=sidecars,
        space=tool.space,
        entities={key: value for key, value in (("ses", session), ("task", task), ("space", tool.space)) if value},
        dataset=tree.root,
        tool=tool.name,
    )


def find_frames(tree: Tree) -> list[Source]:
    """SwiFT v1: every folder at or below the root that holds frame_0.pt, frame_1.pt, ..."""
    folders = {path.parent for path in tree.walk((".pt",)) if FRAME.fullmatch(path.name)}
    found = []
    for folder in sorted(folders):
        relative = folder.relative_to(tree.root)
        parts = [part for part in relative.parts if part != "img"] or [folder.name]
        found.append(
            Source(scan_name("_".join(parts)), folder, scan_name(parts[0]), dataset=tree.root, tool="SwiFT v1")
        )
    return found

"""All scans in the named places; BIDS derivatives: scans, their masks, sidecars, confounds, events and participants.

https://bids-specification.readthedocs.io (file names, inheritance principle, derivatives). The rules in plain words
are in docs/data.md.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift.data.ingest.derivatives import SERIES, bids_source, dataset_above, find_bids
from swift.data.ingest.folder import find_folder, find_frames, guesses, one_file
from swift.data.ingest.inherit import Relatives
from swift.data.ingest.names import FRAME, SUFFIXES, is_nifti, parse_name, strip_suffix
from swift.data.ingest.participants import participants_file, read_participants
from swift.data.ingest.sources import (
    LAYOUTS,
    Choice,
    Found,
    Source,
    choose,
    one_file_once,
    parse_choice,
    phenotypes,
    scan_name,
)
from swift.data.ingest.table import find_table
from swift.data.ingest.tools import bids_tool
from swift.data.ingest.tree import Tree, list_tree
from swift.data.labels.subjects import two_spellings
from swift.data.store.spaces import is_known, known_spaces
from swift.data.store.tables import EXPORTED
from swift.utils.errors import UserError

NOT_HERE = "a link that leads nowhere: its content is not here (datalad get?)"


def find_sources(
    inputs: list[Path], *, layout: str = "auto", participants: Path | None = None, **entities: str | None
) -> list[Source]:
    """All scans in the given places, as `find` finds them; `entities` such as space="T1w", task="rest" choose."""
    chosen = parse_choice({key: [label] for key, label in entities.items() if label is not None})
    return find(inputs, Choice(layout, chosen, participants), once=False).sources


def find(inputs: list[Path], choice: Choice | None = None, *, once: bool = True) -> Found:
    """All scans in the given places.

    Args:
        inputs: Folders (BIDS derivatives, any NIfTI, SwiFT v1 frames), NIfTI files, CSV or TSV tables.
        choice: Which of them are meant.
        once: A file that has two names (links) is one scan.

    Returns:
        Sources in a stable order; the same name may come twice (the caller refuses those). Such that cannot be read
        have a `problem`.

    Raises:
        UserError: a place does not exist or holds no scan; a choice that leaves none, or that nothing heeds.
    """
    choice = choice or Choice()
    if choice.layout not in LAYOUTS:
        raise UserError(f"--layout {choice.layout!r}: legal are {', '.join(LAYOUTS)}")
    found = Found()
    for place in _places(inputs):
        found.sources += _in_place(place, choice.layout, choice, found)
    _name_space(found, choice)
    found.sources = choose(found.sources, _but_desc(choice), " and ".join(map(str, inputs[:3])))
    if once:
        found.sources, notes = one_file_once(found.sources)
        found.notes += notes
    _add_people(found, choice)
    if choice.prefix:
        found.sources = [_prefixed(source, choice.prefix) for source in found.sources]
    found.notes += _people_in_doubt(found.sources)
    return found


def _but_desc(choice: Choice) -> Choice:
    """Desc is chosen data set by data set, where it is known which there are."""
    return replace(choice, entities={key: labels for key, labels in choice.entities.items() if key != "desc"})


# ---------------------------------------------------------------------------------------------------------- places
def _places(inputs: list[Path]) -> list[list[Path]]:
    """Folders and tables, each alone; single files are one place, so that their folders can name them."""
    files: list[Path] = []
    places: list[list[Path]] = []
    for place in inputs:
        if not place.exists():
            link = f" ({NOT_HERE})" if place.is_symlink() else ""
            raise UserError(f"{place}: no such file or folder{link}")
        if place.is_file() and is_nifti(place):
            if not files:
                places.append(files)
            files.append(place)
        else:
            places.append([place])
    return places


def _in_place(places: list[Path], layout: str, choice: Choice, found: Found) -> list[Source]:
    first = places[0]
    if first.is_file() and is_nifti(first):
        return _single_files(places, layout, choice, found)
    if first.is_file():
        if first.suffix not in (".csv", ".tsv") and layout != "table":
            raise UserError(f"{first}: neither a NIfTI file ({', '.join(SUFFIXES)}) nor a table (.csv, .tsv)")
        found.kinds.append(f"{first}: a table of scans")
        return find_table(first, found)
    # One subject's folder is read as a part of its data set.
    tree = list_tree(Path(os.path.abspath(first)) if dataset_above(first) is not None else first)
    kind = _guess(tree) if layout == "auto" else layout
    before = len(found.kinds)
    if kind == "table":
        sources = find_table(first / EXPORTED if (first / EXPORTED).is_file() else first, found)
    elif kind == "frames":
        sources = find_frames(tree)
    elif kind == "bids":
        sources = find_bids(tree, choice, found)
    else:
        sources = find_folder(tree, found)
    words = {"bids": "BIDS derivatives", "folder": "a folder of NIfTI files", "frames": "SwiFT v1 frames"}
    tools = "; ".join(found.kinds[before:])
    found.kinds[before:] = [f"{first}: {words.get(kind, 'a table of scans')}" + (f" ({tools})" if tools else "")]
    sources = _with_problems(sources, tree, found)
    if not sources:
        hint = "no *_desc-preproc_bold.nii.gz; --layout folder takes any NIfTI" if kind == "bids" else "no scan"
        passed = "".join(f"; {line}" for line in found.told()[:3])
        raise UserError(f"{first}: {hint} (layout {kind}{passed})")
    return sources


def _guess(tree: Tree) -> str:
    bids = (tree.root / "dataset_description.json").is_file()
    if EXPORTED in tree.names(tree.root):
        return "table"
    for folder in tree.folders():
        for name in tree.files[folder]:
            if name.startswith("frame_") and FRAME.fullmatch(name):
                return "frames"
            bids = bids or (name.endswith(SUFFIXES) and SERIES.fullmatch(name) is not None)
    return "bids" if bids or dataset_above(tree.root) is not None else "folder"


def _single_files(files: list[Path], layout: str, choice: Choice, found: Found) -> list[Source]:
    """Files given one by one: a BIDS series as in its data set, others named by their place below the common folder."""
    sources: dict[Path, Source] = {}
    series = [path for path in files if layout != "folder" and SERIES.fullmatch(path.name)]
    caches: dict[Path, Relatives] = {}
    for path in series:
        here = Path(os.path.abspath(path))
        root = dataset_above(here.parent)
        here, root = (here, root) if root is not None else (path, path.parent)
        relatives = caches.setdefault(root, Relatives(Tree(root), root))
        source = bids_source(here, parse_name(here), root, bids_tool(root), relatives)
        sources[path] = _check_links(source, relatives.tree)
    others = [path for path in files if path not in sources]
    top = Path(os.path.commonpath([path.parent for path in others])) if len(others) > 1 else None
    cache = Tree(top or Path())
    stems = Counter(path.name for path in dict.fromkeys(others))
    for path in others:
        source = _check_links(one_file(path, top, cache), cache)
        # Folders come into the name only where they have to.
        alone = stems[path.name] == 1
        sources[path] = replace(source, scan_id=scan_name(strip_suffix(path))) if alone else source
    found.notes += guesses([sources[path] for path in others])
    found.kinds.append(f"{len(files)} NIfTI file{'s' if len(files) > 1 else ''}")
    return [sources[path] for path in files]


def _with_problems(sources: list[Source], tree: Tree, found: Found) -> list[Source]:
    """Name what is listed but cannot be used: links that lead nowhere, folders that cannot be read."""
    kept = [_check_links(source, tree) for source in sources]
    for folder, why in sorted(tree.unreadable.items()):
        relative = os.path.relpath(folder, tree.root)
        name = scan_name(relative) if relative != "." else "folder"
        kept.append(Source(name, Path(folder), name, problem=f"{folder}: the folder cannot be read ({why})"))
    if tree.again:
        shown = ", ".join(f"{link} is {folder}" for link, folder in list(tree.again.items())[:2])
        found.notes.append(f"{len(tree.again)} linked folders are listed already under another name ({shown})")
    return kept


def _check_links(source: Source, tree: Tree) -> Source:
    def nowhere(path: Path | None) -> bool:
        return path is not None and str(path) in tree.dangling

    if nowhere(source.path):
        return replace(source, problem=f"{source.path.name}: {NOT_HERE}")
    for path in filter(None, (source.mask, *source.sidecars)):
        if nowhere(path):
            return replace(source, problem=f"{source.path.name}: {path.name} beside it is {NOT_HERE}")
    for what in ("confounds", "events"):
        path = getattr(source, what)
        if path is not None and nowhere(path):
            changes: dict[str, Any] = {
                what: None,
                "notes": (*source.notes, f"{what} left out: {path.name} is {NOT_HERE}"),
            }
            source = replace(source, **changes)
    return source


# ---------------------------------------------------------------------------------------------------------- people
def _name_space(found: Found, choice: Choice) -> None:
    """--space names the space of files, tables and folders that do not name their own.

    Raises:
        UserError: one that is not known here, which would say nothing of where these scans lie.
    """
    labels = choice.labels("space")
    if len(labels) != 1 or not labels[0]:
        return
    for place, source in enumerate(found.sources):
        native = source.tool is not None and "sub" in source.entities  # BIDS: no space- means the scanner's own
        if source.space is None and not native and not source.problem:
            if not is_known(labels[0]):
                raise UserError(
                    f"--space {labels[0]}: {source.path.name} does not name its space, and known are {known_spaces()}; "
                    "for scans in another template leave --space out: each is centred on its own brain mask"
                )
            note = f"space {labels[0]} as told by --space"
            entities = {**source.entities, "space": labels[0]}
            found.sources[place] = replace(source, space=labels[0], entities=entities, notes=(*source.notes, note))


def _add_people(found: Found, choice: Choice) -> None:
    """What participants.tsv says of each subject; of a table's scans, the table's own columns win."""
    by_dataset: dict[Path | None, list[int]] = {}
    for place, source in enumerate(found.sources):
        if not source.problem:
            by_dataset.setdefault(source.dataset, []).append(place)
    matched = False
    for dataset, places in by_dataset.items():
        file = choice.participants
        if file is None and dataset is not None and dataset.is_dir():
            file = participants_file(dataset)
        people, notes = read_participants(file).match(found.sources[place].subject for place in places)
        found.notes += notes
        matched = matched or bool(people)
        for place in places:
            source = found.sources[place]
            person = dict(people.get(source.subject, {}))
            site = person.pop("site", person.pop("site_id", ""))
            found.sources[place] = replace(
                source, site=source.site or site, phenotypes=phenotypes(person) | source.phenotypes
            )
    if choice.participants is not None and found.sources and not matched:
        subjects = sorted({source.subject for source in found.sources})
        raise UserError(
            f"--participants {choice.participants}: no line is of a subject that is here ({', '.join(subjects[:3])})"
        )


def _prefixed(source: Source, prefix: str) -> Source:
    return replace(source, scan_id=scan_name(prefix + source.scan_id), subject=prefix + source.subject)


def _people_in_doubt(sources: list[Source]) -> list[str]:
    """Subjects that may be one person, and one label that may be two: a sentence each."""
    notes = []
    homes: dict[str, set[str]] = {}
    for source in sources:
        if not source.problem:
            homes.setdefault(source.subject, set()).add(str(source.dataset))
    shared = {name: sorted(where) for name, where in homes.items() if len(where) > 1}
    pairs = Counter(tuple(where) for where in shared.values())
    for where, count in pairs.items():
        name = next(name for name, one in shared.items() if tuple(one) == where)
        notes.append(
            f"{count} subjects are in several data sets ({name} in {' and '.join(where[:3])}): taken for one person "
            "each; if they are not, ingest each data set with its own --prefix"
        )
    twins = two_spellings(homes)
    if twins:
        shown = "; ".join(" and ".join(sorted(names)) for names in twins[:3])
        notes.append(
            f"{len(twins)} pairs of subjects differ in spelling only ({shown}): if they are one person, rename them"
        )
    return notes

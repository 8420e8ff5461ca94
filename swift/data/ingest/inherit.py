"""Which mask, sidecars, confounds and events belong to a BIDS run (inheritance principle).

A file further up in the tree counts too when its entities are a part of the run's. Nothing is asked of the disk here:
all comes from one listing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from swift.data.ingest.names import Name, parse_name
from swift.data.ingest.tree import Tree

ENDINGS = (".nii.gz", ".nii", ".json", ".tsv")
NIFTI = (".nii.gz", ".nii")


class Relatives:
    """Looks up what belongs to the runs of one data set.

    Args:
        tree: A listing of the data set or of a part of it; folders above that part are listed when asked for.
        root: The data set: nothing above it is inherited.
    """

    def __init__(self, tree: Tree, root: Path) -> None:
        self.tree, self.root = tree, root
        inside = root.parent.name == "derivatives"
        self._raw = root.parent.parent if inside else None
        self._known: dict[Path, dict[tuple[str, str], list[tuple[Name, str]]]] = {}

    def _in(self, folder: Path, suffix: str, ending: str) -> list[tuple[Name, str]]:
        if folder not in self._known:
            groups: dict[tuple[str, str], list[tuple[Name, str]]] = {}
            for file in self.tree.names(folder):
                end = next((end for end in ENDINGS if file.endswith(end)), None)
                if end is not None:
                    name = parse_name(file[: -len(end)])
                    groups.setdefault((name.suffix, end), []).append((name, file))
            self._known[folder] = groups
        return self._known[folder].get((suffix, ending), [])

    def _up(self, scan: Path) -> Iterator[Path]:
        """Folders from the scan's own up to the data set's."""
        for folder in scan.parents:
            yield folder
            if folder == self.root:
                return

    def nearest(
        self,
        scan: Path,
        mine: Name,
        suffixes: Sequence[str],
        endings: Sequence[str],
        marks: Sequence[tuple[str, str]] = (),
        same_space: bool = False,
        beyond: bool = False,
    ) -> Path | None:
        """The closest file of that kind; of those in one folder, the one that names most of the run's entities.

        Args:
            scan: The run's file.
            mine: Its name.
            suffixes: Such as `mask`; the best first.
            endings: Such as `.nii.gz`.
            marks: Entity and label that the file must have, the best first; none: anything.
            same_space: It must name the run's own space: a mask of another space is of another grid.
            beyond: Also look into the raw data set that derivatives/NAME/ lies in.
        """
        folders = list(self._up(scan))
        if beyond and self._raw is not None and self.root in scan.parents:
            folders += [self._raw / folder.relative_to(self.root) for folder in folders]
        for folder in folders:
            for suffix in suffixes:
                for mark in marks or (None,):
                    best: tuple[int, str] | None = None
                    for ending in endings:
                        for name, file in self._in(folder, suffix, ending):
                            if mark is not None and name.entities.get(mark[0]) != mark[1]:
                                continue
                            if same_space and name.entities.get("space") != mine.entities.get("space"):
                                continue
                            theirs = {part for part in name.parts if mark is None or part[0] != mark[0]}
                            if theirs <= mine.parts and (best is None or len(theirs) > best[0]):
                                best = (len(theirs), file)
                    if best is not None:
                        return folder / best[1]
        return None

    def sidecars(self, scan: Path, mine: Name) -> tuple[Path, ...]:
        """All JSON files that speak of a run; the nearest last."""
        found: list[Path] = []
        for folder in self._up(scan):
            here = [
                (name, folder / file)
                for name, file in self._in(folder, mine.suffix, ".json")
                if name.parts <= mine.parts
            ]
            found += [path for _, path in sorted(here, key=lambda one: -len(one[0].parts))]
        return tuple(reversed(found))

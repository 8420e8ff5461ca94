"""One listing of a folder and all below it, so that nothing is asked of the disk twice and nothing is missed unsaid.

Hidden folders (.git, .datalad, ...) are not entered. Links to folders are followed; a folder that has been listed under
another name is not listed again. Links that lead nowhere and folders that cannot be read are kept, to be named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Identity = tuple[int, int]
"""Device and inode: one for all names of a file."""


@dataclass
class Tree:
    """What a folder holds. Folders are texts, as `root` was given."""

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    """Names of the files of each folder, sorted; hidden ones left out, links that lead nowhere included."""
    dangling: set[str] = field(default_factory=set)
    """Links to files that are not there."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Folders that cannot be listed, and why."""
    again: dict[str, str] = field(default_factory=dict)
    """Linked folders that were listed under another name, and that name."""
    _sets: dict[str, frozenset[str]] = field(default_factory=dict)

    def has(self, path: Path) -> bool:
        """Whether a file of that name is listed; one that leads nowhere counts."""
        folder = str(path.parent)
        if folder not in self._sets:
            self._sets[folder] = frozenset(self.names(path.parent))
        return path.name in self._sets[folder]

    def walk(self, endings: tuple[str, ...] = ("",)) -> Iterator[Path]:
        """Every file below the root whose name ends so, folder by folder in order."""
        for folder in self.folders():
            base = Path(folder)
            yield from (base / name for name in self.files[folder] if name.endswith(endings))

    def folders(self) -> list[str]:
        """The folders below the root and itself, in order."""
        return sorted(name for name in self.files if self._below(name))

    def _below(self, folder: str) -> bool:
        root = str(self.root)
        return folder == root or folder.startswith(root.rstrip(os.sep) + os.sep) or root == "."

    def names(self, folder: Path) -> list[str]:
        """Files of one folder; one that lies outside of the tree (above it) is listed now, once."""
        key = str(folder)
        if key not in self.files:
            self._list(key)
        return self.files.get(key, [])

    def _list(self, folder: str) -> list[os.DirEntry[str]]:
        """List one folder; returns the folders in it."""
        inside: list[os.DirEntry[str]] = []
        names = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        inside.append(entry)
                        continue
                    names.append(entry.name)
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        self.dangling.add(os.path.join(folder, entry.name))
        except FileNotFoundError:  # a place where something could have been
            pass
        except OSError as error:
            self.unreadable[folder] = error.strerror or str(error)
        self.files[folder] = sorted(names)
        return inside


def list_tree(root: Path) -> Tree:
    """Walk a folder: real folders first, so that a link to one of them is the second name and not the first."""
    tree = Tree(root)
    seen: dict[Identity, str] = {}
    here: list[str] = [str(root)]
    linked: list[str] = []
    while here or linked:
        folder = here.pop() if here else linked.pop()
        try:
            stat = os.stat(folder)
        except OSError as error:
            tree.unreadable[folder] = error.strerror or str(error)
            continue
        identity = (stat.st_dev, stat.st_ino)
        if identity in seen:
            tree.again[folder] = seen[identity]
            continue
        seen[identity] = folder
        inside = sorted(tree._list(folder), key=lambda entry: entry.name, reverse=True)
        for entry in inside:
            path = os.path.join(folder, entry.name)
            (linked if entry.is_symlink() else here).append(path)
        if not here:
            linked.sort(reverse=True)
    return tree

"""Text files that readers see whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, sync: bool = False, executable: bool = False) -> None:
    """Put a text file in place: readers see the old one or the new one, never a part.

    Args:
        path: Of the file; its folder must exist.
        text: Its content.
        sync: Wait until it is on the disk, so that this also holds after a power cut.
        executable: For everybody, as a shell file is.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())
    if executable:
        partial.chmod(0o755)
    partial.replace(path)
    if sync:
        sync_folder(path.parent)

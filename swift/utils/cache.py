"""Where swift keeps what it can make or fetch again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from swift.utils.errors import UserError


def cache_dir() -> Path:
    """The cache folder, made if need be: $SWIFT_CACHE, else $XDG_CACHE_HOME/swift-fmri, else ~/.cache/swift-fmri.

    Raises:
        UserError: it cannot be made or written; the message says how to choose another.

    """
    own, general = os.environ.get("SWIFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    usual = (Path(general) if general else Path.home() / ".cache") / "swift-fmri"
    folder = Path(own).expanduser() if own else usual
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell (read-only mounts, root)
            pass
    except OSError as error:
        raise UserError(
            f"cache folder {folder}: cannot be written ({error.strerror}); set SWIFT_CACHE to one"
        ) from error
    return folder

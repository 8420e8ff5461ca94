"""What every command does around its work: logging to stderr, and one clear line for a user's mistake."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable

from swift.utils.errors import UserError

USER_ERROR_STATUS = 2
NO_MEMORY_STATUS = 1
DISK = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.EIO,
    errno.ESTALE,
}
"""Errors of files that say enough in one line; others are faults of ours and keep their traceback."""
STOPPED_STATUS = 75
"""Of a run that was asked to stop and has saved: it can go on (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED_STATUS = 130
"""After Ctrl-C, as shells number it."""


def set_up_logging() -> None:
    """Messages of swift go to stderr as plain lines; libraries from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("swift").setLevel(logging.INFO)
    workers, going_on = r".*does not have many workers.*", r"Checkpoint directory .* exists and is not empty.*"
    for quiet in (workers, going_on, r".*LeafSpec.*", r".*`isinstance\(treespec.*", r".*`srun` command.*"):
        warnings.filterwarnings("ignore", message=quiet)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def reported(work: Callable[[], object], speaks: Callable[[], bool] = lambda: True) -> None:
    """Run `work`; a UserError becomes one line on stderr and exit status 2, Ctrl-C becomes status 130.

    So does a file that cannot be opened, read or written where the disk or its rights forbid it: read-only, full, gone,
    ...; memory that is not enough, of the machine or of a GPU, ends with status 1.

    Args:
        work: What the command does.
        speaks: Whether this process prints the message, where several fail together.
    """
    try:
        work()
    except UserError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except OSError as error:
        if error.errno not in DISK or not error.filename:
            raise
        if speaks():
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        if speaks():
            print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)
    except (MemoryError, RuntimeError) as error:
        lacks = no_memory(error)
        if lacks is None:
            raise
        if speaks():
            print(f"error: {lacks}", file=sys.stderr)
        sys.exit(NO_MEMORY_STATUS)


def no_memory(error: BaseException) -> str | None:
    """One line for an error that says that memory is not enough; None for any other one. Torch need not be imported."""
    told = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in told:
        asked = re.search(r"tried to allocate (\d+) bytes|[Uu]nable to allocate ([\d.]+ \w+)", told)
        size = f" ({asked[1] + ' bytes' if asked[1] else asked[2]} more were asked for)" if asked else ""
        return f"this machine's memory is not enough{size}"
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is not enough ({told.split('. ')[0]}): try a smaller batch"
    return None

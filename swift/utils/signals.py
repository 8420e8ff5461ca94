"""Signals in worker processes: the process that started them decides when to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

GRACE_SECONDS = 120.0
"""How long a worker outlives a SIGTERM: longer than the process it works for takes to save and stop."""


def leave_stopping_to_parent(worker: int = 0) -> None:
    """Make a worker process, in which this is called, outlive the signals that ask its parent to stop.

    Ctrl-C and batch systems signal every process of a run, and a worker that died at once would bring down the process
    that is about to save.

    Args:
        worker: Its number; unused (DataLoader passes it).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    # Status 0: a DataLoader takes anything else for a crash.
    timer = threading.Timer(GRACE_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()

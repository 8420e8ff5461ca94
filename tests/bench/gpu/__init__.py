"""Correctness and speed on one device or several, in parts that run alone: `python -m tests.bench.gpu --list`."""

import os

# torch's profiler would tell of every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

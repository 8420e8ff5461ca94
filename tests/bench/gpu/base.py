"""What every part of the benchmark is made of: cases with a name, rows of figures, one JSON file, one table a part."""

from __future__ import annotations

import gc
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from swift.utils.files import replace_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all parts are told.

    Attributes:
        device: That is measured.
        small: Tiny shapes, which a CPU does in seconds.
        folder: For stores and checkpoints, temporary.
        seconds: Of a part; no case begins after that.
        only: Texts of which a case's name must hold one; empty: all cases.
        v1: Folder with the model files of SwiFT v1, or None.
        ranks: Processes that step together.
        rank: Of this process among them.
        card: `measure.card` of the device.
    """

    device: torch.device
    small: bool
    folder: Path
    seconds: float = 360.0
    only: tuple[str, ...] = ()
    v1: Path | None = None
    ranks: int = 1
    rank: int = 0
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Case:
    """One measurement: its name in the JSON, and what gives the row."""

    name: str
    work: Callable[[], Row]


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        about: One line of --list.
        cases: The measurements, the most telling first.
        columns: Of the table: key of the row, format of its value.
    """

    about: str
    cases: Callable[[Bench], list[Case]]
    columns: tuple[tuple[str, str], ...] = field(default=())


class Results:
    """The JSON file, written after every measurement."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"card": {}, "parts": {}}
        if path is not None and path.is_file():
            self.content = json.loads(path.read_text())

    def rows(self, part: str) -> dict[str, Row]:
        """Rows of a part by the names of their cases."""
        found: dict[str, Row] = self.content["parts"].setdefault(part, {})
        return found

    def add(self, part: str, case: str, row: Row) -> None:
        """Add a row, in place of an older one of the same case."""
        self.rows(part)[case] = row
        self.save()

    def forget(self, part: str, case: str) -> None:
        """Drop a row that is to be measured again."""
        self.rows(part).pop(case, None)

    def save(self) -> None:
        """Write all of it or nothing."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(self.content, indent=1, allow_nan=True) + "\n")


class OutOfTime(Exception):
    """A case took so long that the part would not end in time."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release() -> None:
    """Give back what a case held: memory of the device, compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(case: Case, bench: Bench, left: float) -> Row:
    """The row of a case; what went wrong is a row too: out of memory, out of time, any error, in one line."""
    began = time.monotonic()
    try:
        with alarm(left):
            row = case.work()
    except torch.OutOfMemoryError:
        row = {"error": "out of memory"}
    except OutOfTime:
        row = {"error": f"stopped after {time.monotonic() - began:.0f} s"}
    except Exception as error:
        text = " ".join(str(error).split())
        row = {"error": f"{type(error).__name__}: {text[:300]}"}
    return {**row, "took_s": round(time.monotonic() - began, 1)}


def broken(bench: Bench) -> bool:
    """Whether an earlier error has left the device unusable for this process (an illegal address stays)."""
    if not bench.gpu:
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=bench.device).item()
    except RuntimeError:
        return True
    return False


def wanted(part: Part, bench: Bench) -> list[Case]:
    """Cases that --only leaves."""
    return [case for case in part.cases(bench) if not bench.only or any(text in case.name for text in bench.only)]


def run_part(name: str, part: Part, bench: Bench, results: Results, speaks: bool = True) -> bool:
    """Measure the cases of a part that have no row yet, as long as its time lasts.

    Returns:
        Whether the device is still usable.
    """
    began = time.monotonic()
    for case in wanted(part, bench):
        if case.name in results.rows(name):
            continue
        left = bench.seconds - (time.monotonic() - began)
        if left <= 0:
            break
        row = measured(case, bench, left + 60)
        release_failed = broken(bench)
        results.add(name, case.name, row)
        if speaks:
            print(line(case.name, row, part.columns), flush=True)
        if release_failed:
            return False
        release()
    return True


def line(case: str, row: Row, columns: tuple[tuple[str, str], ...]) -> str:
    """One line of a table."""
    cells = []
    for key, form in columns:
        value = row.get(key)
        width = max(len(key), int("".join(c for c in form.split(".")[0] if c.isdigit()) or 8))
        try:
            text = "" if value is None else format(value, form)
        except (TypeError, ValueError):
            text = str(value)
        cells.append(f"{text.strip():>{width}}")
    return f"  {case:<44} " + "  ".join(cells) + (f"  {row['error']}" if "error" in row else "")


def header(columns: tuple[tuple[str, str], ...]) -> str:
    """The first line of a table."""
    widths = [max(len(key), int("".join(c for c in form.split(".")[0] if c.isdigit()) or 8)) for key, form in columns]
    return f"  {'':<44} " + "  ".join(f"{key:>{width}}" for (key, _), width in zip(columns, widths))


def table(name: str, part: Part, results: Results) -> str:
    """All rows of a part."""
    rows = [line(case, row, part.columns) for case, row in results.rows(name).items()]
    return "\n".join([f"{name}: {part.about}", header(part.columns), *rows])
